"""Prints an algorithm as one file that needs nothing of this repository: `python -m common.standalone algos/plr.py > my_plr.py`.

The file holds the algorithm's docstring, the imports of all parts, what the algorithm uses of common/ and envs/ (whatever that uses
itself included), module by module, and then the algorithm, whole. Text is copied, not generated: comments and layout stay.

A statement at the top of a module is copied if something that is copied reads a name it binds. One that binds nothing, such as
`f.defvjp(forward, backward)`, is copied if anything it leads to is. In the one file every name must mean one thing: what would not
is refused, and so is what cannot move (see `refuse_what_cannot_move`).
"""

import argparse
import ast
import builtins
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from common.runs.checkpoint import write_atomically
from common.runs.command import die
from common.runs.config import UsageError, require

ROOT = Path(__file__).resolve().parents[1]
INLINED = ("common", "envs")
OURS = (*INLINED, "algos", "results", "tests")
LINE_LENGTH = 132
PIP_NAMES = {"PIL": "pillow", "orbax": "orbax-checkpoint", "imageio_ffmpeg": "imageio-ffmpeg"}
PIP_NAMES |= {"gymnax": "gymnax six"}  # it imports six without saying so
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
OTHER_SCOPES = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
IMPORTS = (ast.Import, ast.ImportFrom)
TEXT_BESIDE = re.compile(r"= Path\(__file__\)\.with_name\('([\w.]+)'\)\.read_text\(")


class Import(NamedTuple):
    """A name that an import statement binds, and its meaning: a dotted path, such as jax.numpy for jnp."""

    name: str
    meaning: str
    module: str
    member: str = ""  # of `from module import member`
    alias: str = ""


class Module(NamedTuple):
    """A file that was read. Its statements are those at the top of the file, the docstring and imports left out."""

    name: str  # common.ppo
    label: str  # common/ppo.py
    lines: list[str]
    tree: ast.Module
    statements: list[ast.stmt]
    imports: list[Import]
    names: dict[str, str]  # of everything bound at the top of the file: name -> meaning; own definitions mean common.ppo.name


Places = set[tuple[str, int]]  # statements: (module, place in its list)


# --- reading


