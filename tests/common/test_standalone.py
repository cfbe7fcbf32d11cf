"""The exporter: what it copies and refuses, on toy packages; and every algorithm's one file, checked away from the repository.

That an exported file is the same programs is shown in tests/algos/test_contract.py; that one runs, in test_command.py beside it.
"""

import contextlib
import io
import os
import subprocess
import sys

import pytest
from sizes import METHODS, ROOT

from common.runs.config import UsageError
from common.standalone import export, main, read_module

ALGORITHM = '''"""A method.

Second paragraph.
"""

import json
{imports}

# a comment of the algorithm's
RATE = 2


def step(x):
    return {step}


# --- the end


if __name__ == "__main__":
    print(json.dumps(step(3)))
'''


def write(root, step="x", imports="", **files):
    """A toy repository: algos/toy.py, and files given as common__maths="...". -> the path of the algorithm."""
    texts = {name.replace("__", "/") + ".py": text for name, text in files.items()}
    texts["algos/toy.py"] = ALGORITHM.format(imports=imports, step=step)
    for name, text in texts.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root / "algos" / "toy.py"


def output(text):
    """What a file prints."""
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        exec(compile(text, "exported", "exec"), {"__name__": "__main__"})
    return stdout.getvalue().strip()


# --- what is copied


def test_copies_what_is_used_and_nothing_else(tmp_path):
    maths = '''"""Sums."""

import math
import os
from functools import cache

from common.units import PLUS, UNUSED

# why it is one
ONE = 1  # beside it
TWO = 2


# --- sums


# directly above
@cache
def add(x):
    """Adds."""
    # inside
    return x + helper() + PLUS


def never(x):
    return os.sep + x + UNUSED


def helper():
    return ONE * math.floor(1.5)
'''
    path = write(
        tmp_path,
        "add(x) + RATE",
        "from common.maths import add",
        common__maths=maths,
        common__units="PLUS, MINUS = 10, 20\nUNUSED = 5\n",
    )
    text = export(path, tmp_path)
    assert output(text) == "16"
    for kept in (
        "# why it is one\nONE = 1  # beside it\n",
        "# directly above\n@cache",
        '"""Adds."""\n    # inside\n',
        '"""Sums."""',
    ):
        assert kept in text
    for gone in ("TWO", "never", "UNUSED", "import os", "# --- sums", "from common."):
        assert gone not in text
    headings = [line for line in text.splitlines() if line.startswith("# ---")]
    assert headings == ["# --- from common/units.py", "# --- from common/maths.py", "# --- from algos/toy.py", "# --- the end"]
    assert text.startswith('"""A method.\n\nSecond paragraph.\n"""\n\n# Made by')
    assert "\n\nimport json\nimport math\nfrom functools import cache\n\n# --- from" in text
    original = path.read_text()
    body = original[original.index("# a comment of the algorithm's") :].replace("\n\n\n\n", "\n\n\n")
    assert text.endswith(body)


def test_statements_without_a_name_follow_what_they_act_on(tmp_path):
    table = """TABLE = {}
OTHER = {}


def put(table, value):
    table["x"] = value


def entry():
    return 7


put(TABLE, entry())
OTHER["x"] = spare = 1
OTHER.update(y=2)
"""
    text = export(write(tmp_path, "TABLE['x']", "from common.table import TABLE", common__table=table), tmp_path)
    assert output(text) == "7"
    assert "OTHER" not in text and "spare" not in text


def test_imports_are_merged_and_sorted(tmp_path):
    a = "import os.path\nfrom collections import OrderedDict as Ordered\nfrom math import tau, floor\n\n\ndef a():\n"
    a += "    return floor(tau) + len(Ordered()) + len(os.path.sep)\n"
    b = "import os\nimport numpy as np\nfrom math import tau, pi\nfrom typing import Any, NamedTuple, TYPE_CHECKING\n\n\n"
    b += "class B(NamedTuple):\n    x: Any = np.floor(tau - pi) if not TYPE_CHECKING else os\n"
    path = write(tmp_path, "a() + B().x", "from common.a import a\nfrom common.b import B", common__a=a, common__b=b)
    text = export(path, tmp_path)
    assert output(text) == "10.0"
    block = text[text.index("import json") : text.index("# --- from")]
    assert block == (
        "import json\nimport os\nimport os.path\nfrom collections import OrderedDict as Ordered\nfrom math import floor, pi, tau\n"
        "from typing import TYPE_CHECKING, Any, NamedTuple\n\nimport numpy as np\n\n"
    )
    assert "pip install numpy\n" in text


