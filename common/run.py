"""Runs a method: every seed in one program over every device, in chunks of updates, with logs, checkpoints and figures.

A method gives `make_train(config) -> Train`. What its functions return decides what is written:

update    a flat dict of scalars. Per row of metrics.csv: the mean over the row's updates of what is float (NaN where a thing
          did not happen, which the mean passes over), the last value of what is integer (counters).
evaluate  a flat dict. Scalars go to metrics.csv; uint8 (H, W, 3) is a picture, kept through time as figures/NAME.png; uint8
          (T, H, W, 3) is a film, videos/NAME.gif, the seeds side by side; any other array goes to arrays/NAME.npy, and if it has
          one axis the newest is also drawn as a curve, in figures/evaluation.png.
"""

import json
import os
import platform
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from common import checkpoint, plot
from common.config import RunConfig, UsageError, as_dict, die, method_name
from common.devices import make_mesh, setup_devices

KEPT_CHECKPOINTS = 2
NOT_COMPARED = ("out", "resume", "cache")  # settings that may differ when a run is resumed


class Train(NamedTuple):
    """A method, as pure functions of one seed."""

    init: Callable[[jax.Array], Any]  # key -> State: everything that must survive a restart, the key included
    update: Callable[[Any, jax.Array], tuple[Any, dict]]  # (State, t) -> (State, metrics); t is shared by all seeds
    evaluate: Callable[[Any], dict]  # State -> metrics, pictures, films
    num_updates: int


def train_fn(train: Train) -> Callable[[jax.Array], tuple[Any, dict]]:
    """The whole training as one function key -> (State, metrics (num_updates,)): `jit(vmap(train_fn(...)))(keys)`."""
    return lambda key: jax.lax.scan(train.update, train.init(key), jnp.arange(train.num_updates))


def nothing_like(function, *args):
    """What `function(*args)` would return, with NaN for floats and 0 for all else: for the branch in which it does not happen."""
    like = jax.eval_shape(function, *args)
    return jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else 0, x.dtype), like)


def run(config: RunConfig, make_train: Callable[[Any], Train], highlights: tuple[str, ...] = ()) -> None:
    """Trains, evaluates, logs and saves, then prints a table. `highlights` name the metrics shown beside the progress bar.

    Ends the program with one line and code 2 if the request cannot be met, before anything is compiled or overwritten.
    """
    try:
        setup_devices(config.cache)
        mesh = make_mesh(config.num_seeds, config.split_size)
        files = RunFiles(config)
        with jax.set_mesh(mesh):
            programs = Programs(config, make_train(config), mesh)
            state, start = files.open(programs)
            _train(config, programs, files, state, start, highlights)
    except UsageError as error:
        die(str(error))


def _train(config, programs, files, state, start, highlights) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    stop = StopSignal()
    programs.compile()
    console.print(
        f"[bold]{files.method}[/bold]: {config.num_seeds} seeds on {jax.device_count()} devices, "
        f"compiled in {programs.compile_s:.0f} s, writing to {files.folder}"
    )
    if start == 0:
        files.add_evaluation(0, {}, programs.evaluate(state))
    with progress_bar(console, config.num_updates, start) as bar:
        for t in range(start, config.num_updates, config.log_every):
            began = time.perf_counter()
            state, metrics = programs.chunk(state, t)
            files.train_s += time.perf_counter() - began
            end = t + config.log_every
            if end % config.eval_every == 0 or end == config.num_updates:
                files.add_evaluation(end, metrics, programs.evaluate(state))
            else:
                files.add_row(end, metrics)
            if end % config.save_every == 0 or end == config.num_updates or stop.asked:
                files.save(end, state)
            bar(end, files.latest(highlights))
            if stop.asked:
                console.print(f"stopped after {end} updates; to go on: --resume --out {files.folder}")
                return
    files.finish(programs.compile_s)
    console.print(files.table())
    console.print(f"figures, videos, metrics.csv and summary.json are in {files.folder}")


