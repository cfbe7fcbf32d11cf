"""A grid of settings of one method, every combination with every seed.

Run:  python -m common.sweep algos/plr.py --grid lr=1e-4,3e-4 replay_prob=0.5,0.8 --num-seeds 8   (and any flag of the method)

Settings that the compiled program can take as numbers (they change no shape and decide nothing in Python) are trained side by side
in one program, beside the seeds; every combination of the others is a program of its own, one after another. A setting that decides
a branch which all seeds take together, such as replay_prob, then differs between lanes: both branches are computed.

The folder holds sweep.json, programs/0, 1, ... (each as a run's), results.csv (a line per combination and seed, final values),
results.json (mean and standard error over seeds) and results.png. --resume goes on with an interrupted sweep. A lane whose
parameters are no longer finite does not stop it: its results are not finite either.
"""

import argparse
import copy
import csv
import importlib.util
import itertools
import json
import math
import sys
from dataclasses import fields, replace
from functools import reduce
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from common.checkpoint import write_atomically
from common.config import RunConfig, UsageError, as_dict, cli, require
from common.devices import make_mesh
from common.files import NOT_COMPARED, RunFiles, csv_cell, new_or_newest
from common.hosts import from_main, is_main
from common.plot import save_comparison
from common.run import Programs, begin, faults_in_one_line, train_and_record


def main(args: list[str] | None = None) -> None:
    """The command line. Ends with one line and code 2 for what cannot be met, code 1 for a run that fails."""
    with faults_in_one_line():
        path, grid, shown, flags = parse(sys.argv[1:] if args is None else args)
        method = load_method(path)
        combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
        configs = [config_of(method, flags, combination) for combination in combinations]
        stop = begin(configs[0])
        folder = open_folder(path.stem, grid, configs[0])
        for number, group in enumerate(group_configs(method.make_train, list(grid), configs)):
            if not train_group(method.make_train, path.stem, list(grid), group, folder / "programs" / str(number), stop):
                return
        if is_main():
            report(folder, path.stem, list(grid), shown)


# --- the request


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(message)


def parse(args: list[str]) -> tuple[Path, dict[str, list[str]], list[str], list[str]]:
    """-> the method's file, setting -> values as text, the metrics to show, the method's own flags."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("method", type=Path, help="a file with a Config and a make_train")
    parser.add_argument("--grid", nargs="+", required=True, metavar="NAME=VALUE,VALUE", help="settings and their values")
    parser.add_argument(
        "--metric", nargs="+", default=[], help="metrics to show at the end; default: the first of the evaluation's"
    )
    known, flags = parser.parse_known_args(args)
    grid = {}
    for item in known.grid:
        name, equals, values = item.partition("=")
        require(equals and all(values.split(",")), f"--grid {item}: must look like lr=1e-4,3e-4")
        require(name not in grid, f"--grid {item}: {name} is there twice")
        grid[name.replace("-", "_")] = values.split(",")
    return known.method, grid, known.metric, flags


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


def open_folder(method: str, grid: dict, config) -> Path:
    """The sweep's folder, taken for this request. Raises UsageError if it holds another sweep, or one and not --resume."""
    own = {k: v for k, v in as_dict(config).items() if k not in NOT_COMPARED and k not in grid}
    request = json.dumps({"method": method, "grid": grid, "config": own}, indent=1)

    def choose() -> bytes:
        folder = Path(config.out) if config.out else new_or_newest(Path("runs") / f"sweep-{method}", config.resume)
        path = folder / "sweep.json"
        require(config.resume or not path.exists(), f"{folder} holds a sweep already: give --resume to go on, or another --out")
        require(path.exists() or not config.resume, f"--resume: {folder} holds no sweep")
        same = not path.exists() or path.read_text() == request
        require(same, f"--resume: {folder} holds another sweep: give the same grid and settings, or another --out")
        try:
            write_atomically(path, lambda file: file.write(request.encode()))
        except OSError as error:
            raise UsageError(f"--out {folder} cannot be written: {error.strerror}") from error
        return str(folder).encode()

    return Path(from_main(choose).decode())


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
    unknown = [name for name in shown if name not in metrics]
    require(not unknown, f"--metric {' '.join(unknown)}: there is {', '.join(metrics)}")
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
    console.print(f"{len(results)} combinations in {len(summaries)} programs; results.csv, .json and .png are in {folder}")


def sorted_programs(folder: Path) -> list[Path]:
    """The folders of a sweep's programs, in their order."""
    return sorted((folder / "programs").iterdir(), key=lambda path: int(path.name))


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
