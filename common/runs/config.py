"""The settings that every run has, and the words for what cannot be met."""

import dataclasses
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

CACHE = "~/.cache/nightjax"
# Settings that may differ when a run is resumed.
NOT_COMPARED = ("out", "dry_run", "resume", "cache", "keep", "allow_nan", "distributed", "profile", "tensorboard", "wandb")


class UsageError(ValueError):
    """A request that cannot be met; its message is one line that says what is wrong and what would be right."""


class Fault(RuntimeError):
    """A run that cannot go on (a full disk, parameters that are no longer finite); its message is one line."""


def require(condition: bool, message: str) -> None:
    """Raises UsageError(message) unless the condition holds."""
    if not condition:
        raise UsageError(message)


@dataclass(frozen=True)
class RunConfig:
    """Settings of a run, whatever the method. A method's Config extends this with its own."""

    may_grow: ClassVar[tuple[str, ...]] = ()  # settings that may be higher when a run is resumed: `num_updates` without a schedule
    paths: ClassVar[tuple[str, ...]] = ()  # the method's settings that are files or folders
    compiler_options: ClassVar[dict[str, str]] = {}  # XLA's, for a method's programs on a CPU
    preset: Literal["cpu", "paper"] = "cpu"
    """Which set of defaults to begin from: minutes on two cores, or the paper's own numbers."""
    seed: int = 0
    """Seed of the first run; the others count up from it."""
    num_seeds: int = 1
    """Independent runs, trained side by side in one program."""
    num_updates: int = 100
    """Learning steps per seed (calls of the method's `update`)."""
    out: str | None = None
    """Folder for everything the run writes. Default: runs/METHOD/1, 2, ..."""
    log_every: int = 10
    """Updates between two rows of metrics.csv; also how long a stop signal may wait."""
    eval_every: int = 100
    """Updates between two evaluations, a multiple of log_every. The start and the end are always evaluated."""
    save_every: int = 100
    """Updates between two checkpoints, a multiple of log_every. The end is always saved."""
    keep: int = 2
    """Checkpoints kept, the newest ones."""
    dry_run: bool = False
    """Say what would be trained, how large and on which devices; compile and write nothing."""
    resume: bool = False
    """Continue the newest good checkpoint in --out (without --out: of the method's newest run)."""
    allow_nan: bool = False
    """Go on when parameters are no longer finite, instead of stopping."""
    distributed: bool = False
    """Join the other hosts of this run. On by itself where the cluster's environment variables name several processes."""
    profile: bool = False
    """Write a trace of one chunk of updates to OUT/profile, for TensorBoard's profiler or Perfetto."""
    tensorboard: bool = False
    """Write the metrics to OUT/tensorboard too."""
    wandb: bool = False
    """Send the metrics to Weights & Biases too."""
    cache: str = CACHE
    """Folder of compiled programs kept between runs; "none" keeps none."""

    def __post_init__(self):
        require(self.seed >= 0, f"--seed {self.seed}: must not be negative")
        most = 2**31 - self.num_seeds
        require(self.seed <= most, f"--seed {self.seed}: must be at most {most}, so that all seeds are below 2^31")
        for name in ("out", "cache", *self.paths):
            value = getattr(self, name)
            if value is not None:
                require(value != "", f"--{name.replace('_', '-')}: must not be empty")
                object.__setattr__(self, name, os.path.expanduser(value))
        for name in ("num_seeds", "num_updates", "log_every", "eval_every", "save_every", "keep"):
            value = getattr(self, name)
            require(value >= 1, f"--{name.replace('_', '-')} {value}: must be at least 1")
        for name in ("num_updates", "eval_every", "save_every"):
            require_multiple(self, name, "log_every")

    @property
    def split_size(self) -> int:
        """The size of the axis (environments, batch, population) that is split where there are more devices than seeds."""
        return 1


def require_multiple(config, name: str, of: str) -> None:
    """Raises UsageError unless config's field `name` is a multiple of its field `of`; says the nearest values that are."""
    value, unit = getattr(config, name), getattr(config, of)
    below, above = value // unit * unit, -(-value // unit) * unit
    flag, of_flag = name.replace("_", "-"), of.replace("_", "-")
    nearest = f"{below} or {above}" if below else str(above)
    require(value % unit == 0, f"--{flag} {value}: must be a multiple of --{of_flag} {unit}, such as {nearest}")


def require_range(config, low: float, high: float, *names: str) -> None:
    """Raises UsageError unless each named field of config lies in [low, high]."""
    for name in names:
        value = getattr(config, name)
        require(low <= value <= high, f"--{name.replace('_', '-')} {value}: must lie between {low:g} and {high:g}")


def as_dict(config) -> dict:
    """A Config as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def as_tuple(value):
    """JSON's lists as the tuples that they were."""
    return tuple(map(as_tuple, value)) if isinstance(value, list) else value


def numbered(folder: Path) -> list[tuple[int, Path]]:
    """What in a folder has a number for its name, and the number; whatever else lies there is passed over."""
    found = folder.iterdir() if folder.is_dir() else ()
    return [(int(path.name), path) for path in found if re.fullmatch(r"[0-9]{1,18}", path.name)]
