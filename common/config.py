"""The settings that every run has, and the command line made from a method's Config."""

import contextlib
import dataclasses
import io
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import tyro


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
    cache: str = "~/.cache/nightjax"
    """Folder of compiled programs kept between runs; "none" keeps none."""

    def __post_init__(self):
        require(self.seed >= 0, f"--seed {self.seed}: must not be negative")
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


def method_name() -> str:
    """The name of the file being run, such as `accel`."""
    return Path(sys.argv[0]).stem


def die(message: str, code: int = 2) -> None:
    """Prints one line to stderr and exits with `code`: 2 for a request that cannot be met, 1 for a run that failed."""
    print(f"{method_name()}: error: {message}", file=sys.stderr)
    sys.exit(code)


def cli(config_type: type, doc: str, presets: dict[str, Any] | None = None, args: list[str] | None = None):
    """Parses the command line into a `config_type`, beginning from `presets[--preset]`.

    What cannot be parsed or does not fit together ends the program with one line on stderr and code 2.
    """
    args = sys.argv[1:] if args is None else args
    presets = presets or {"cpu": config_type()}
    chosen = re.search(r"--preset[ =](\S+)", " ".join(args))
    start = presets.get(chosen.group(1) if chosen else "cpu", presets["cpu"])
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(config_type, description=doc, default=start, args=args)
    except UsageError as error:
        die(str(error))
    except SystemExit as stop:
        if stop.code:  # tyro draws a box of several lines: keep its words
            words = " ".join(re.sub(r"[╭╮╰╯│─]+", " ", errors.getvalue()).split())
            words = re.sub(rf"^Value error |Error parsing {config_type.__name__}: | For full helptext.*", "", words)
            die(words)
        raise


def as_dict(config) -> dict:
    """A Config as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))
