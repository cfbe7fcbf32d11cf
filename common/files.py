"""The folder of a run: settings, metrics.csv, checkpoints, pictures, films, summary.json. Only the first process writes."""

import io
import json
import os
import platform
import resource
import subprocess
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np

from common.checkpoint import CheckpointWriter, Snapshot, check_fits, load, newest_good, read_meta, write_atomically
from common.config import RunConfig, UsageError, as_dict, require
from common.hosts import from_main, is_main
from common.plot import read_strips, save_curves, save_gif, save_image, save_strips
from common.trackers import open_trackers

# Settings that may differ when a run is resumed.
NOT_COMPARED = ("out", "resume", "cache", "keep", "allow_nan", "distributed", "profile", "tensorboard", "wandb")


def new_or_newest(runs: Path, resume: bool) -> Path:
    """runs/N: the newest run if it is to be resumed, else the next number."""
    newest = max((int(path.name) for path in runs.glob("*") if path.name.isdigit()), default=0)
    require(newest or not resume, f"--resume: there is no run in {runs}")
    return runs / str(newest if resume else newest + 1)


class RunFiles:
    """The folder of a run and all that is written to it.

    `lanes` say what is trained side by side, {"seed": 0}, {"seed": 1}, ...; `whole` is the folder of the sweep that it belongs to.
    """

    def __init__(self, config: RunConfig, method: str, lanes: list[dict] | None = None, whole: Path | None = None):
        self.config, self.method = config, method
        self.lanes = lanes or [{"seed": config.seed + i} for i in range(config.num_seeds)]
        choose = lambda: Path(config.out) if config.out else new_or_newest(Path("runs") / method, config.resume)
        self.folder = Path(from_main(lambda: str(choose()).encode()).decode())
        self.whole = whole or self.folder
        self.rows: list[dict] = []
        self.train_s, self.began, self.commit = 0.0, time.perf_counter(), code_commit()
        self._columns: list[str] = []
        self._csv_holds = 0  # rows of metrics.csv that are known to be there
        self._trackers = []
        self._drawn: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # the newest evaluation's arrays of one axis

    # --- beginning

    def open(self, programs):
        """-> the state to begin from and its update index. Raises UsageError rather than touch a folder it should not."""
        data = from_main(lambda: self._find(programs.state_shape))
        if is_main():
            self._writer = CheckpointWriter(self.folder / "checkpoints", self.config.keep)
            self._trackers = open_trackers(self.config, self.method, self.folder)
        if not data:
            return programs.init(), 0
        meta, state = read_meta(io.BytesIO(data)), load(io.BytesIO(data), programs.state_shape, self.folder)
        self.train_s = meta["train_s"]
        self._add(meta["rows"])
        return programs.place(state), meta["update"]

    def _find(self, template) -> bytes:
        """The checkpoint to go on from, or nothing where the run begins; then the folder is taken."""
        held, folder = (self.folder / "config.json").exists(), self.folder / "checkpoints"
        if held and not self.config.resume:
            raise UsageError(f"{self.folder} holds a run already: give --resume to go on with it, or another --out")
        if self.config.resume and not held:
            raise UsageError(f"--resume: {self.folder} holds no run")
        self._require_writable()
        found = newest_good(folder) if held else None
        if found:
            path, meta = found
            self._require_same(path, meta)
            check_fits(path, template, path)
            if self.config.may_grow:
                self._write_json("config.json", as_dict(self.config))
            for damaged in (other for other in folder.glob("*.npz") if other.name > path.name):
                damaged.rename(damaged.with_suffix(".damaged"))  # so that it does not count among those kept
            return path.read_bytes()
        if held and list(folder.glob("*.npz")):
            raise UsageError(f"--resume: {self.folder} holds no good checkpoint: move it away to begin anew")
        if held:
            print(f"{self.folder} holds no checkpoint yet: beginning anew")
        self._write_json("config.json", as_dict(self.config))
        return b""

    def _require_writable(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder) as file:
                file.write(b"x")
        except OSError as error:
            raise UsageError(f"--out {self.folder} cannot be written: {error.strerror}") from error

    def _require_same(self, path: Path, meta: dict) -> None:
        """Raises UsageError unless the checkpoint was made by this method with these settings, and says what a run has to say."""
        kinds = dict(method=str, config=dict, lanes=list, update=int, rows=list, train_s=float)
        if {name: type(value) for name, value in meta.items()} != kinds:
            raise UsageError(f"--resume: {path} is no checkpoint of a run")
        ours = {k: v for k, v in as_dict(self.config).items() if k not in NOT_COMPARED}
        theirs = {k: v for k, v in meta["config"].items() if k not in NOT_COMPARED}
        grown = [k for k in self.config.may_grow if ours[k] > theirs.get(k, ours[k])]
        changed = [k for k in sorted(ours | theirs) if ours.get(k) != theirs.get(k) and k not in grown]
        if changed or meta["method"] != self.method or meta["lanes"] != self.lanes:
            what = ", ".join(f"{k}={theirs.get(k)} (now {ours.get(k)})" for k in changed) or meta["method"]
            raise UsageError(f"--resume: {path} was made with {what}: give the same settings, or another --out")
        if not 0 <= meta["update"] <= self.config.num_updates or not all(isinstance(row, dict) for row in meta["rows"]):
            raise UsageError(f"--resume: {path} is no checkpoint of a run")

    def _write_json(self, name: str, value) -> None:
        text = json.dumps(value, indent=1)
        write_atomically(self.folder / name, lambda file: file.write(text.encode()))

    # --- on the way

    def record(self, update: int, metrics: dict, results: dict | None, held: Snapshot | None) -> OSError | None:
        """Writes what came of a chunk: its metrics, an evaluation, a checkpoint -> what went wrong, if something did."""
        try:
            self._add_results(update, metrics, results or {})
            if held and is_main():
                meta = dict(method=self.method, config=as_dict(self.config), lanes=self.lanes)
                meta |= dict(update=update, rows=list(self.rows), train_s=float(self.train_s))
                self._writer.write(update, held, meta)
        except OSError as error:
            return error

    def wait(self) -> OSError | None:
        """Returns when the last checkpoint is on the disk -> what went wrong, if something did."""
        try:
            if is_main():
                self._writer.wait()
        except OSError as error:
            return error

    def _add_results(self, update: int, metrics: dict, results: dict) -> None:
        """A line per lane of metrics.csv; pictures, films and arrays."""
        columns = {name: reduce_updates(values) for name, values in metrics.items()}
        columns |= {name: value for name, value in results.items() if value.ndim == 1}
        values = {name: np.asarray(value).tolist() for name, value in columns.items()}
        lines = [{"update": update} | lane | {name: v[i] for name, v in values.items()} for i, lane in enumerate(self.lanes)]
        self._add(lines)
        if not is_main():
            return
        self._write_csv()
        self._track(update, values)
        for name, value in results.items():
            if value.dtype == np.uint8 and value.ndim == 4:
                save_image(self.folder / "figures" / name / f"{update:08d}.png", value[0])
            elif value.dtype == np.uint8 and value.ndim == 5:
                save_gif(self.folder / "videos" / f"{name}.gif", np.concatenate(value, axis=2))
            elif value.ndim > 1:
                write_atomically(self.folder / "arrays" / f"{name}.npy", lambda file, value=value: np.save(file, value))
                if value.ndim == 2:
                    self._drawn[name] = (np.arange(value.shape[1]), value)

    def _track(self, update: int, values: dict) -> None:
        if self._trackers:
            names = ["-".join(f"{k}{v}" for k, v in lane.items()) for lane in self.lanes]
            flat = {name: float(np.mean(v)) for name, v in values.items()}
            flat |= {f"{name}/{lane}": float(x) for name, v in values.items() for lane, x in zip(names, v, strict=True)}
            for track in self._trackers:
                track(update, flat)

    def _add(self, rows: list[dict]) -> None:
        self.rows += rows
        names = dict.fromkeys([*self._columns, *(name for row in rows for name in row)])
        if len(names) > len(self._columns):
            self._columns, self._csv_holds = list(names), 0

    def _write_csv(self) -> None:
        """Adds the new rows to metrics.csv; writes all of it where it is new, its columns are, or the run was resumed."""
        path = self.folder / "metrics.csv"
        new = self.rows[self._csv_holds :]
        text = "".join(",".join(csv_cell(row.get(name)) for name in self._columns) + "\n" for row in new)
        if self._csv_holds:
            with open(path, "a") as file:
                file.write(text)
        else:
            text = ",".join(self._columns) + "\n" + text
            write_atomically(path, lambda file: file.write(text.encode()))
        self._csv_holds = len(self.rows)

    def newest_checkpoint(self) -> Path | None:
        """The newest checkpoint that is written."""
        return max((self.folder / "checkpoints").glob("*.npz"), default=None)

    # --- looking back

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A column of metrics.csv where it has values: updates (P,), values (lanes, P)."""
        points = {}
        for row in self.rows:
            if row.get(name) is not None:
                points.setdefault(row["update"], []).append(row[name])
        return np.array(list(points)), np.array(list(points.values()), float).T

    def latest(self, names: tuple[str, ...]) -> dict[str, float]:
        """The newest mean over lanes of each of the metrics named."""
        newest = {}
        for name in names:
            last = next((i for i in range(len(self.rows), 0, -1) if self.rows[i - 1].get(name) is not None), None)
            if last:
                newest[name] = float(np.mean([row[name] for row in self.rows[last - len(self.lanes) : last]]))
        return newest

    def metric_names(self) -> list[str]:
        """The columns of metrics.csv that are metrics."""
        return [name for name in self._columns if name not in ("update", *self.lanes[0])]

    def finish(self, compile_s: float) -> OSError | None:
        """Writes the figures and summary.json -> what went wrong, if something did."""
        try:
            if is_main():
                self._write_figures()
                self._write_json("summary.json", self.summary(compile_s))
        except OSError as error:
            return error

    def _curves(self) -> dict:
        names = [name for name in self.metric_names() if name != "env_steps"]
        return {name: (x, values) for name, (x, values) in ((name, self.series(name)) for name in names) if len(x)}

    def _write_figures(self) -> None:
        curves = {name: curve for name, curve in self._curves().items() if len(curve[0]) > 1}
        save_curves(self.folder / "figures" / "curves.png", curves, "update")
        if self._drawn:
            save_curves(self.folder / "figures" / "evaluation.png", self._drawn, "step")
        for folder in (self.folder / "figures").glob("*/"):
            title = f"{self.method}, seed {self.config.seed}: {folder.name} through training"
            save_strips(folder.with_suffix(".png"), read_strips(folder), title)

    def summary(self, compile_s: float) -> dict:
        """What summary.json says. Values per lane; `start` is before the first update."""
        curves = self._curves()
        env_steps = self.latest(("env_steps",)).get("env_steps", 0) * len(self.lanes)
        return {
            "method": self.method,
            "config": as_dict(self.config),
            "commit": self.commit,
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("jax", "jaxlib", "optax")},
            },
            "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} cores",
            "processes": jax.process_count(),
            "compile_s": compile_s,
            "wall_s": time.perf_counter() - self.began,
            "train_s": self.train_s,
            "steps_per_s": env_steps / self.train_s if self.train_s else None,
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "lanes": self.lanes,
            "start": {name: values[:, 0].tolist() for name, (x, values) in curves.items() if x[0] == 0},
            "final": {name: values[:, -1].tolist() for name, (x, values) in curves.items()},
        }

    def table(self):
        """The evaluation at the start and at the end, mean and standard deviation over lanes."""
        from rich.table import Table

        table = Table(title=f"{self.method}: mean (standard deviation) over {len(self.lanes)} seeds")
        for column, justify in (("", "left"), ("start", "right"), (f"update {self.rows[-1]['update']}", "right")):
            table.add_column(column, justify=justify)
        for name in self.metric_names():
            updates, values = self.series(name)
            if len(updates) and updates[0] == 0:
                table.add_row(name, *(f"{values[:, i].mean():.3f} ({values[:, i].std():.3f})" for i in (0, -1)))
        return table


def reduce_updates(values: np.ndarray) -> np.ndarray:
    """(lanes, updates) -> (lanes,): the last of a counter, else the mean of what happened (NaN if nothing did)."""
    if np.issubdtype(values.dtype, np.integer):
        return values[:, -1]
    happened = ~np.isnan(values)
    total = np.where(happened, values, 0).sum(1)
    return np.where(happened.any(1), total / np.maximum(happened.sum(1), 1), np.nan)


def csv_cell(value) -> str:
    """A value as metrics.csv has it; nine digits hold a float32 exactly."""
    return "" if value is None else f"{value:.9g}" if isinstance(value, float) else str(value)


def code_commit() -> str | None:
    """The commit of the code that runs, `-dirty` added where it was changed; None outside a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