def find(root: Path, name: str) -> Path | None:
    """The file of the module `name` (common.ppo), if there is one."""
    path = root.joinpath(*name.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def read_imports(label: str, node: ast.Import | ast.ImportFrom) -> list[Import]:
    """What an import statement binds. Refuses the forms that leave open what a name means, and what cannot be inlined."""
    where = f"{label} line {node.lineno}"
    if isinstance(node, ast.Import):
        heads = [alias.name.split(".")[0] for alias in node.names]
        for alias, head in zip(node.names, heads, strict=True):
            require(head not in OURS, f"{where}: import {alias.name}: write from {alias.name} import NAME")
        named = zip(node.names, heads, strict=True)
        entries = [Import(a.asname or head, a.name if a.asname else head, a.name, "", a.asname or "") for a, head in named]
    else:
        require(node.level == 0, f"{where}: a relative import: write the module's whole name")
        require(node.module != "__future__", f"{where}: from __future__ would change the meaning of the other modules")
        require(all(alias.name != "*" for alias in node.names), f"{where}: import * hides which names are used")
        package = node.module.split(".")[0]
        require(package in INLINED or package not in OURS, f"{where}: imports {node.module}: only common/ and envs/ can be inlined")
        entries = [Import(a.asname or a.name, f"{node.module}.{a.name}", node.module, a.name, a.asname or "") for a in node.names]
    for entry in entries:
        packed = (entry.meaning + ".").startswith(("importlib.resources.", "pkgutil."))
        require(not packed, f"{where}: reads files of the repository, which one file cannot hold")
    return entries


def binds(node: ast.AST) -> set[str]:
    """The names that a statement binds in its own scope."""
    if isinstance(node, DEFINITIONS):
        return {node.name}
    if isinstance(node, OTHER_SCOPES):
        return set()
    if isinstance(node, IMPORTS):
        return {alias.asname or alias.name.split(".")[0] for alias in node.names}
    own = {node.id} if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else set()
    return own.union(*(binds(child) for child in ast.iter_child_nodes(node)))


def read_module(name: str, label: str, path: Path) -> Module:
    """Reads and parses a file."""
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except OSError as error:
        raise UsageError(f"{label}: {error.strerror}") from error
    except SyntaxError as error:
        raise UsageError(f"{label} line {error.lineno}: {error.msg}") from error
    except ValueError as error:
        raise UsageError(f"{label} is not Python text: {error}") from error
    source, tree = with_texts(label, path, source, tree)
    imports = [entry for node in tree.body if isinstance(node, IMPORTS) for entry in read_imports(label, node)]
    statements = [node for node in tree.body if not isinstance(node, IMPORTS) and not is_text(node)]
    names = {entry.name: entry.meaning for entry in imports}
    for node in statements:
        for bound in binds(node):
            require(bound not in names or names[bound] == f"{name}.{bound}", f"{label} line {node.lineno}: {bound} is imported too")
            names[bound] = f"{name}.{bound}"
    return Module(name, label, source.split("\n"), tree, statements, imports, names)


def with_texts(label: str, path: Path, source: str, tree: ast.Module) -> tuple[str, ast.Module]:
    """The file with every text that it reads from beside it in its place: NAME = Path(__file__).with_name("...").read_text(...)."""
    lines = source.split("\n")
    for node in reversed(tree.body):
        beside = TEXT_BESIDE.search(ast.unparse(node)) if isinstance(node, ast.Assign) else None
        if beside:
            try:
                text = path.with_name(beside[1]).read_text(encoding="utf-8")
            except OSError as error:
                raise UsageError(f"{label} line {node.lineno}: {beside[1]}: {error.strerror}") from error
            literal = 'r"""' + text + '"""'
            fine = '"""' not in text and not text.endswith(("\\", '"'))
            require(fine, f"{label} line {node.lineno}: {beside[1]} cannot be written as one string")
            lines[node.lineno - 1 : node.end_lineno] = f"{ast.unparse(node.targets[0])} = {literal}".split("\n")
    return "\n".join(lines), ast.parse("\n".join(lines))


def is_text(node: ast.AST) -> bool:
    """Whether a statement is a bare string: a docstring."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def read_all(path: Path, root: Path) -> dict[str, Module]:
    """The algorithm and every module that it needs: each after those that it imports, so the algorithm is last."""
    modules, begun = {}, []

    def visit(name, label, path):
        if name in modules:
            return
        if name in begun:
            raise UsageError(f"{' and '.join(begun[begun.index(name) :])} import one another")
        begun.append(name)
        module = read_module(name, label, path)
        for entry in module.imports:
            if entry.module.split(".")[0] in INLINED:
                submodule = find(root, entry.meaning)
                needed = entry.meaning if submodule else entry.module
                found = submodule or find(root, needed)
                require(found is not None, f"{label} imports {needed}, which is not in {root}")
                visit(needed, found.relative_to(root).as_posix(), found)
        begun.pop()
        modules[name] = module

    inside = path.resolve().is_relative_to(root.resolve())
    visit(f"algos.{path.stem}", path.resolve().relative_to(root.resolve()).as_posix() if inside else path.name, path)
    return modules


# --- what names mean


def resolve(modules: dict[str, Module], meaning: str) -> str:
    """Follows a name through our modules to the one that defines it."""
    head, _, name = meaning.rpartition(".")
    if meaning in modules or head not in modules:
        return meaning
    require(name in modules[head].names, f"{modules[head].label} has no {name}")
    further = modules[head].names[name]
    return meaning if further == meaning else resolve(modules, further)


def loads(node: ast.AST) -> Iterator[ast.expr]:
    """The places of a statement where a name is read: Name nodes; attributes of a bare name too, before the name itself."""
    for part in ast.walk(node):
        named = isinstance(part, ast.Name) and not isinstance(part.ctx, ast.Store)
        if named or (isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name)):
            yield part
        elif isinstance(part, ast.Global):
            yield from (ast.copy_location(ast.Name(name, ast.Load()), part) for name in part.names)
        for annotation in (getattr(part, "annotation", None), getattr(part, "returns", None)):
            for text in ast.walk(annotation) if annotation else ():
                if isinstance(text, ast.Constant) and isinstance(text.value, str) and text.value.isidentifier():
                    yield ast.copy_location(ast.Name(text.value, ast.Load()), text)


def references(modules: dict[str, Module], module: Module, node: ast.AST) -> Iterator[tuple[str, str, ast.expr]]:
    """What a statement reads -> (name in the exported file, meaning, place). Local names are passed over.

    `checkpoint.save`, where checkpoint is one of our modules, is called `save` there, and a name imported `as` another its own.
    """
    passed = set()
    for part in loads(node):
        if isinstance(part, ast.Attribute):
            meaning = resolve(modules, module.names.get(part.value.id, ""))
            if meaning in modules:
                passed.add(id(part.value))
                yield part.attr, resolve(modules, f"{meaning}.{part.attr}"), part
        elif id(part) in passed:
            continue
        elif part.id in module.names:
            meaning = resolve(modules, module.names[part.id])
            where = f"{module.label} line {part.lineno}"
            require(meaning not in modules, f"{where}: the module {part.id} is used as a value: import what is needed of it")
            yield (meaning.rpartition(".")[2] if is_ours(modules, meaning) else part.id), meaning, part
        elif hasattr(builtins, part.id):
            yield part.id, f"builtins.{part.id}", part


def is_ours(modules: dict[str, Module], meaning: str) -> bool:
    """Whether a meaning is a definition in one of our modules."""
    return meaning.rpartition(".")[0] in modules


# --- choosing


def closure(modules: dict[str, Module], begin: Places) -> Places:
    """The statements given and all that they need."""
    kept, todo = set(), list(begin)
    while todo:
        place = todo.pop()
        if place in kept:
            continue
        kept.add(place)
        module = modules[place[0]]
        for _, meaning, _ in references(modules, module, module.statements[place[1]]):
            owner, _, name = meaning.rpartition(".")
            if owner in modules:
                todo += [(owner, i) for i, other in enumerate(modules[owner].statements) if name in binds(other)]
    return kept


def choose(modules: dict[str, Module]) -> Places:
    """All statements of the algorithm, what they need, and those statements without a name that act on what is kept."""
    main = next(reversed(modules))
    kept = closure(modules, {(main, i) for i in range(len(modules[main].statements))})
    acting = [
        ((module.name, i), closure(modules, {(module.name, i)}))
        for module in modules.values()
        for i, node in enumerate(module.statements)
        if not binds(node) and not is_main(node)
    ]
    while more := [reach for place, reach in acting if place not in kept and acts_on(place, reach, kept)]:
        kept = kept.union(*more)
    return kept


def acts_on(place: tuple[str, int], reach: Places, kept: Places) -> bool:
    """Whether a statement leads to something that is kept, or to nothing of ours and its module is in use."""
    return bool(reach & kept) if len(reach) > 1 else any(name == place[0] for name, _ in kept)


def is_main(node: ast.AST) -> bool:
    """Whether a statement is `if __name__ == "__main__":`."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


# --- refusing


def check_names(modules: dict[str, Module], kept: Places) -> set[tuple[str, str]]:
    """Refuses names with two meanings -> the (name, meaning) of everything that is read."""
    users: dict[str, dict[str, str]] = {}  # name -> meaning -> a module that has it
    main = next(reversed(modules))
    for entry in modules[main].imports:
        meaning = resolve(modules, entry.meaning)
        if meaning not in modules and not is_ours(modules, meaning):
            users.setdefault(entry.name, {})[meaning] = modules[main].label
    for owner, place in sorted(kept):
        module = modules[owner]
        node = module.statements[place]
        for name in binds(node):
            users.setdefault(name, {})[f"{owner}.{name}"] = module.label
        for name, meaning, _ in references(modules, module, node):
            users.setdefault(name, {}).setdefault(meaning, module.label)
    for name, meanings in users.items():
        clash = " and ".join(f"{meaning} in {label}" for meaning, label in sorted(meanings.items()))
        require(len(meanings) == 1, f"the name {name} would mean two things, {clash}: rename one")
    return {(name, meaning) for name, meanings in users.items() for meaning in meanings}


def refuse_what_cannot_move(module: Module, node: ast.AST, is_algorithm: bool) -> None:
    """Refuses imports of our modules inside functions, and code that asks where its file is, what its text is, or reads beside it.

    common/ may ask for `__file__`: it only wants to know the commit of the code that runs.
    """
    allowed = {"common": "__file__"}.get(module.name.split(".")[0], "__doc__" if is_algorithm else "")
    for part in ast.walk(node):
        where = f"{module.label} line {getattr(part, 'lineno', 0)}"
        if isinstance(part, IMPORTS):
            for entry in read_imports(module.label, part):
                ours = entry.module.split(".")[0] in OURS
                require(not ours, f"{where}: imports {entry.module} inside a statement: import it at the top of the file")
        if isinstance(part, ast.Name) and part.id in ("__file__", "__doc__", "__path__", "__spec__", "__package__"):
            require(part.id == allowed, f"{where}: depends on {part.id}, which is another in one file")


# --- writing


def local_names(node: ast.AST) -> set[str]:
    """The names bound inside a statement, in any scope but a class's own: methods hide nothing from one another."""
    names = set()
    for part in ast.walk(node):
        for child in ast.iter_child_nodes(part):
            if isinstance(child, DEFINITIONS + IMPORTS):
                names |= set() if isinstance(part, ast.ClassDef) else binds(child)
            elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
                names.add(child.id)
            elif isinstance(child, ast.arg):
                names.add(child.arg)
            elif isinstance(child, ast.ExceptHandler) and child.name:
                names.add(child.name)
    return names


def edit_lines(modules: dict[str, Module], module: Module, kept: Places) -> list[str]:
    """A module's lines with `checkpoint.save` turned to `save`, and names imported `as` another to their own."""
    lines = [line.encode() for line in module.lines]  # positions count bytes
    edits = []
    for i, node in enumerate(module.statements):
        if (module.name, i) not in kept:
            continue
        for name, meaning, part in references(modules, module, node):
            before = ast.unparse(part)
            if before != name and is_ours(modules, meaning):
                hidden = local_names(node) & {name, before.split(".")[0]}
                where = f"{module.label} line {part.lineno}"
                require(not hidden, f"{where}: {before} would be hidden by the local name {', '.join(sorted(hidden))}")
                edits.append((part.lineno - 1, part.col_offset, before.encode(), name.encode(), where))
    for row, column, before, after, where in sorted(edits, reverse=True):
        end = column + len(before)
        require(lines[row][column:end] == before, f"{where}: cannot rewrite {before.decode()} there: import the name itself")
        lines[row] = lines[row][:column] + after + lines[row][end:]
    return [line.decode() for line in lines]


def first_line(lines: list[str], node: ast.stmt) -> int:
    """Where a statement's text begins (from 0): its decorators and the comment directly above included."""
    start = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))]) - 1
    while start and lines[start - 1].startswith("#"):
        start -= 1
    return start