def test_names_reached_through_a_module_or_renamed(tmp_path):
    files = "def save(x):\n    return x + 1\n\n\ndef load(x):\n    return x\n"
    user = '''from common import files as f
from common.files import load as read


class User:
    def save(self, x):
        """A method of the same name hides nothing."""
        return "é" and f.save(read(x))
'''
    path = write(tmp_path, "User().save(x)", "from envs.user import User", common__files=files, envs__user=user)
    text = export(path, tmp_path)
    assert output(text) == "4"
    assert 'return "é" and save(load(x))' in text and "f.save" not in text


def test_what_a_package_passes_on_is_followed(tmp_path):
    """A name that a package's __init__ imports is that of the module which defines it."""
    first = "def f(x):\n    return 2 * x\n"
    path = write(tmp_path, "f(x)", "from common.rooms import f", common__rooms__first=first)
    (tmp_path / "common" / "rooms" / "__init__.py").write_text("from common.rooms.first import f\n")
    text = export(path, tmp_path)
    assert output(text) == "6" and "# --- from common/rooms/first.py" in text and "__init__" not in text


def test_a_text_beside_a_module_becomes_a_string(tmp_path):
    module = 'from pathlib import Path\n\nPAGE = Path(__file__).with_name("page.html").read_text(encoding="utf-8")\n\n\n'
    files = dict(common__page=module + "def f(x):\n    return PAGE * x\n")
    path = write(tmp_path, "f(x)", "from common.page import f", **files)
    (tmp_path / "common" / "page.html").write_text("<p>\n\\d</p>\n")
    text = export(path, tmp_path)
    assert output(text) == '"' + r"<p>\n\\d</p>\n" * 3 + '"' and "read_text" not in text and "pathlib" not in text
    (tmp_path / "common" / "page.html").unlink()
    with pytest.raises(UsageError, match="common/page.py line 3: page.html: No such file"):
        export(path, tmp_path)


# --- what is refused