class Programs:
    """The compiled programs of a run: all seeds together, laid out over the mesh."""

    def __init__(self, config: RunConfig, train: Train, mesh: jax.sharding.Mesh):
        self.config, self.compile_s = config, 0.0
        self.layout = NamedSharding(mesh, PartitionSpec("seed"))
        over_seeds = dict(spmd_axis_name="seed")

        def init(seeds):
            return jax.vmap(lambda seed: train.init(jax.random.key(seed)), **over_seeds)(seeds)

        def chunk(state, updates):
            scan = jax.vmap(lambda state, updates: jax.lax.scan(train.update, state, updates), (0, None), **over_seeds)
            return scan(state, updates)

        self._seeds = np.arange(config.seed, config.seed + config.num_seeds)
        self._init = jax.jit(init, out_shardings=self.layout)
        self._chunk = jax.jit(chunk, in_shardings=(self.layout, None), out_shardings=self.layout, donate_argnums=0)
        self._evaluate = jax.jit(jax.vmap(train.evaluate, **over_seeds), in_shardings=(self.layout,))
        self.state_shape = jax.eval_shape(init, self._seeds)  # also finds mistakes before the first compile

    def compile(self) -> None:
        """Compiles the training and evaluation programs, and counts the seconds."""
        began = time.perf_counter()
        updates = jax.ShapeDtypeStruct((self.config.log_every,), jnp.int32)
        self._chunk = self._chunk.lower(self.state_shape, updates).compile()
        self._evaluate = self._evaluate.lower(self.state_shape).compile()
        self.compile_s += time.perf_counter() - began

    def init(self):
        """The first state of every seed."""
        began = time.perf_counter()
        state = jax.block_until_ready(self._init(self._seeds))
        self.compile_s += time.perf_counter() - began  # nearly all of it is compiling
        return state

    def place(self, state):
        """Spreads a state that was read from a file over the devices."""
        return jax.tree.map(lambda x: jax.device_put(x, self.layout), state)

    def chunk(self, state, t: int):
        """`log_every` updates from update t -> state, metrics as numpy (num_seeds, log_every). The state given is used up."""
        state, metrics = self._chunk(state, jnp.arange(t, t + self.config.log_every, dtype=jnp.int32))
        return state, jax.device_get(metrics)

    def evaluate(self, state) -> dict:
        """The method's evaluation as numpy, a leading axis of seeds."""
        return jax.device_get(self._evaluate(state))


class StopSignal:
    """Notes SIGTERM and SIGINT, so that a run stops after its current chunk. A second one stops at once."""

    def __init__(self):
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number, frame):
        self.asked = True
        signal.signal(number, signal.SIG_DFL)


