"""How well a policy does in mazes it was not trained on: the evaluation that the maze methods share.

A policy is a function as in common/ppo.py. Actions are sampled; a maze is solved in an episode whose reward is positive; time
limits are each maze's own, as in minimax (2311.12716).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common.ppo import play_episodes
from envs.maze import (
    HELD_OUT,
    EnvParams,
    Level,
    Maze,
    crossing,
    embed,
    fixed_levels,
    four_rooms,
    held_out_levels,
    perfect_maze,
    shortest_solution,
)

FILM_STEPS = 250


def play_mazes(key, policy, params, hstate, levels: Level, limits, film: int = 0):
    """One episode on each level (N, ...), at most limits (N,) steps long -> solved (N,) bool, and the poses in episode `film`.

    `hstate` (N, ...) is the policy's first recurrent state; poses: position (T, 2) and direction (T,) after every step.
    """
    env, env_params = Maze(), EnvParams(jnp.asarray(limits))

    def reset():
        state = jax.vmap(env.reset_to_level)(levels, env_params)
        return jax.vmap(env.get_obs)(state), state

    def step(key, state, action):
        obs, state, reward, terminated, _ = jax.vmap(partial(env.step_env, key))(state, action, env_params)
        return obs, state, reward, terminated | env.is_truncated(state, env_params)

    def pose(state):
        return state.agent_pos[film], state.agent_dir[film]

    episodes = play_episodes(key, policy, params, reset, step, hstate, int(np.max(limits)), pose)
    return episodes.total_reward > 0, episodes.record


def random_walk(params, obs, reset, hstate):
    """A policy that turns and walks at random and never idles."""
    logits = jnp.float32([0, 0, 0, -jnp.inf, -jnp.inf, -jnp.inf, -jnp.inf])
    return jnp.broadcast_to(logits, (*reset.shape, 7)), jnp.zeros(reset.shape, jnp.float32), hstate


def held_out_results(key, policy, params, init_hstate, episodes: int) -> dict:
    """`episodes` episodes on each of the ten fixed mazes.

    -> heldout_solve_rate (the mean over mazes), solve/MAZE, random_walk_solve_rate (of `random_walk` on the same starts), and
    labyrinth (T, H, W, 3) uint8, the first episode there. `init_hstate(n)` gives the recurrent state of n environments.
    """
    names = list(HELD_OUT)
    key_levels, key_play, key_walk = jax.random.split(key, 3)
    levels, limits = held_out_levels(key_levels, names, episodes)
    levels = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), levels)
    limits, film = np.repeat(limits, episodes), names.index("Labyrinth") * episodes
    hstate = init_hstate(len(limits))
    solved, (pos, direction) = play_mazes(key_play, policy, params, hstate, levels, limits, film)
    walked, _ = play_mazes(key_walk, random_walk, (), (), levels, limits)
    rates = solved.reshape(len(names), episodes).mean(1)
    return {
        "heldout_solve_rate": rates.mean(),
        "random_walk_solve_rate": walked.mean(),
        **{f"solve/{name}": rates[i] for i, name in enumerate(names)},
        "labyrinth": film_of("Labyrinth", pos[:FILM_STEPS], direction[:FILM_STEPS]),
    }


def level_results(levels: Level) -> dict:
    """How hard levels (N, ...) are: their walls, the cells of the shortest way where there is one, the share without one."""
    _, path = jax.vmap(shortest_solution)(levels)
    return {
        "level_walls": levels.walls.sum((1, 2)).mean(dtype=jnp.float32),
        "level_path": path.sum().astype(jnp.float32) / jnp.maximum((path > 0).sum(), 1),
        "level_unsolvable": (path == 0).mean(),
    }


def film_of(name: str, pos, direction) -> jax.Array:
    """The poses of an agent drawn into a fixed maze: (T, H, W, 3) uint8."""
    level = jax.tree.map(lambda x: x[0], fixed_levels([name])[0])
    frame = lambda pos, direction: Maze().render(level._replace(agent_pos=pos, agent_dir=direction))
    return jax.vmap(frame)(pos, direction)


def picture_of(levels: Level) -> jax.Array:
    """Levels (N, ...) drawn side by side: (H, N W, 3) uint8."""
    return jnp.concatenate(list(jax.vmap(Maze().render)(levels)), axis=1)


# --- the suite: every named maze, and families of mazes at several sizes


class Family(NamedTuple):
    """Mazes that are drawn: how, and how long an episode may be."""

    sample: Callable  # key -> Level
    size: int
    time_limit: int
    needs_check: bool = False  # some that are drawn have no solution: they are passed over


def random_walls(size: int, num_walls: int) -> Family:
    """Mazes of random walls, as in training, that have a solution."""
    return Family(Maze(size, size, num_walls).sample_level, size, 2 * (size + 2) ** 2, needs_check=True)


FAMILIES = {
    "FourRooms": Family(four_rooms, 17, 250),
    "Crossing": Family(crossing, 9, 4 * 11**2),
    "PerfectMaze 7": Family(partial(perfect_maze, size=7), 7, 2 * 9**2),
    "PerfectMaze 13": Family(perfect_maze, 13, 2 * 15**2),
    "PerfectMaze 19": Family(partial(perfect_maze, size=19), 19, 2 * 21**2),
    "Random 7, 14 walls": random_walls(7, 14),
    "Random 13, 25 walls": random_walls(13, 25),
    "Random 13, 60 walls": random_walls(13, 60),
    "Random 19, 120 walls": random_walls(19, 120),
}


def family_levels(key, family: Family, num: int, tries: int = 4) -> Level:
    """`num` mazes of a family (num, ...). Raises ValueError if of tries x num that are drawn too few have a solution."""
    levels = jax.jit(jax.vmap(family.sample))(jax.random.split(key, tries * num if family.needs_check else num))
    if not family.needs_check:
        return levels
    solvable = np.flatnonzero(jax.jit(jax.vmap(shortest_solution))(levels)[1] > 0)
    if len(solvable) < num:
        raise ValueError(f"only {len(solvable)} of {tries * num} mazes have a solution")
    return jax.tree.map(lambda x: x[solvable[:num]], levels)


class SuitePart(NamedTuple):
    """Mazes of the suite that are played side by side, on maps of one size."""

    names: list[str]
    levels: Level  # (len(names) * episodes, ...)
    limits: np.ndarray  # (len(names) * episodes,)


def suite_levels(key, episodes: int) -> list[SuitePart]:
    """`episodes` mazes of every name in HELD_OUT and FAMILIES, in two parts, so that short mazes do not wait for the long ones."""
    key_named, key_families = jax.random.split(key)
    named, limits = held_out_levels(key_named, list(HELD_OUT), episodes)
    named = jax.device_get(named)
    mazes = {name: (jax.tree.map(lambda x, i=i: x[i], named), int(limits[i])) for i, name in enumerate(HELD_OUT)}
    for i, (name, family) in enumerate(FAMILIES.items()):
        mazes[name] = family_levels(jax.random.fold_in(key_families, i), family, episodes), family.time_limit
    return [_part({name: maze for name, maze in mazes.items() if (maze[1] > 500) == long}, episodes) for long in (False, True)]


def _part(mazes: dict, episodes: int) -> SuitePart:
    size = max(levels.walls.shape[-1] for levels, _ in mazes.values())
    grow = jax.jit(jax.vmap(partial(embed, height=size, width=size)))
    levels = jax.tree.map(lambda *x: np.concatenate(x), *(jax.device_get(grow(levels)) for levels, _ in mazes.values()))
    return SuitePart(list(mazes), levels, np.repeat([limit for _, limit in mazes.values()], episodes))


def suite_results(key, policy, params, init_hstate, suite: list[SuitePart]) -> dict:
    """Solve rates on every maze of a suite, one episode on each of its levels. `init_hstate(n)`: as for `held_out_results`."""
    rates = {}
    for part in suite:
        levels = jax.tree.map(jnp.asarray, part.levels)
        solved, _ = play_mazes(key, policy, params, init_hstate(len(part.limits)), levels, part.limits)
        rates |= dict(zip(part.names, solved.reshape(len(part.names), -1).mean(1), strict=True))
    return rates
