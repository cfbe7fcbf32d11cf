"""All that a run leaves in its folder: settings, metrics, checkpoints, pictures, summary.json. Only the first process writes."""

import contextlib
import io
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np

from common.runs.checkpoint import (
    CheckpointWriter,
    Snapshot,
    checkpoint_path,
    checkpoints_in,
    load,
    read_meta,
    write_atomically,
    write_snapshot,
)
from common.runs.config import RunConfig, UsageError, as_dict
from common.runs.folder import Lock, changes, find_checkpoint, new_folder, newest_folder, read_settings, require_writable
from common.runs.hosts import from_main, is_main
from common.runs.pictures import Pictures
from common.runs.rows import Rows, reduce_updates
from common.runs.trackers import open_trackers


class RunFiles:
    """The folder of a run and all that is written to it, from `open` to `close`.

    `lanes` say what is trained side by side, {"seed": 0}, {"seed": 1}, ...; `whole` is the folder of the sweep that it belongs to.
    """

    def __init__(self, config: RunConfig, method: str, lanes: list[dict] | None = None, whole: Path | None = None):
        self.config, self.method, self._whole = config, method, whole
        self.lanes = lanes or [{"seed": config.seed + i} for i in range(config.num_seeds)]
        self.rows = Rows(self.lanes)
        self.train_s, self.began, self.commit = 0.0, time.perf_counter(), code_commit()
        self.folder = Path(config.out) if config.out else None  # else it is chosen by `open`
        self._lock = self._writer = None
        self._trackers = []

    @property
    def whole(self) -> Path:
        """The folder that is given to --resume."""
        return self._whole or self.folder

    # --- beginning

    def open(self, programs):
        """Takes the folder -> the state to begin from and its update index. Raises UsageError, and leaves nothing behind, rather
        than touch a folder that it should not."""
        new = self.folder is None and not self.config.resume
        try:
            self.folder = Path(from_main(self._refusing(lambda: str(self._take()).encode())).decode())
            data = from_main(self._refusing(lambda: self._find(programs.state_shape)))
        except UsageError:
            self.close()
            if new and self.folder and is_main():
                with contextlib.suppress(OSError):  # only if it is empty: what somebody has put there is theirs
                    self.folder.rmdir()
            raise
        self._pictures = Pictures(self.folder)
        if is_main():
            self._writer = CheckpointWriter(self.folder / "checkpoints", self.config.keep)
            self._trackers = open_trackers(self.config, self.method, self.folder)
        if not data:
            return programs.init(), 0
        meta, state = read_meta(io.BytesIO(data)), load(io.BytesIO(data), programs.state_shape, self.folder)
        self.train_s = meta["train_s"]
        self.rows.add(meta["rows"])
        return programs.place(state), meta["update"]

    def _refusing(self, produce):
        """`produce`, with a UsageError for what the system refuses."""

        def refusing() -> bytes:
            try:
                return produce()
            except OSError as error:
                raise UsageError(f"--out {self.folder} cannot be used: {error.strerror or error}") from error

        return refusing

    def _take(self) -> Path:
        """Chooses the folder and locks it."""
        if self.folder is None:
            runs = Path("runs") / self.method
            self.folder = newest_folder(runs) if self.config.resume else new_folder(runs)
        held = (self.folder / "config.json").exists()
        if held and not self.config.resume:
            raise UsageError(f"{self.folder} holds a run already: give --resume to go on with it, or another --out")
        if self.config.resume and not held:
            raise UsageError(f"--resume: {self.folder} holds no run")
        require_writable(self.folder)
        self._lock = Lock(self.folder)
        if (self.folder / "config.json").exists() and not self.config.resume:  # another run took it meanwhile, and has ended
            raise UsageError(f"{self.folder} holds a run already: give --resume to go on with it, or another --out")
        return self.folder

    def _find(self, template) -> bytes:
        """The checkpoint to go on from, or nothing where the run begins."""
        if self.config.resume:
            path = find_checkpoint(self.folder / "checkpoints", self.config, self.method, self.lanes, template)
            if path:
                if self.config.may_grow:
                    self._write_json("config.json", as_dict(self.config))
                return path.read_bytes()
            changed = changes(read_settings(self.folder), self.config)
            if changed:
                raise UsageError(f"--resume: {self.folder} was begun with {', '.join(changed)}: give the same, or another --out")
            print(f"{self.folder} holds no checkpoint yet: beginning anew")
        self._write_json("config.json", as_dict(self.config))
        return b""

    def _write_json(self, name: str, value) -> None:
        text = json.dumps(value, indent=1)
        write_atomically(self.folder / name, lambda file: file.write(text.encode()))

    # --- on the way

    def record(self, update: int, metrics: dict, results: dict | None, held: Snapshot | None) -> OSError | None:
        """Writes what came of a chunk: its metrics, an evaluation, a checkpoint -> what went wrong, if something did."""
        try:
            values = self.add(update, metrics, results or {})
            if not is_main():
                return None
            self.rows.write(self.folder / "metrics.csv")
            self._track(update, values)
            self._pictures.keep(update, results or {})
            if held:
                self._writer.write(update, held, self._meta(update))
        except OSError as error:
            return error

    def add(self, update: int, metrics: dict, results: dict) -> dict[str, list]:
        """Adds the rows of a chunk, and of an evaluation if there was one -> their metrics, name -> values per lane."""
        columns = {name: reduce_updates(values) for name, values in metrics.items()}
        return self.rows.measured(update, columns | {name: value for name, value in results.items() if value.ndim == 1})

    def _meta(self, update: int) -> dict:
        """What a checkpoint says of its run."""
        meta = dict(method=self.method, config=as_dict(self.config), lanes=self.lanes)
        return meta | dict(update=update, rows=list(self.rows.all), train_s=float(self.train_s))

    def _track(self, update: int, values: dict) -> None:
        if self._trackers:
            names = ["-".join(f"{k}{v}" for k, v in lane.items()) for lane in self.lanes]
            flat = {name: float(np.mean(v)) for name, v in values.items()}
            flat |= {f"{name}/{lane}": float(x) for name, v in values.items() for lane, x in zip(names, v, strict=True)}
            for tracker in self._trackers:
                tracker.track(update, flat)

    def wait(self) -> OSError | None:
        """Returns when the last checkpoint is on the disk -> what went wrong, if something did."""
        try:
            if is_main():
                self._writer.wait()
        except OSError as error:
            return error

    def newest_checkpoint(self) -> Path | None:
        """The newest checkpoint that is written."""
        if self.folder is None:
            return None
        return next(reversed(checkpoints_in(self.folder / "checkpoints")), None)

    def lost(self) -> bool:
        """Whether somebody has taken the folder away."""
        return is_main() and self._lock.lost()

    def rescue(self, update: int, held: Snapshot) -> str:
        """Saves the state of a run whose folder is gone in one of its own -> where that is, in words."""
        if not is_main():
            return ""
        try:
            folder = Path(tempfile.mkdtemp(prefix=f"nightjax-{self.method}-"))
            path = checkpoint_path(folder / "checkpoints", update)
            config = as_dict(self.config) | {"out": None}
            write_snapshot(path, held, self._meta(update) | {"config": config})
            write_atomically(folder / "config.json", lambda file: file.write(json.dumps(config).encode()))
            hint = "" if self._whole else f"; to go on: --resume --out {shlex.quote(str(folder))}"
            return f"saved in {path}{hint}"
        except OSError as error:
            return f"its state cannot be saved elsewhere: {error.strerror}"

    # --- at the end

    def finish(self, compile_s: float, num_devices: int) -> OSError | None:
        """Writes the figures and summary.json -> what went wrong, if something did."""
        try:
            if is_main():
                self._pictures.finish(f"{self.method}, seed {self.config.seed}", self.rows.curves())
                self._write_json("summary.json", self.summary(compile_s, num_devices))
        except OSError as error:
            return error

    def close(self) -> None:
        """Gives back what the run took: its thread and its lock."""
        if self._writer:
            self._writer.close()
        for tracker in self._trackers:
            tracker.close()
        self._trackers = []
        if self._lock:
            self._lock.release()

    def summary(self, compile_s: float, num_devices: int) -> dict:
        """What summary.json says. Values per lane; `start` is before the first update."""
        curves = self.rows.curves()
        env_steps = self.rows.latest(("env_steps",)).get("env_steps", 0) * len(self.lanes)
        return {
            "method": self.method,
            "config": as_dict(self.config),
            "commit": self.commit,
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("jax", "jaxlib", "optax")},
            },
            "devices": f"{num_devices} x {jax.devices()[0].device_kind}, {os.cpu_count()} cores",
            "processes": jax.process_count(),
            "compile_s": compile_s,
            "wall_s": time.perf_counter() - self.began,
            "train_s": self.train_s,
            "steps_per_s": env_steps / self.train_s if self.train_s else None,
            "peak_rss_mb": peak_rss(),
            "lanes": self.lanes,
            "start": {name: values[:, 0].tolist() for name, (x, values) in curves.items() if x[0] == 0},
            "final": {name: values[:, -1].tolist() for name, (x, values) in curves.items()},
        }

    def table(self):
        """The evaluation at the start and at the end."""
        return self.rows.table(f"{self.method}: mean (standard deviation) over {len(self.lanes)} seeds")


def peak_rss() -> float | None:
    """The most memory that this process has held, in MB of 2^20 bytes; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def code_commit() -> str | None:
    """The commit of the code that runs, `-dirty` added where it was changed; None outside a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