REFUSED = {
    "import common.a: write": dict(imports="import common.a", common__a="def f(x):\n    return x\n"),
    "algos/toy.py line 7: a relative import": dict(imports="from .other import f"),
    "import * hides": dict(imports="from common.a import *", common__a="def f(x):\n    return x\n"),
    "from __future__": dict(imports="from common.a import f", common__a="from __future__ import annotations\n\nf = abs\n"),
    "only common/ and envs/ can": dict(imports="from algos.other import f"),
    "which is not in": dict(imports="from common.missing import f"),
    "common/a.py has no f": dict(imports="from common.a import f", common__a="g = 1\n"),
    "common/a.py line 2: imports common.b inside": dict(
        imports="from common.a import f", common__a="def f(x):\n    from common.b import g\n    return g(x)\n"
    ),
    "common.a and common.b import one another": dict(
        imports="from common.a import f", common__a="from common.b import f\n", common__b="from common.a import f\n"
    ),
    "envs/a.py line 1: depends on __file__": dict(imports="from envs.a import f", envs__a="f = lambda x: open(__file__)\n"),
    "envs/a.py line 1: reads files": dict(
        imports="from envs.a import f", envs__a="from importlib import resources\n\nf = resources\n"
    ),
    "the module a is used as a value": dict(imports="from common import a", step="a", common__a="f = 1\n"),
    "line 4: a.g would be hidden by the local name g": dict(
        imports="from common.b import f",
        common__a="g = abs\n",
        common__b="from common import a\n\ndef f(x, g=1):\n    return a.g(x)\n",
    ),
    "the name step would mean two things, algos.toy.step in algos/toy.py and common.a.step in common/a.py": dict(
        imports="from common.a import f", common__a="def step(x):\n    return x\n\n\nf = step\n"
    ),
    "the name json would mean two things, common.a.json in common/a.py and json in algos/toy.py": dict(
        imports="from common.a import f", common__a="json = 1\nf = lambda x: json\n"
    ),
    "the name pi would mean two things, cmath.pi in common/b.py and math.pi in common/a.py": dict(
        imports="from common.a import f\nfrom common.b import g",
        step="f(x) + g(x)",
        common__a="from math import pi\n\nf = lambda x: pi\n",
        common__b="from cmath import pi\n\ng = lambda x: pi\n",
    ),
    "the name sum would mean two things, builtins.sum in algos/toy.py and common.a.sum in common/a.py": dict(
        imports="from common.a import f", step="sum([f(x)])", common__a="def sum(x):\n    return x\n\n\nf = lambda x: sum(x)\n"
    ),
    "common/a.py line 1: ": dict(imports="from common.a import f", common__a="def f(:\n"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refuses_what_would_not_run_or_mean_the_same(message, tmp_path):
    path = write(tmp_path, **({"step": "f(x)"} | REFUSED[message]))
    with pytest.raises(UsageError) as refusal:
        export(path, tmp_path)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_clash_with_what_is_not_copied_is_none(tmp_path):
    a = "def step(x):\n    return x\n\n\ndef f(x):\n    return x * 5\n"
    assert output(export(write(tmp_path, "f(x)", "from common.a import f", common__a=a), tmp_path)) == "15"


def test_no_name_of_common_means_something_else():
    """Found where it is written, not where an algorithm first uses both. Two worlds may use one name: no algorithm uses both."""
    meanings = {}
    for path in [*(ROOT / "common").rglob("*.py"), *(ROOT / "envs").glob("*.py")]:
        if path.stem != "standalone":
            label = str(path.relative_to(ROOT))
            module = label.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            for name, meaning in read_module(module, label, path).names.items():
                meanings.setdefault(name, {})[meaning] = label
    assert len(meanings) > 100
    twice = {name: found for name, found in meanings.items() if len(found) > 1}
    assert {name: found for name, found in twice.items() if any(label.startswith("common") for label in found.values())} == {}


def test_the_command(tmp_path):
    source = ROOT / "algos" / "dr.py"
    command = [sys.executable, "-m", "common.standalone", str(source)]
    for out in ([], ["--out", "new/my_dr.py"]):
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run([*command, *out], cwd=tmp_path, capture_output=True, text=True, env=env)
        assert (done.returncode, done.stdout, done.stderr) == (0, "" if out else export(source), "")
    assert (tmp_path / "new" / "my_dr.py").read_text() == export(source)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["my_dr.py"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("", "required: file"),
        ("none.py", "none.py: No such file"),
        ("folder", "folder: Is a directory"),
        ("bytes.py", "bytes.py is not Python text"),
        (f"{ROOT}/common/ppo.py", "common/ppo.py is not an algorithm"),
        (f"{ROOT}/algos/dr.py --out folder", "--out folder cannot be written"),
        ("toy.py --out toy.py", "--out toy.py is the algorithm itself"),
    ],
)
def test_bad_requests_end_with_one_line(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["standalone.py", *args.split()])
    (tmp_path / "folder").mkdir()
    (tmp_path / "bytes.py").write_bytes(b"\xff\x00")
    (tmp_path / "toy.py").write_text(toy := ALGORITHM.format(imports="", step="x"))
    with pytest.raises(SystemExit) as stop:
        main()
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.out == ""
    assert message in printed.err and printed.err.count("\n") == 1
    assert (tmp_path / "toy.py").read_text() == toy and not list((tmp_path / "folder").iterdir())
    assert len(list(tmp_path.iterdir())) == 3, "something was left behind"


# --- the algorithms


def test_exported_algorithms_are_clean(tmp_path):
    """ruff finds nothing unused, undefined or out of place in any of them."""
    for name in METHODS:
        (tmp_path / f"my_{name}.py").write_text(export(ROOT / "algos" / f"{name}.py"))
    ruff = [sys.executable, "-m", "ruff", "check", "--no-cache", "--config", str(ROOT / "pyproject.toml"), "."]
    done = subprocess.run(ruff, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