class RunFiles:
    """The folder of a run and all that is written to it."""

    def __init__(self, config: RunConfig):
        self.config, self.method = config, method_name()
        self.folder = Path(config.out) if config.out else self._default_folder()
        self.rows: list[dict] = []
        self.curves: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self.train_s = 0.0
        self.began = time.perf_counter()

    def _default_folder(self) -> Path:
        runs = Path("runs") / self.method
        numbers = [int(path.name) for path in runs.glob("*") if path.name.isdigit()]
        newest = max(numbers, default=0)
        if self.config.resume and not newest:
            raise UsageError(f"--resume: there is no run in {runs}")
        return runs / str(newest if self.config.resume else newest + 1)

    def open(self, programs: Programs):
        """-> the state to begin from and its update index. Raises UsageError rather than touch a folder it should not."""
        held = (self.folder / "config.json").exists()
        if held and not self.config.resume:
            raise UsageError(f"{self.folder} holds a run already: give --resume to go on with it, or another --out")
        found = checkpoint.newest_good(self.folder / "checkpoints") if self.config.resume else None
        if self.config.resume and not held:
            raise UsageError(f"--resume: {self.folder} holds no run")
        if found:
            return self._resume(programs, *found)
        if held:
            print(f"{self.folder} holds no good checkpoint yet: beginning anew")
        text = json.dumps(as_dict(self.config), indent=1)
        try:
            checkpoint.write_atomically(self.folder / "config.json", lambda file: file.write(text.encode()))
        except OSError as error:
            raise UsageError(f"--out {self.folder} cannot be written: {error.strerror}") from error
        return programs.init(), 0

    def _resume(self, programs: Programs, path: Path, meta: dict):
        ours = {k: v for k, v in as_dict(self.config).items() if k not in NOT_COMPARED}
        theirs = {k: v for k, v in meta["config"].items() if k not in NOT_COMPARED}
        changed = [k for k in sorted(ours | theirs) if ours.get(k) != theirs.get(k)]
        if changed or meta["method"] != self.method:
            what = ", ".join(f"{k}={theirs.get(k)} (now {ours.get(k)})" for k in changed) or meta["method"]
            raise UsageError(f"--resume: {path} was made with {what}: give the same settings, or another --out")
        self.rows, self.train_s = meta["rows"], meta["train_s"]
        return programs.place(checkpoint.load(path, programs.state_shape)), meta["update"]

    def add_row(self, update: int, metrics: dict, evaluation: dict | None = None) -> None:
        """Adds a line per seed to metrics.csv."""
        columns = {name: _reduce(values) for name, values in metrics.items()} | (evaluation or {})
        for k in range(self.config.num_seeds):
            row = {"update": update, "seed": self.config.seed + k}
            self.rows.append(row | {name: np.asarray(values)[k].item() for name, values in columns.items()})
        self._write_csv()

    def add_evaluation(self, update: int, metrics: dict, results: dict) -> None:
        """Adds a row with an evaluation, and keeps its pictures, films and arrays."""
        self.add_row(update, metrics, {k: v for k, v in results.items() if v.ndim == 1})
        for name, value in results.items():
            if value.dtype == np.uint8 and value.ndim == 4:
                plot.save_image(self.folder / "figures" / name / f"{update:08d}.png", value[0])
            elif value.dtype == np.uint8 and value.ndim == 5:
                plot.save_gif(self.folder / "videos" / f"{name}.gif", np.concatenate(value, axis=2))
            elif value.ndim > 1:
                if value.ndim == 2:
                    self.curves[name] = (np.arange(value.shape[1]), value)
                path = self.folder / "arrays" / f"{name}.npy"
                checkpoint.write_atomically(path, lambda file, value=value: np.save(file, value))

    def _columns(self) -> list[str]:
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def _write_csv(self) -> None:
        columns = self._columns()
        lines = [",".join(columns)] + [",".join(_text(row.get(name)) for name in columns) for row in self.rows]
        text = "\n".join(lines) + "\n"
        checkpoint.write_atomically(self.folder / "metrics.csv", lambda file: file.write(text.encode()))

    def save(self, update: int, state) -> None:
        """Writes a checkpoint and removes all but the newest few."""
        folder = self.folder / "checkpoints"
        meta = dict(method=self.method, config=as_dict(self.config), update=update, rows=self.rows, train_s=self.train_s)
        checkpoint.save(folder / f"{update:08d}.npz", jax.device_get(state), meta)
        checkpoint.keep_last(folder, KEPT_CHECKPOINTS)

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A column of metrics.csv where it has values: updates (P,), values (num_seeds, P)."""
        points = {}
        for row in self.rows:
            if row.get(name) is not None:
                points.setdefault(row["update"], []).append(row[name])
        return np.array(list(points)), np.array(list(points.values()), float).T

    def latest(self, names: tuple[str, ...]) -> dict[str, float]:
        """The newest mean over seeds of each of the metrics named."""
        return {name: float(self.series(name)[1][:, -1].mean()) for name in names if len(self.series(name)[0])}

    def finish(self, compile_s: float) -> None:
        """Writes the figures and summary.json."""
        names = [name for name in self._columns() if name not in ("update", "seed", "env_steps")]
        curves = {name: self.series(name) for name in names}
        plot.save_curves(self.folder / "figures" / "curves.png", {k: v for k, v in curves.items() if len(v[0]) > 1}, "update")
        if self.curves:
            plot.save_curves(self.folder / "figures" / "evaluation.png", self.curves, "step")
        for folder in (self.folder / "figures").glob("*/"):
            title = f"{self.method}, seed {self.config.seed}: {folder.name} through training"
            plot.save_strips(folder.with_suffix(".png"), plot.read_strips(folder), title)
        env_steps = self.latest(("env_steps",)).get("env_steps", 0) * self.config.num_seeds
        summary = {
            "method": self.method,
            "config": as_dict(self.config),
            "commit": _commit(),
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("jax", "jaxlib", "optax")},
            },
            "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} cores",
            "compile_s": compile_s,
            "wall_s": time.perf_counter() - self.began,
            "train_s": self.train_s,
            "steps_per_s": env_steps / self.train_s if self.train_s else None,
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "start": {name: values[:, 0].tolist() for name, (x, values) in curves.items() if x[0] == 0},
            "final": {name: values[:, -1].tolist() for name, (x, values) in curves.items()},
        }
        text = json.dumps(summary, indent=1)
        checkpoint.write_atomically(self.folder / "summary.json", lambda file: file.write(text.encode()))

    def table(self):
        """The evaluation at the start and at the end, mean and standard deviation over seeds."""
        from rich.table import Table

        table = Table(title=f"{self.method}: mean (standard deviation) over {self.config.num_seeds} seeds")
        for column, justify in (("", "left"), ("start", "right"), (f"update {self.rows[-1]['update']}", "right")):
            table.add_column(column, justify=justify)
        for name in self._columns():
            updates, values = self.series(name)
            if name not in ("update", "seed") and len(updates) and updates[0] == 0:
                table.add_row(name, *(f"{values[:, i].mean():.3f} ({values[:, i].std():.3f})" for i in (0, -1)))
        return table


def _reduce(values: np.ndarray) -> np.ndarray:
    """(num_seeds, updates) -> (num_seeds,): the last of a counter, else the mean of what happened (NaN if nothing did)."""
    if np.issubdtype(values.dtype, np.integer):
        return values[:, -1]
    happened = ~np.isnan(values)
    total = np.where(happened, values, 0).sum(1)
    return np.where(happened.any(1), total / np.maximum(happened.sum(1), 1), np.nan)


def _text(value) -> str:
    return "" if value is None else f"{value:.9g}" if isinstance(value, float) else str(value)


def _commit() -> str | None:
    """The commit of the code that runs, `-dirty` added where it was changed; None outside a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def progress_bar(console, num_updates: int, start: int):
    """A context that gives `bar(update, metrics)`: updates, updates per second, time left, and the metrics."""
    import contextlib

    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn(compact=True))
    progress = Progress(*columns, TextColumn("{task.fields[metrics]}"), console=console)

    @contextlib.contextmanager
    def context():
        with progress:
            task = progress.add_task("", total=num_updates, completed=start, rate="", metrics="")
            began = time.perf_counter()

            def bar(update, metrics):
                rate = (update - start) / (time.perf_counter() - began)
                shown = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())
                progress.update(task, completed=update, rate=f"{rate:.2g}/s", metrics=shown)

            yield bar

    return context()
