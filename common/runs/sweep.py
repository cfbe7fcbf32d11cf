"""A grid of settings of one method, every combination with every seed.

Run:  python -m common.runs.sweep algos/plr.py --grid lr=1e-4,3e-4 replay_prob=0.5,0.8 --num-seeds 8   (and any flag of the method)

Settings that the compiled program can take as numbers (they change no shape and decide nothing in Python) are trained side by side
in one program, beside the seeds; every combination of the others is a program of its own, one after another. A setting that decides
a branch which all seeds take together, such as replay_prob, then differs between lanes: both branches are computed.

The folder holds sweep.json, programs/0, 1, ... (each as a run's), results.csv (a line per combination and seed, final values),
results.json (mean and standard error over seeds) and results.png. --resume goes on with an interrupted sweep. A lane whose
parameters are no longer finite does not stop it: its results are not finite either.
"""

import argparse
import contextlib
import copy
import csv
import importlib.util
import itertools
import json
import math
import os
import sys
from dataclasses import fields, replace
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common.runs.checkpoint import write_atomically
from common.runs.command import cli, print_anything
from common.runs.config import NOT_COMPARED, RunConfig, UsageError, as_dict, numbered, require
from common.runs.devices import make_mesh
from common.runs.files import RunFiles
from common.runs.folder import Lock, new_folder, newest_folder, require_writable
from common.runs.hosts import from_main, is_main
from common.runs.loop import begin, faults_in_one_line, train_and_record
from common.runs.plot import save_comparison
from common.runs.programs import Programs
from common.runs.rows import csv_cell
from common.runs.size import say_how_large


def main(args: list[str] | None = None) -> None:
    """The command line. Ends with one line and code 2 for what cannot be met, code 1 for a run that fails."""
    print_anything()
    with faults_in_one_line():
        request = parse(sys.argv[1:] if args is None else args)
        method, names = load_method(request.file), list(request.grid)
        combinations = [dict(zip(names, values, strict=True)) for values in itertools.product(*request.grid.values())]
        configs = [config_of(method, request.flags, combination) for combination in combinations]
        configs = [replace(config, out=request.out, resume=request.resume) for config in configs]
        require_distinct(names, configs)
        with begin(configs[0]) as stop:
            groups = group_configs(method.make_train, names, configs)
            require_metrics(method.make_train, configs[0], request.metric)
            if configs[0].dry_run:
                return say_sizes(method.make_train, groups)
            folder, lock = open_folder(request, configs[0])
            try:
                for number, group in enumerate(groups):
                    place = folder / "programs" / str(number)
                    if not train_group(method.make_train, request.file.stem, names, group, place, stop):
                        return
                if is_main():
                    report(folder, request.file.stem, names, request.metric)
            finally:
                if lock:
                    lock.release()


# --- the request


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(message)


class Request(NamedTuple):
    """What was asked for."""

    file: Path  # the method's
    grid: dict[str, list[str]]  # setting -> values as text
    metric: list[str]  # to show at the end
    flags: list[str]  # the method's own
    out: str | None
    resume: bool