def section(modules: dict[str, Module], module: Module, kept: Places) -> str:
    """A heading, the module's docstring, and its statements that are kept, in their order."""
    lines = edit_lines(modules, module, kept)
    text = f"# --- from {module.label}\n"
    if ast.get_docstring(module.tree):
        text += "\n" + "\n".join(lines[module.tree.body[0].lineno - 1 : module.tree.body[0].end_lineno]) + "\n"
    before = None
    for i, node in enumerate(module.statements):
        if (module.name, i) in kept:
            start = first_line(lines, node)
            apart = before is None or isinstance(node, DEFINITIONS) or isinstance(before, DEFINITIONS)
            gap = 2 if apart else sum(not line for line in lines[max(start - 2, 0) : start])
            text += "\n" * gap + "\n".join(lines[start : node.end_lineno]) + "\n"
            before = node
    return text


def algorithm(modules: dict[str, Module], module: Module, kept: Places) -> tuple[str, str]:
    """The algorithm's docstring, and all that follows its imports."""
    lines = edit_lines(modules, module, kept)
    left_out = [node for node in module.tree.body if isinstance(node, IMPORTS) or node is module.tree.body[0]]
    rows = {row for node in left_out for row in range(node.lineno - 1, node.end_lineno)}
    end = module.tree.body[0].end_lineno
    body = "\n".join(line for row, line in enumerate(lines) if row >= end and row not in rows)
    return "\n".join(lines[:end]), f"# --- from {module.label}\n\n\n{body.strip()}\n"


