"""SFL's success rates and its choice of levels."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algos import sfl
from common.runs.config import UsageError
from envs.maze import Level


def test_success_rate_by_hand():
    done = jnp.array([[1, 0, 1], [0, 0, 1], [1, 0, 1], [1, 0, 0]], bool)
    reward = jnp.array([[0.9, 0, 0], [0, 0, 0], [0, 0, 0.5], [0.1, 0, 0]])
    np.testing.assert_allclose(sfl.success_rate(reward, done), [2 / 3, 0, 1 / 3], atol=1e-6)


def test_learnability_is_the_variance_of_a_coin():
    np.testing.assert_allclose(sfl.learnability(jnp.array([0, 0.25, 0.5, 1.0])), [0, 0.1875, 0.25, 0], atol=1e-7)


def test_the_search_keeps_what_is_solved_sometimes(monkeypatch):
    """Levels whose success is known from their walls: of all that were tried, in every batch, the nearest to one half are kept."""
    config = dataclasses.replace(
        sfl.CPU, num_envs=4, num_steps=4, hidden=8, buffer_size=8, search_batches=3, search_levels=16, search_steps=5,
        search_every=1, num_epochs=1, num_minibatches=1, num_updates=10,
    )  # fmt: skip
    seen = []

    def play(key, params, levels: Level, num_steps, hidden):
        traj, last_value, hstate = real(key, params, levels, num_steps, hidden)
        if num_steps == 5:  # a search: ten finished episodes cannot be had in five steps, so they are made up from the walls
            walls = levels.walls.sum((1, 2))
            solved = jnp.arange(5)[:, None] < walls % 6
            traj = traj._replace(reward=solved.astype(jnp.float32), done=jnp.ones_like(solved))
            jax.debug.callback(lambda x: seen.extend(np.asarray(x).tolist()), walls)
        return traj, last_value, hstate

    real = sfl.play
    monkeypatch.setattr(sfl, "play", play)
    train = sfl.make_train(config)
    state, metrics = jax.jit(train.update)(train.init(jax.random.key(0)), jnp.int32(0))
    jax.effects_barrier()
    assert len(seen) == 48
    p = np.array(seen) % 6 / 5
    best = np.sort(p * (1 - p))[::-1][:8]
    np.testing.assert_allclose(np.sort(sfl.learnability(np.asarray(state.success)))[::-1], best, atol=1e-6)
    kept = np.asarray(state.levels.walls.sum((1, 2))) % 6 / 5
    np.testing.assert_allclose(kept, state.success, atol=1e-6)
    assert int(metrics["env_steps"]) == 4 * 4 + 48 * 5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(buffer_size=30_000), "a search plays only 25000"),
        (dict(learnable_share=1.5), "between 0 and 1"),
        (dict(search_steps=0), "at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(changes, words):
    with pytest.raises(UsageError, match=words):
        sfl.Config(**changes)
