"""Optional places for metrics: TensorBoard and Weights & Biases. Neither is imported unless it is asked for."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from common.runs.config import as_dict, require

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}  # setting -> the package it needs


def require_trackers(config) -> None:
    """Raises UsageError if a tracker that is asked for is not installed."""
    for flag, package in PACKAGES.items():
        found = not getattr(config, flag) or find_spec(package)
        require(found, f"--{flag}: the package {package} is not installed: pip install 'nightjax[{package}]'")


class Tracker(NamedTuple):
    """A place for metrics. Their names are METRIC (the mean) and METRIC/LANE."""

    track: Callable[[int, dict], None]  # update, {name: value}
    close: Callable[[], None]


def open_trackers(config, method: str, folder: Path) -> list[Tracker]:
    """One for each that is asked for."""
    trackers = []
    if config.tensorboard:
        trackers.append(_tensorboard(folder / "tensorboard"))
    if config.wandb:
        trackers.append(_wandb(config, method, folder))
    return trackers


def _tensorboard(folder: Path):
    from tensorboard.summary import Writer

    writer = Writer(str(folder))

    def track(update: int, values: dict) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, update)
        writer.flush()

    return Tracker(track, writer.close)


def _wandb(config, method: str, folder: Path):
    import wandb

    name = f"{method}-{folder.name}"
    run = wandb.init(project="nightjax", name=name, group=method, config=as_dict(config), dir=str(folder))
    return Tracker(lambda update, values: run.log(values, step=update), run.finish)