def import_lines(imports: set[Import]) -> str:
    """Import statements in ruff's order: the standard library first; `import x` before `from x import y`."""

    def order(name):
        return (0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2, name.lower(), name)

    blocks: dict[tuple[bool, bool], list] = {}
    for module, member, alias in sorted({entry[2:] for entry in imports}):
        third_party = module.split(".")[0] not in sys.stdlib_module_names
        blocks.setdefault((third_party, bool(member)), []).append((module, member, alias))
    text = ["", ""]
    for (third_party, is_from), entries in sorted(blocks.items()):
        if not is_from:
            text[third_party] += "".join(f"import {m}{f' as {a}' if a else ''}\n" for m, _, a in entries)
            continue
        for module in dict.fromkeys(entry[0] for entry in entries):
            plain = sorted((name for m, name, alias in entries if m == module and not alias), key=order)
            renamed = sorted((name, alias) for m, name, alias in entries if m == module and alias)
            line = f"from {module} import {', '.join(plain)}\n"
            wrapped = f"from {module} import (\n" + "".join(f"    {name},\n" for name in plain) + ")\n"
            text[third_party] += (wrapped if len(line) > LINE_LENGTH + 1 else line) if plain else ""
            text[third_party] += "".join(f"from {module} import {name} as {alias}\n" for name, alias in renamed)
    return "\n".join(part for part in text if part)