def parse(args: list[str]) -> Request:
    """The request; with --resume and --out, what is not given is as it was when the sweep began."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("method", nargs="?", type=Path, help="a file with a Config and a make_train")
    parser.add_argument("--grid", nargs="+", metavar="NAME=VALUE,VALUE", help="settings and their values")
    parser.add_argument(
        "--metric", nargs="+", default=[], help="metrics to show at the end; default: the first of the evaluation's"
    )
    parser.add_argument("--out", help="the sweep's folder; default: runs/sweep-METHOD/1, 2, ...")
    parser.add_argument("--resume", action="store_true", help="go on with the sweep in --out")
    known, flags = parser.parse_known_args(args)
    require(known.out != "", "--out: must not be empty")
    out = known.out and os.path.expanduser(known.out)
    if known.resume and out and not (known.method or known.grid or flags):
        begun = read_request(Path(out))
        known.method, known.grid, flags = Path(begun["file"]), begun["given"], begun["flags"]
    require(known.method is not None and known.grid, "a method's file and --grid are needed, or --resume and --out of a sweep")
    return Request(known.method, read_grid(known.grid), known.metric, flags, out, known.resume)


def read_grid(items: list[str]) -> dict[str, list[str]]:
    """lr=1e-4,3e-4 -> setting -> values as text."""
    grid = {}
    for item in items:
        name, equals, values = item.partition("=")
        name = name.replace("-", "_")
        require(equals and all(values.split(",")), f"--grid {item}: must look like lr=1e-4,3e-4")
        require(name not in grid, f"--grid {item}: {name} is there twice")
        grid[name] = values.split(",")
    return grid


def read_request(folder: Path) -> dict:
    """What sweep.json says. Raises UsageError where there is none, or it says nothing that a sweep does."""
    path = folder / "sweep.json"
    require(path.is_file(), f"--resume: {folder} holds no sweep")
    try:
        request = json.loads(path.read_text())
        texts = [request["file"], *request["given"], *request["flags"]]
        require(all(isinstance(text, str) for text in texts), f"--resume: {path} is no sweep's")
        return request
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--resume: {path} is no sweep's") from error


def require_distinct(names: list[str], configs: list) -> None:
    """Raises UsageError where two combinations are the same: they would count as more seeds."""
    seen = {}
    for config in configs:
        values = tuple(getattr(config, name) for name in names)
        require(values not in seen, f"--grid: {', '.join(f'{n}={v}' for n, v in zip(names, values, strict=True))} is there twice")
        seen[values] = config


def require_metrics(make_train, config, shown: list[str]) -> None:
    """Raises UsageError for metrics to show that a run will not have."""
    if not shown:
        return
    train = make_train(config)
    state = jax.eval_shape(lambda: train.init(jax.random.key(0)))
    metrics = jax.eval_shape(train.update, state, jnp.int32(0))[1] | jax.eval_shape(train.evaluate, state)
    names = [name for name, value in metrics.items() if value.ndim == 0]
    unknown = [name for name in shown if name not in names]
    require(not unknown, f"--metric {' '.join(unknown)}: there is {', '.join(names)}")


def load_method(path: Path):
    """The module of a method's file."""
    require(path.is_file(), f"{path}: there is no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    require(spec is not None, f"{path}: is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    require(hasattr(module, "Config") and hasattr(module, "make_train"), f"{path}: has no Config and make_train")
    return module


def config_of(method, flags: list[str], combination: dict[str, str]):
    """The checked Config of one combination, its values given as the method's own flags."""
    types = {field.name: field.type for field in fields(method.Config)}
    shared = {field.name for field in fields(RunConfig)} - {"num_updates"}
    extra = []
    for name, value in combination.items():
        require(name in types, f"--grid {name}: {method.__name__} has no such setting")
        require(name not in shared, f"--grid {name}: is the same for the whole sweep")
        flag = name.replace("_", "-")
        is_switch = types[name] in (bool, "bool")
        require(not is_switch or value in ("True", "False"), f"--grid {name}: must be True or False")
        extra.append((f"--{flag}" if value == "True" else f"--no-{flag}") if is_switch else f"--{flag}={value}")
    presets = {name.lower(): getattr(method, name) for name in ("CPU", "PAPER") if hasattr(method, name)}
    return cli(method.Config, method.__doc__, presets or None, [*flags, *extra])


def open_folder(request: Request, config) -> tuple[Path, Lock | None]:
    """The sweep's folder, taken for this request, and the hold on it. Raises UsageError, and leaves nothing behind, if it holds
    another sweep, or one and not --resume."""
    own = {k: v for k, v in as_dict(config).items() if k not in NOT_COMPARED and k not in request.grid}
    text = {"method": request.file.stem, "grid": request.grid, "config": own}
    given = [f"{name}={','.join(values)}" for name, values in request.grid.items()]
    text |= {"file": str(request.file), "given": given, "flags": request.flags}
    locks = []

    def choose() -> bytes:
        runs = Path("runs") / f"sweep-{request.file.stem}"
        new = not config.out and not config.resume
        folder = Path(config.out) if config.out else newest_folder(runs) if config.resume else new_folder(runs)
        path = folder / "sweep.json"
        try:
            require(config.resume or not path.exists(), f"{folder} holds a sweep already: give --resume to go on, or another --out")
            if config.resume:
                begun = read_request(folder)
                same = all(begun.get(name) == text[name] for name in ("method", "grid", "config"))
                require(same, f"--resume: {folder} holds another sweep: give the same grid and settings, or another --out")
            require_writable(folder)
            locks.append(Lock(folder))
            if not config.resume:
                write_atomically(path, lambda file: file.write(json.dumps(text, indent=1).encode()))
        except (OSError, UsageError) as error:
            for lock in locks:
                lock.release()
            if new:
                with contextlib.suppress(OSError):  # only if it is empty
                    folder.rmdir()
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"--out {folder} cannot be written: {error.strerror}") from error
        return str(folder).encode()

    return Path(from_main(choose).decode()), next(iter(locks), None)


