"""What H-GAP learns from: demonstrations by name or from files, standardised, cut into windows; and where evaluations begin."""

from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np

from common.runs.config import UsageError, require
from common.runs.programs import prepared
from envs.cmu_humanoid import CmuHumanoid
from envs.humanoid import Humanoid, split
from envs.humanoid_skills import demonstrate, load_skills, window_starts
from envs.mocapact import read

BLOCKS = 8  # of 50 steps: what a demonstrator of `skills` does
GROUP = 128  # demonstrators that are simulated side by side; the first group is held out, whatever the number of others
DIVING = 0.125  # the share of them that dive
DATA_SEED = 20_231  # one set of data for all seeds, as in the paper


class Data(NamedTuple):
    """Standardised steps (N, T, O + A) float32, where windows begin (M, 2) int32; the same held out; and what belongs to them."""

    steps: np.ndarray
    left: np.ndarray  # (N, T) int32: steps of the same episode from each on
    fell: np.ndarray  # (N, T) bool: more than feet touched the ground
    starts: np.ndarray
    held_steps: np.ndarray
    held_left: np.ndarray
    held_starts: np.ndarray
    mean: np.ndarray  # (O + A,)
    std: np.ndarray
    worlds: Any  # states in which evaluations may begin, (..., W); None: the world's own start
    task_means: dict[str, float]  # reward a step in the data, of each of the body's tasks
    num_obs: int


def make_env(body: str, task: str | None = None):
    """A body's world. Raises UsageError where what it needs is missing."""
    if body == "planar":
        return Humanoid(task)
    try:
        return CmuHumanoid(task or "speed")
    except ImportError as fault:
        raise UsageError(f"--body {body}: {fault}") from None


def load_data(config) -> Data:
    """What `config` (its data, body, episodes, window, dry_run) names. Raises UsageError where it does not fit."""
    if config.data == "skills":
        require(config.body == "planar", f"--body {config.body}: needs --data, MoCapAct's rollouts")
        return from_skills(config)
    path, env = Path(config.data), make_env(config.body)
    require(path.exists(), f"--data {path}: there is no such file or folder")
    reader = read_npz if path.suffix == ".npz" else read_mocapact
    read_in = reader(path, env, config.window)
    num = len(read_in[0])
    held = np.arange(num) % 10 == (9 if num >= 10 else num - 1)
    require(not held.all(), f"--data {path}: needs at least 2 episodes, one of them to be held out")
    return standardise(env, config, [x[~held] for x in read_in], [x[held] for x in read_in], None)


def from_skills(config) -> Data:
    """Demonstrations of the planar humanoid's skills, drawn when they are needed."""
    skills, group = load_skills(), min(config.episodes, GROUP)
    num_groups, upright = -(-config.episodes // group), group - int(group * DIVING)  # none begins lying on the ground

    def draw():
        one = lambda key: demonstrate(key, skills, group, BLOCKS, diving=DIVING)
        all, worlds = jax.lax.map(one, jax.random.split(jax.random.key(DATA_SEED), 1 + num_groups))
        worlds = jax.tree.map(lambda x: x[0, ..., :upright].reshape(*x.shape[1:-2], -1), worlds)
        return tuple(all), worlds

    drawn, worlds = prepared(config, draw)
    held, train = [x[0] for x in drawn], [x[1:].reshape(-1, *x.shape[2:])[: config.episodes] for x in drawn]
    return standardise(Humanoid(), config, train, held, worlds)


def standardise(env, config, train, held, worlds) -> Data:
    """Data from (obs, action, left, fell) of those that are learned from and of those held out."""
    starts, held_starts = (window_starts(part[2], config.window) for part in (train, held))
    if config.dry_run:  # nothing was drawn
        starts = held_starts = np.zeros((1, 2), np.int32)
    for what in (starts, held_starts):
        require(len(what), f"--data {config.data}: no episode is as long as --window {config.window}")
    both = [np.concatenate(part[:2], axis=-1) for part in (train, held)]
    there = both[0][train[2] > 0] if (train[2] > 0).any() else np.zeros((1, both[0].shape[-1]), np.float32)
    mean, std = there.mean(0, dtype=np.float64).astype(np.float32), there.std(0, dtype=np.float64).astype(np.float32)
    std = np.maximum(std, 1e-2)
    seen = split(there[:, : env.obs_size], env.parts)
    means = {name: 0.0 if config.dry_run else float(np.mean(task(seen))) for name, task in env.tasks.items()}
    steps, held_steps = ((x - mean) / std for x in both)
    return Data(steps, train[2], train[3], starts, held_steps, held[2], held_starts, mean, std, worlds, means, env.obs_size)


def read_npz(path: Path, env, window: int):
    """Arrays obs (E, T, O), action (E, T, A) and length (E,) of an .npz -> obs, action, left, fell (nothing is known of falls)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in ("obs", "action", "length") if name in file.files}
    except (OSError, ValueError, EOFError, TypeError, AttributeError, BadZipFile) as fault:
        raise UsageError(f"--data {path}: is no .npz of numbers ({type(fault).__name__})") from None
    missing = [name for name in ("obs", "action", "length") if name not in found]
    require(not missing, f"--data {path}: has no {', no '.join(missing)}")
    return checked(path, env, found["obs"], found["action"], found["length"], window)


def read_mocapact(path: Path, env, window: int):
    """MoCapAct's rollouts -> obs, action, left."""
    rollouts = read(path, min_steps=window)
    return checked(path, env, *rollouts, window)


def checked(path, env, obs, action, length, window: int):
    """What was read, or a UsageError."""
    for name, x, size in (("obs", obs, env.obs_size), ("action", action, env.num_actions)):
        require(x.ndim == 3, f"--data {path}: {name} has {x.ndim} axes, needs 3: episodes, steps, numbers")
        require(x.shape[-1] == size, f"--data {path}: {name} has {x.shape[-1]} numbers a step, this body {size}")
        require(np.issubdtype(x.dtype, np.floating), f"--data {path}: {name} is {x.dtype}, needs floats")
    same = obs.shape[:2] == action.shape[:2] and length.shape == obs.shape[:1] and np.issubdtype(length.dtype, np.integer)
    require(same, f"--data {path}: obs {obs.shape}, action {action.shape}, length {length.shape} do not belong together")
    require(((length >= 0) & (length <= obs.shape[1])).all(), f"--data {path}: a length is not between 0 and {obs.shape[1]}")
    left = np.maximum(length[:, None] - np.arange(obs.shape[1]), 0).astype(np.int32)
    obs, action = obs.astype(np.float32), action.astype(np.float32)
    for name, x in (("obs", obs), ("action", action)):
        bad = np.argwhere(~np.isfinite(x).all(-1) & (left > 0))
        require(not len(bad), f"--data {path}: {name} of episode {bad[0][0]} is not finite at step {bad[0][1]}" if len(bad) else "")
    long = length >= window
    require(long.any(), f"--data {path}: the longest of {len(length)} episodes has {length.max(initial=0)} steps, needs {window}")
    return obs[long], action[long], left[long], np.zeros_like(left[long], bool)


def draw_windows(key, steps, starts, num: int, length: int) -> jax.Array:
    """`num` windows at random: (num, length, O + A)."""
    place = jnp.asarray(starts)[jax.random.randint(key, (num,), 0, len(starts), jnp.int32)]
    return jnp.asarray(steps)[place[:, :1], place[:, 1:] + jnp.arange(length, dtype=jnp.int32)]
