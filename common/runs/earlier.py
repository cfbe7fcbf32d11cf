"""What an earlier run has learned, for a run that begins with it or uses it (--load)."""

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from common.runs.checkpoint import load, newest_good
from common.runs.command import method_name
from common.runs.config import RunConfig, as_dict, require
from common.runs.folder import newest_folder


class Earlier(NamedTuple):
    """A run that there is."""

    folder: Path
    config: Any  # its settings
    update: int  # of its newest good checkpoint
    checkpoint: Path


def newest_run() -> Path:
    """The folder that a run without --load begins from. Raises UsageError if there is none."""
    runs = Path("runs") / method_name()
    require(runs.is_dir(), f"--load: there is no run in {runs}; train one first, or give its folder")
    return newest_folder(runs)


def find_run(folder: Path, config_type: type, method: str) -> Earlier:
    """The newest checkpoint of a run of `method` (as people call it). Raises UsageError if there is none, before any device is
    used."""
    found = newest_good(folder / "checkpoints")
    require(found, f"--load {folder}: there is no checkpoint")
    settings = found[1]["config"]
    try:
        config = config_type(**settings)
    except TypeError:
        config = None
    ours, shared = as_dict(config) if config else {}, {field.name for field in fields(RunConfig)}
    same = config and ours | settings == ours and ours.keys() - settings.keys() <= shared
    require(same, f"--load {folder}: is no run of this version of {method}")
    return Earlier(folder, config, found[1]["update"], found[0])


def state_like(config: RunConfig, make_train: Callable):
    """The shape of a run's State, with an axis of seeds."""
    keys = jax.eval_shape(jax.vmap(jax.random.key), np.arange(config.num_seeds))
    return jax.eval_shape(jax.vmap(make_train(config).init), keys)


def read_state(earlier: Earlier, make_train: Callable):
    """A run's State, with an axis of seeds."""
    return load(earlier.checkpoint, state_like(earlier.config, make_train))


def check_seeds(earlier: Earlier, config: RunConfig) -> None:
    """Raises UsageError unless both runs have as many seeds."""
    theirs = earlier.config.num_seeds
    seeds = f"--load {earlier.folder}: has {theirs} seeds, this run {config.num_seeds}"
    require(theirs == config.num_seeds, f"{seeds}: give --num-seeds {theirs}")


def check_shapes(earlier: Earlier, params: dict, like: dict) -> None:
    """Raises UsageError, which names the first difference, unless parameters are as large as `like`'s of the same names."""
    name_of = partial(jax.tree_util.keystr, simple=True, separator="/")
    shapes = lambda tree: {name_of(path): list(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(tree)}
    given, wanted = shapes(params), shapes({name: like[name] for name in params})
    for name in given | wanted:
        has, needs = given.get(name, "not there"), wanted.get(name, "none")
        require(has == needs, f"--load {earlier.folder}: {name} is {has}, this run has {needs}")