# --- which settings one program can hold


def vary(config, variants: list[dict], choice):
    """`config` with the settings of variants[choice], `choice` an int32 () that is not known before the program runs.

    The checks of the Config are passed over: every variant's Config was checked. Numbers stay of Python's kind (weakly typed), so
    that nothing changes its type.
    """
    config = copy.copy(config)
    for name in variants[0]:
        values = [variant[name] for variant in variants]
        places = range(1, len(values)) if len(set(values)) > 1 else ()
        value = reduce(lambda value, i: jnp.where(choice == i, values[i], value), places, values[0])
        object.__setattr__(config, name, value)
    return config


def can_vary(make_train, config, variants: list[dict]) -> bool:
    """Whether the method's program can be traced with these settings left open, and has the shapes that it has with them known."""

    def everything(train):
        state, metrics = train.update(train.init(jax.random.key(0)), jnp.int32(0))
        return state, metrics, train.evaluate(state)

    if any(type(value) not in (int, float) for variant in variants for value in variant.values()):
        return False
    known = jax.eval_shape(lambda: everything(make_train(config)))
    try:
        left_open = jax.eval_shape(lambda choice: everything(make_train(vary(config, variants, choice))), jnp.int32(0))
    except (TypeError, ValueError, IndexError):  # what JAX, a check or Python say to a number that is not known yet
        return False
    return jax.tree.map(lambda x: (x.shape, x.dtype), left_open) == jax.tree.map(lambda x: (x.shape, x.dtype), known)


def group_configs(make_train, names: list[str], configs: list) -> list[list]:
    """Configs that one program can train, together; in the order of the grid."""
    apart = []
    for name in names:
        variants = [{name: value} for value in dict.fromkeys(getattr(config, name) for config in configs)]
        if name == "num_updates" or not can_vary(make_train, configs[0], variants):
            apart.append(name)
    groups = {}
    for config in configs:
        groups.setdefault(tuple(getattr(config, name) for name in apart), []).append(config)
    return list(groups.values())


# --- training


def say_sizes(make_train, groups: list[list]) -> None:
    """Prints how large each program would be (--dry-run)."""
    for number, configs in enumerate(groups):
        lanes = len(configs) * configs[0].num_seeds
        mesh = make_mesh(lanes, configs[0].split_size)
        with jax.set_mesh(mesh):
            words = say_how_large(configs[0], make_train(configs[0]), mesh, lanes)
        if is_main():
            print(f"program {number}, {len(configs)} combinations: {words}")