def origin(label: str, root: Path, body: str) -> str:
    """Comment lines: what the file was made from, its licence, and the pip packages that it imports, on use only included."""
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        commit = ", commit " + subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = ""
    nodes = [node for node in ast.walk(ast.parse(body)) if isinstance(node, IMPORTS)]
    heads = {entry.module.split(".")[0] for node in nodes for entry in read_imports(label, node)}
    packages = sorted(PIP_NAMES.get(head, head) for head in heads - sys.stdlib_module_names)
    return (
        f"# Made by common.standalone of nightjax from {label}{commit},\n# with what that uses of common/ and envs/.\n"
        f"# Apache License 2.0.\n# Needs: pip install {' '.join(packages)}\n"
    )


def export(path: Path, root: Path = ROOT) -> str:
    """The text of the one file. `root` holds common/ and envs/. Raises UsageError where that cannot be made."""
    modules = read_all(path, root)
    *parts, main = modules.values()
    is_method = ast.get_docstring(main.tree) and any(is_main(node) for node in main.statements)
    require(is_method, f'{main.label} is not an algorithm: it has no docstring or no `if __name__ == "__main__":`')
    kept = choose(modules)
    for name, i in sorted(kept):
        refuse_what_cannot_move(modules[name], modules[name].statements[i], name == main.name)
    read = check_names(modules, kept)
    outside = [entry for module in modules.values() for entry in module.imports if entry.module.split(".")[0] not in OURS]
    imports = import_lines({entry for entry in outside if (entry.name, entry.meaning) in read})
    docstring, last = algorithm(modules, main, kept)
    used = [module for module in parts if any(name == module.name for name, _ in kept)]
    body = "\n\n".join([*(section(modules, module, kept) for module in used), last])
    return f"{docstring}\n\n{origin(main.label, root, imports + body)}\n{imports}\n{body}"


def main() -> None:
    parser = argparse.ArgumentParser("python -m common.standalone", description=__doc__.split("\n\n")[0])
    parser.add_argument("file", type=Path, help="the algorithm, such as algos/plr.py")
    parser.add_argument("--out", type=Path, help="write here instead of to stdout")
    parser.error = die
    args = parser.parse_args()
    try:
        text = export(args.file)
        if args.out is None:
            sys.stdout.buffer.write(text.encode())
            return
        require(not args.out.exists() or not args.out.samefile(args.file), f"--out {args.out} is the algorithm itself")
        write_atomically(args.out, lambda file: file.write(text.encode()))
    except UsageError as error:
        die(str(error))
    except OSError as error:
        die(f"--out {args.out} cannot be written: {error.strerror}")


if __name__ == "__main__":
    main()
