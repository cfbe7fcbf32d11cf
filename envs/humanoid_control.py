"""Closed-loop control of a humanoid for any task: what planners are run by, and planners that know the true dynamics.

Axes: M humanoids side by side, each with a task; N plans of each; H steps of a plan. Worlds are (..., M), observations (M, O).
"""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common.runs.checkpoint import write_atomically
from common.runs.config import UsageError, require
from common.runs.plot import save_gif
from envs.humanoid import split

START_NOISE = 0.1  # m/s and rad/s, of the root's velocities at the start of an evaluation
KNOTS = 4  # steps between those at which noise on a plan is drawn; in between it is interpolated


class Tasks(NamedTuple):
    """What each of M humanoids is to do."""

    names: tuple[str, ...]
    functions: tuple[Callable, ...]  # of named observations
    falling: tuple[bool, ...]  # whether all of the body may touch the ground
    which: np.ndarray  # (M,) of each humanoid


class Outcome(NamedTuple):
    """What came of M episodes."""

    total: jax.Array  # (M,) sum of rewards until the end
    length: jax.Array  # (M,) steps until then
    worlds: Any  # (steps / every, ..., M): before each plan


def check_task(name: str, env) -> Callable | None:
    """A user's task, FILE.py:FUNCTION, or None for the body's own and `all`. Raises UsageError where it is no function of named
    observations (..., n) that gives finite numbers (...)."""
    if name == "all" or name in env.tasks:
        return None
    path, _, function = name.rpartition(":")
    require(path.endswith(".py"), f"--task {name}: is none of {', '.join(env.tasks)}, all, or FILE.py:FUNCTION")
    require(Path(path).is_file(), f"--task {name}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        task = getattr(module, function)
        standing = {part: np.zeros((2, 3, size), np.float32) for part, size in env.parts.items()}
        standing["body_height"] = standing["body_height"] + np.float32(1)
        standing["world_zaxis"][..., 1] = 1
        found = np.asarray(task({part: jnp.asarray(x) for part, x in standing.items()}))
    except Exception as fault:
        raise UsageError(f"--task {name}: {type(fault).__name__}: {' '.join(str(fault).split())}") from None
    given = f"gave {found.dtype} of shape {found.shape} for observations (2, 3, n)"
    require(found.shape == (2, 3) and np.issubdtype(found.dtype, np.floating), f"--task {name}: {given}; must be float (2, 3)")
    require(np.isfinite(found).all(), f"--task {name}: is not finite for a humanoid that stands still")
    return task


def make_tasks(config, env, data=None) -> Tasks:
    """The tasks of an evaluation, config.task, each `eval_episodes` times. With `data`, a user's task is tried on observations of
    them: raises UsageError where it is not finite."""
    own = check_task(config.task, env)
    if own and data:
        obs = (data.held_steps * data.std + data.mean)[..., : data.num_obs]
        fine = np.isfinite(np.asarray(own(split(jnp.asarray(obs[:4]), env.parts)))).all()
        require(fine, f"--task {config.task}: is not finite for some of the demonstrations")
    name = config.task.rpartition(":")[2]
    chosen = {name: own} if own else env.tasks if name == "all" else {name: env.tasks[name]}
    falling = tuple(config.falling if own else name in env.falling for name in chosen)
    return Tasks(tuple(chosen), tuple(chosen.values()), falling, np.repeat(np.arange(len(chosen)), config.eval_episodes))


def begin_worlds(key, env, worlds, num: int):
    """States (..., num) to begin from: of `worlds` (..., W), at random, with noise on the root's velocity, or the world's."""
    key_which, key_linear, key_turning = jax.random.split(key, 3)
    if worlds is None:
        return jax.vmap(lambda key: env.reset_env(key, env.default_params)[1], out_axes=-1)(jax.random.split(key, num))
    which = jax.random.randint(key_which, (num,), 0, worlds.pos.shape[-1], jnp.int32)
    world = jax.tree.map(lambda x: jnp.asarray(x)[..., which], worlds)
    linear = START_NOISE * jax.random.normal(key_linear, world.vel.shape, jnp.float32)
    turning = START_NOISE * jax.random.normal(key_turning, (num,), jnp.float32)
    return world._replace(vel=world.vel + linear, spin=world.spin + turning)


def rewards(env, tasks: Tasks, obs) -> jax.Array:
    """Of observations (M, ..., O), of each humanoid's own task: (M, ...)."""
    seen, which = split(obs, env.parts), tasks.which.reshape(-1, *[1] * (obs.ndim - 2))
    found = jnp.zeros(obs.shape[:-1], jnp.float32)
    for i, function in enumerate(tasks.functions):
        found = jnp.where(which == i, function(seen), found)
    return found


def may_fall(tasks: Tasks) -> np.ndarray:
    """(M,) bool."""
    return np.array(tasks.falling)[tasks.which]


def play(key, env, tasks: Tasks, planner: Callable, memory, world, steps: int, every: int) -> Outcome:
    """One episode of each of M humanoids.

    planner: key, memory, world, obs (M, O) -> actions (M, at least `every`, A), memory.
    """
    params, num = env.default_params, len(tasks.which)

    def round_of(carry, key):
        world, memory, alive, total, length = carry
        begun = world
        actions, memory = planner(key, memory, world, env.get_obs(world).T)

        def step(carry, action):
            world, alive, total, length = carry
            obs, world, _, _, info = env.step_env(None, world, action.T, params)
            alive &= may_fall(tasks) | ~info["fallen"]
            total += jnp.where(alive, rewards(env, tasks, obs.T), 0.0)
            return (world, alive, total, length + alive), None

        (world, alive, total, length), _ = jax.lax.scan(step, (world, alive, total, length), actions[:, :every].swapaxes(0, 1))
        return (world, memory, alive, total, length), (begun, alive)

    zeros = jnp.zeros(num, jnp.float32)
    carry = (world, memory, jnp.ones(num, bool), zeros, zeros.astype(jnp.int32))
    carry, (worlds, alive) = jax.lax.scan(round_of, carry, jax.random.split(key, steps // every))
    last = alive.sum(0)  # a humanoid that fell is shown as it was
    kept = jnp.minimum(jnp.arange(len(alive))[:, None], last)
    worlds = jax.tree.map(lambda x: jnp.take_along_axis(x, kept.reshape(len(alive), *[1] * (x.ndim - 2), num), 0), worlds)
    return Outcome(carry[3], carry[4], worlds)


def follow_plan(env, world, actions) -> tuple[jax.Array, jax.Array]:
    """Does actions (H, M, A), whatever comes -> observations after each (H, M, O), whether none has fallen till then (H, M)."""

    def step(carry, action):
        world, alive = carry
        obs, world, _, _, info = env.step_env(None, world, action.T, env.default_params)
        alive &= ~info["fallen"]
        return (world, alive), (obs.T, alive)

    return jax.lax.scan(step, (world, jnp.ones(actions.shape[1], bool)), actions)[1]


def film(env, tasks: Tasks, worlds, episodes: int, columns: int = 2) -> dict:
    """The first episode of each task (worlds of each task's `episodes` one after the other), side by side, as `tasks`
    (T, H, W, 3) uint8; nothing where a body cannot be drawn inside jit."""
    if not env.can_draw:
        return {}
    picked = jax.tree.map(lambda x: x[..., : len(tasks.which) : episodes], worlds)
    images = jax.lax.map(jax.vmap(env.render, -1), picked)
    images = jnp.pad(images, ((0, 0), (0, -len(tasks.names) % columns), (1, 1), (1, 1), (0, 0)))
    rows = [jnp.concatenate(list(images[:, i : i + columns].swapaxes(0, 1)), axis=2) for i in range(0, images.shape[1], columns)]
    return {"tasks": jnp.concatenate(rows, axis=1)}


def write_report(folder: Path, about: dict, tasks: Tasks, outcomes: list, average: dict[str, float]) -> None:
    """Prints returns, and writes them, with what `about` says, to FOLDER/plan.json, and the first seed's film.

    outcomes: of each seed, total and length (M,) and what `film` gave; average: what the average demonstration earns, by task."""
    total, length = (np.stack(x).reshape(len(outcomes), len(tasks.names), -1) for x in list(zip(*outcomes, strict=True))[:2])
    report = {}
    for i, name in enumerate(tasks.names):
        usual = average.get(name)
        report[name] = {"return": total[:, i].tolist(), "length": length[:, i].tolist(), "data": usual}
        words = "" if usual is None else f"; the average demonstration's: {usual:.1f}"
        print(f"{name:12} return {total[:, i].mean():8.1f}, {length[:, i].mean():.0f} steps{words}")
    text = json.dumps(about | {"tasks": report}, indent=1)
    write_atomically(folder / "plan.json", lambda file: file.write(text.encode()))
    for name, frames in outcomes[0][2].items():
        save_gif(folder / "videos" / f"plan_{name}.gif", frames)
    print(f"what came of it is in {folder}")


# --- planners with the true dynamics


def shaped_noise(key, shape: tuple[int, ...]) -> jax.Array:
    """Normal noise (H, ...) that is drawn every KNOTS steps and interpolated between."""
    at = np.arange(shape[0]) / KNOTS
    low, share = np.floor(at).astype(int), (at % 1).astype(np.float32).reshape(-1, *[1] * (len(shape) - 1))
    knots = jax.random.normal(key, (low[-1] + 2, *shape[1:]), jnp.float32)
    return (1 - share) * knots[low] + share * knots[low + 1]


def true_dynamics(env, tasks: Tasks, samples: int, horizon: int, every: int, sigma: float, best: bool, softness: float = 0.1):
    """A planner that simulates `samples` noisy copies of its last plan for `horizon` steps -> planner, first memory of worlds.

    best: predictive sampling (2212.00541), which keeps the best of them; else MPPI (1707.02342): their mean, weighted by
    exp(return / (softness * the returns' standard deviation)). The first copy is without noise.
    """
    num, params = len(tasks.which), env.default_params
    wide = tasks._replace(which=np.repeat(tasks.which, samples))

    def evaluate(world, plans):
        """Plans (H, M N, A) -> returns (M, N)."""

        def step(carry, action):
            world, alive, total = carry
            obs, world, _, _, info = env.step_env(None, world, action.T, params)
            alive &= may_fall(wide) | ~info["fallen"]
            return (world, alive, total + jnp.where(alive, rewards(env, wide, obs.T), 0.0)), None

        world = jax.tree.map(lambda x: x if x.ndim == 0 else x.repeat(samples, -1), world)
        carry = world, jnp.ones(num * samples, bool), jnp.zeros(num * samples, jnp.float32)
        return jax.lax.scan(step, carry, plans)[0][2].reshape(num, samples)

    def planner(key, plan, world, obs):
        noise = sigma * shaped_noise(key, (horizon, num, samples, env.num_actions)).at[:, :, 0].set(0.0)
        plans = jnp.clip(plan.swapaxes(0, 1)[:, :, None] + noise, -1, 1)  # (H, M, N, A)
        total = evaluate(world, plans.reshape(horizon, num * samples, -1))
        if best:
            weight = jax.nn.one_hot(total.argmax(1), samples, dtype=jnp.float32)
        else:
            weight = jax.nn.softmax((total - total.max(1, keepdims=True)) / (softness * total.std(1, keepdims=True) + 1e-6), axis=1)
        plan = jnp.einsum("mn,hmna->mha", weight, plans)
        rest = jnp.repeat(plan[:, -1:], every, axis=1)
        return plan, jnp.concatenate([plan[:, every:], rest], axis=1)

    first = lambda world: jnp.repeat(world.act.T[:, None], horizon, axis=1)  # its pose is held
    return planner, first