def train_group(make_train, method: str, names: list[str], configs: list, folder: Path, stop) -> bool:
    """Trains the combinations of one program, or goes on, or finds them trained -> whether they are."""
    if from_main(lambda: b"done" if (folder / "summary.json").exists() else b""):
        return True
    begun = from_main(lambda: b"begun" if (folder / "config.json").exists() else b"")
    config = replace(configs[0], out=str(folder), resume=bool(begun), allow_nan=True)  # one lane that diverges ends no other
    variants = [{name: getattr(config, name) for name in names} for config in configs]
    lanes = [variant | {"seed": config.seed + i} for variant in variants for i in range(config.num_seeds)]
    mesh = make_mesh(len(lanes), config.split_size)
    with jax.set_mesh(mesh):
        files = RunFiles(config, method, lanes, whole=folder.parents[1])
        train = (lambda choice: make_train(vary(config, variants, choice))) if len(variants) > 1 else make_train(config)
        return train_and_record(Programs(config, train, mesh, len(variants)), files, stop)


# --- results


def report(folder: Path, method: str, names: list[str], shown: list[str]) -> None:
    """Writes results.csv, results.json and results.png, and prints the table."""
    from rich.console import Console
    from rich.table import Table

    summaries = [json.loads((path / "summary.json").read_text()) for path in sorted_programs(folder)]
    lines = [
        lane | {metric: values[i] for metric, values in summary["final"].items()}
        for summary in summaries
        for i, lane in enumerate(summary["lanes"])
    ]
    columns = list(dict.fromkeys(name for line in lines for name in line))
    metrics = [name for name in columns if name not in (*names, "seed")]
    shown = shown or (list(summaries[0]["start"]) or metrics)[:3]
    table = ",".join(columns) + "\n"
    table += "".join(",".join(csv_cell(line.get(name)) for name in columns) + "\n" for line in lines)
    write_atomically(folder / "results.csv", lambda file: file.write(table.encode()))

    results = [combination | {"metrics": spread_of(lines, combination, metrics)} for combination in combinations_of(lines, names)]
    times = {name: sum(summary[name] for summary in summaries) for name in ("compile_s", "train_s")}
    text = json.dumps({"method": method, "programs": len(summaries), **times, "combinations": results}, indent=1)
    write_atomically(folder / "results.json", lambda file: file.write(text.encode()))
    save_comparison(folder / "results.png", read_curves(folder, names, shown), "update")

    table = Table(*names, *shown, title=f"{method}: mean ± standard error over {summaries[0]['config']['num_seeds']} seeds")
    for result in results:
        cells = [f"{result['metrics'][name]['mean']:.3f} ± {result['metrics'][name]['stderr']:.3f}" for name in shown]
        table.add_row(*(str(result[name]) for name in names), *cells)
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(
        f"{len(results)} combinations in {len(summaries)} programs; results.csv, .json and .png are in {folder}", markup=False
    )


def sorted_programs(folder: Path) -> list[Path]:
    """The folders of a sweep's programs, in their order."""
    return [path for _, path in sorted(numbered(folder / "programs"))]


def combinations_of(lines: list[dict], names: list[str]) -> list[dict]:
    """The combinations that occur, each once."""
    return [dict(zip(names, key, strict=True)) for key in dict.fromkeys(tuple(line[name] for name in names) for line in lines)]


def spread_of(lines: list[dict], combination: dict, metrics: list[str]) -> dict:
    """metric -> mean and standard error over the seeds of a combination."""
    own = [line for line in lines if all(line[name] == value for name, value in combination.items())]
    values = {name: np.array([line[name] for line in own], float) for name in metrics if name in own[0]}
    error = lambda x: float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else 0.0
    return {name: {"mean": float(x.mean()), "stderr": error(x)} for name, x in values.items()}


def read_curves(folder: Path, names: list[str], metrics: list[str]) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """metric -> combination, as words -> updates (P,), values (num_seeds, P), from every program's metrics.csv."""
    points = {metric: {} for metric in metrics}
    for path in sorted_programs(folder):
        for row in csv.DictReader((path / "metrics.csv").open()):
            words = " ".join(f"{name}={row[name]}" for name in names)
            for metric in metrics:
                if row.get(metric):
                    points[metric].setdefault(words, {}).setdefault(int(row["update"]), []).append(float(row[metric]))
    return {
        metric: {words: (np.array(list(curve)), np.array(list(curve.values())).T) for words, curve in curves.items()}
        for metric, curves in points.items()
    }


if __name__ == "__main__":
    main()
