"""The folder of a run: which one it is, that no other run has it, and what a run to go on from left in it."""

import contextlib
import json
import os
import socket
import tempfile
from pathlib import Path

from common.runs.checkpoint import check_fits, checkpoints_in, newest_good
from common.runs.config import NOT_COMPARED, RunConfig, UsageError, as_dict, numbered, require


def new_folder(runs: Path) -> Path:
    """Makes runs/N, N the next number: of several processes that ask at once, each gets its own."""
    while True:
        folder = runs / str(max((number for number, _ in numbered(runs)), default=0) + 1)
        try:
            runs.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            return folder
        except FileExistsError:
            require(runs.is_dir(), f"{runs} is no folder")
        except OSError as error:
            raise UsageError(f"{folder} cannot be made: {error.strerror}") from error


def newest_folder(runs: Path) -> Path:
    """runs/N with the highest N. Raises UsageError where there is none."""
    found = numbered(runs)
    require(bool(found), f"--resume: there is no run in {runs}")
    return max(found)[1]


def require_writable(folder: Path) -> None:
    """Makes the folder, and raises UsageError where nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        raise UsageError(f"--out {folder} cannot be written: {error.strerror}") from error


# --- one run a folder


class Lock:
    """A run's hold on its folder: while it lives no other process can take it. The system lets go of it when the process dies."""

    NAME = ".lock"

    def __init__(self, folder: Path):
        """Raises UsageError if another run has the folder."""
        self.path, self._file = folder / self.NAME, None
        while not self._held():
            self._file = open(self.path, "a+")  # noqa: SIM115  (held for as long as the run)
            if not _lock(self._file):
                self._file.seek(0)
                who = self._file.read().strip()
                self._file.close()
                raise UsageError(f"{folder} is in use by another run{f' ({who})' if who else ''}")
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def _held(self) -> bool:
        """Whether the file that is locked is the one at the path: one that another run removed meanwhile is not."""
        try:
            return self._file is not None and os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path))
        except OSError:
            return False

    def lost(self) -> bool:
        """Whether the folder, or the lock in it, is no longer there."""
        return not self._held()

    def release(self) -> None:
        """Lets go, and leaves nothing behind."""
        if self._held():
            with contextlib.suppress(OSError):  # Windows removes no open file
                self.path.unlink()
        if self._file:
            self._file.close()
        self._file = None


def _lock(file) -> bool:
    """Locks an open file for this process alone, unless another has it -> whether it is free for us."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # no such call here, or a file system without locks: nothing can be known
        return True
    return True


# --- a run to go on from


def find_checkpoint(folder: Path, config: RunConfig, method: str, lanes: list[dict], template) -> Path | None:
    """The newest good checkpoint of the run in a folder, which must be of this method and these settings; None where it has not
    written one yet. Raises UsageError where it cannot be gone on with."""
    found, there = newest_good(folder), checkpoints_in(folder)
    if not found:
        require(not there, f"--resume: {folder.parent} holds no good checkpoint: move it away to begin anew")
        return None
    path, meta = found
    require_same(path, meta, config, method, lanes)
    check_fits(path, template, path)
    for damaged in there[there.index(path) + 1 :]:
        damaged.rename(damaged.with_suffix(".damaged"))  # so that it does not count among those kept
    return path


def require_same(path: Path, meta: dict, config: RunConfig, method: str, lanes: list[dict]) -> None:
    """Raises UsageError unless the checkpoint was made by this method with these settings, and says what a run has to say."""
    kinds = dict(method=str, config=dict, lanes=list, update=int, rows=list, train_s=float)
    if {name: type(value) for name, value in meta.items()} != kinds:
        raise UsageError(f"--resume: {path} is no checkpoint of a run")
    changed = changes(meta["config"], config)
    if changed or meta["method"] != method or meta["lanes"] != lanes:
        what = ", ".join(changed) or meta["method"]
        raise UsageError(f"--resume: {path} was made with {what}: give the same settings, or another --out")
    if not 0 <= meta["update"] <= config.num_updates or not all(isinstance(row, dict) for row in meta["rows"]):
        raise UsageError(f"--resume: {path} is no checkpoint of a run")


def changes(theirs: dict, config: RunConfig) -> list[str]:
    """What of a run's settings may not differ from the present ones and does, in words."""
    kept = lambda settings: {k: v for k, v in settings.items() if k not in NOT_COMPARED}
    theirs, ours = kept(theirs), kept(as_dict(config))
    grown = [k for k in config.may_grow if k in theirs and _higher(ours[k], theirs[k])]
    differ = [k for k in sorted(ours | theirs) if ours.get(k) != theirs.get(k) and k not in grown]
    return [f"{k}={theirs.get(k)} (now {ours.get(k)})" for k in differ]


def _higher(ours, theirs) -> bool:
    return isinstance(theirs, int | float) and ours > theirs


def read_settings(folder: Path) -> dict:
    """The settings of the run in a folder, from its config.json. Raises UsageError where there are none."""
    path = folder / "config.json"
    require(path.is_file(), f"--resume: {folder} holds no run")
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"--resume: {path} cannot be read") from error
    require(isinstance(settings, dict), f"--resume: {path} holds no settings")
    return settings
