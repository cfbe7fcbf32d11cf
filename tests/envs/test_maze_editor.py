"""The maze designer's world, against a slow reference."""

import jax
import jax.numpy as jnp
import numpy as np

from envs.maze_editor import MazeEditor

SIZE, WALLS = 5, 6
EDITOR = MazeEditor(SIZE, SIZE, num_walls=WALLS, noise_dim=3)
STEP = jax.jit(EDITOR.step_env)


def build(cells, seed=0):
    """Plays a list of cells -> the last state and all (obs, done)."""
    obs, state = EDITOR.reset_env(jax.random.key(seed))
    seen = [(obs, False)]
    for i, cell in enumerate(cells):
        obs, state, reward, done, _ = STEP(jax.random.key(1000 * seed + i + 1), state, jnp.int32(cell))
        assert reward == 0
        seen.append((obs, bool(done)))
    return state, seen


def test_walls_then_goal_then_agent():
    state, seen = build([0, 1, 7, 7, 24, 13, 18, 11])  # 7 twice: nothing happens the second time
    level = EDITOR.level_of(state)
    expected = np.zeros(25, bool)
    expected[[0, 1, 7, 24, 13]] = True
    np.testing.assert_array_equal(level.walls, expected.reshape(5, 5))
    np.testing.assert_array_equal(level.goal_pos, [3, 3])
    np.testing.assert_array_equal(level.agent_pos, [1, 2])
    assert [done for _, done in seen] == [False] * 8 + [True]
    assert [int(obs.time) for obs, _ in seen] == list(range(9))


def test_goal_and_agent_remove_walls():
    level = EDITOR.level_of(build([0, 1, 2, 3, 4, 5, 2, 4])[0])
    np.testing.assert_array_equal(np.flatnonzero(level.walls), [0, 1, 3, 5])
    np.testing.assert_array_equal(level.goal_pos, [2, 0])
    np.testing.assert_array_equal(level.agent_pos, [4, 0])


def test_agent_on_goal_lands_on_a_free_cell():
    found = set()
    for seed in range(40):
        level = EDITOR.level_of(build([0, 1, 2, 3, 4, 5, 12, 12], seed)[0])
        x, y = level.agent_pos.tolist()
        assert not level.walls[y, x] and (x, y) != (2, 2)
        np.testing.assert_array_equal(level.goal_pos, [2, 2])
        np.testing.assert_array_equal(np.flatnonzero(level.walls), range(6))
        found.add((x, y))
    assert len(found) > 8


def test_observation_is_the_map_within_its_border():
    state, seen = build([6, 6, 6, 6, 6, 6, 24, 0])
    first, last = seen[0][0].image, np.asarray(seen[-1][0].image)
    assert last.shape == (7, 7, 3) and last.dtype == np.uint8
    border = np.ones((7, 7), bool)
    border[1:-1, 1:-1] = False
    assert (last[border] == [2, 5, 0]).all() and (np.asarray(first)[border] == [2, 5, 0]).all()
    assert (np.asarray(first)[~border] == [1, 0, 0]).all()
    expected = np.tile(np.array([1, 0, 0], np.uint8), (5, 5, 1))
    expected[1, 1] = [2, 5, 0]
    expected[4, 4] = [8, 1, 0]
    expected[0, 0] = [10, 0, int(state.agent_dir)]
    np.testing.assert_array_equal(last[1:-1, 1:-1], expected)


def test_noise_is_new_at_every_step_and_directions_differ():
    _, seen = build([0] * 8)
    noise = np.stack([obs.noise for obs, _ in seen])
    assert noise.min() >= 0 and noise.max() <= 1 and len(np.unique(noise)) == noise.size
    directions = {int(EDITOR.reset_env(jax.random.key(seed))[1].agent_dir) for seed in range(30)}
    assert directions == {0, 1, 2, 3}


def test_spaces_hold_what_is_observed():
    _, seen = build([0, 1, 2, 3, 4, 5, 6, 7])
    space = EDITOR.observation_space()
    for obs, _ in seen:
        for name, value in obs._asdict().items():
            assert space.spaces[name].contains(value), name
    assert EDITOR.action_space().n == EDITOR.num_actions == SIZE * SIZE and EDITOR.num_steps == WALLS + 2
