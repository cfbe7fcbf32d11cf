"""The evaluation suite: what is in it, and that a policy's solve rates are counted maze by maze."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs.maze import HELD_OUT, Maze, shortest_solution
from envs.maze_eval import FAMILIES, family_levels, level_results, random_walk, random_walls, suite_levels, suite_results

EPISODES = 3
SOLVE = jax.jit(jax.vmap(shortest_solution))


@pytest.fixture(scope="module")
def suite():
    return suite_levels(jax.random.key(0), EPISODES)


def test_every_maze_is_there_once_and_has_a_solution(suite):
    names = [name for part in suite for name in part.names]
    assert sorted(names) == sorted([*HELD_OUT, *FAMILIES])
    for part in suite:
        path = SOLVE(part.levels)[1]
        assert path.shape == part.limits.shape == (len(part.names) * EPISODES,)
        assert (path > 0).all() and (path < part.limits).all()


def test_the_same_key_gives_the_same_mazes(suite):
    again = suite_levels(jax.random.key(0), EPISODES)
    for a, b in zip(jax.tree.leaves([p.levels for p in suite]), jax.tree.leaves([p.levels for p in again]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_random_walls_pass_over_what_cannot_be_solved():
    family = random_walls(7, 30)
    drawn = jax.jit(jax.vmap(family.sample))(jax.random.split(jax.random.key(1), 40))
    assert (SOLVE(drawn)[1] == 0).any()  # the check is needed
    levels = family_levels(jax.random.key(1), family, 10)
    assert (SOLVE(levels)[1] > 0).all()
    with pytest.raises(ValueError, match="have a solution"):
        family_levels(jax.random.key(1), family, 10, tries=1)


def test_rates_are_each_mazes_own(suite):
    """A random walk solves some small mazes and no labyrinth."""
    rates = jax.jit(lambda key: suite_results(key, random_walk, (), lambda num: (), suite))(jax.random.key(2))
    assert set(rates) == {*HELD_OUT, *FAMILIES}
    assert all(0 <= float(rate) <= 1 and float(rate) * EPISODES % 1 < 1e-5 for rate in rates.values())
    assert rates["Random 7, 14 walls"] > 0 and rates["Labyrinth"] == 0


def test_level_results_by_hand():
    """An open room of 5 x 5 with the goal three cells away, and one whose goal is walled in."""
    env = Maze(5, 5, 0)
    level = env.sample_level(jax.random.key(0))._replace(agent_pos=jnp.array([0, 0]), goal_pos=jnp.array([3, 0]))
    walls = jnp.zeros((5, 5), bool).at[0, 2].set(True).at[1, 3].set(True).at[0, 4].set(True)
    levels = jax.tree.map(lambda *x: jnp.stack(x), level, level._replace(walls=walls))
    results = level_results(levels)
    assert results["level_walls"] == 1.5 and results["level_unsolvable"] == 0.5 and results["level_path"] == 3
