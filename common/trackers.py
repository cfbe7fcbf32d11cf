"""Optional places for metrics: TensorBoard and Weights & Biases. Neither is imported unless it is asked for."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from common.config import as_dict, require

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}  # setting -> the package it needs


def require_trackers(config) -> None:
    """Raises UsageError if a tracker that is asked for is not installed."""
    for flag, package in PACKAGES.items():
        found = not getattr(config, flag) or find_spec(package)
        require(found, f"--{flag}: the package {package} is not installed: pip install 'nightjax[{package}]'")


def open_trackers(config, method: str, folder: Path) -> list[Callable[[int, dict], None]]:
    """Functions (update, {name: value}) -> None, one for each tracker asked for. Names are METRIC (the mean) and METRIC/LANE."""
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

    return track


def _wandb(config, method: str, folder: Path):
    import wandb

    name = f"{method}-{folder.name}"
    run = wandb.init(project="nightjax", name=name, group=method, config=as_dict(config), dir=str(folder))
    return lambda update, values: run.log(values, step=update)
