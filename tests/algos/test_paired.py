"""PAIRED's regret, and who learns from what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algos import paired
from common.runs.config import UsageError


def test_episode_returns_against_numpy():
    rng = np.random.default_rng(0)
    reward, done = rng.random((40, 6)).astype(np.float32), rng.random((40, 6)) < 0.2
    done[:, 0] = False  # no episode ends
    mean, best = paired.episode_returns(jnp.asarray(reward), jnp.asarray(done))
    for n in range(6):
        totals, total = [], 0.0
        for r, d in zip(reward[:, n], done[:, n], strict=True):
            total += r
            if d:
                totals.append(total)
                total = 0.0
        np.testing.assert_allclose(mean[n], np.mean(totals) if totals else 0.0, rtol=1e-5)
        np.testing.assert_allclose(best[n], max(totals) if totals else 0.0, rtol=1e-5)


def test_scores_by_hand():
    mean, best = jnp.array([[0.2, 0.9], [0.5, 0.1]]), jnp.array([[0.6, 0.9], [0.8, 0.3]])
    for name, expected in {
        "relative_regret": [0.6, 0.0],
        "mean_relative_regret": [0.3, 0.0],
        "population_regret": [0.8 - 0.35, 0.9 - 0.5],
        "neg_return": [-0.35, -0.5],
    }.items():
        np.testing.assert_allclose(paired.level_score(mean, best, name), expected, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(num_students=3), "needs 2"),
        (dict(num_students=1, score="population_regret"), "at least 2"),
        (dict(teacher_lr=0.0), "positive"),
        (dict(num_walls=200), "between 0 and 167"),
    ],
)
def test_what_does_not_fit_is_refused(changes, words):
    with pytest.raises(UsageError, match=words):
        paired.Config(**changes)


def test_the_teacher_learns_to_be_paid():
    """A teacher that is paid for a wall in the first row learns to put walls there: its last step's pay reaches every action."""
    from types import SimpleNamespace

    import optax

    from common.ppo import Batch, gae, ppo_update
    from envs.maze_editor import MazeEditor

    editor = MazeEditor(num_walls=8, noise_dim=4)
    config = paired.Config(num_envs=64, num_walls=8, teacher_hidden=16)
    ppo = SimpleNamespace(num_epochs=4, num_minibatches=4, clip_eps=0.2, vf_coef=0.5, ent_coef=0.0)
    tx = optax.adam(3e-3)

    @jax.jit
    def learn(params, opt_state, key):
        traj, levels, hstate = paired.build(key, params, editor, config)
        score = levels.walls[:, 0].sum(-1).astype(jnp.float32)
        traj = traj._replace(reward=traj.reward.at[-1].set(score))
        batch = Batch(traj, *gae(traj.reward, traj.value, traj.done, jnp.zeros(64), 0.99, 0.95), hstate)
        return *ppo_update(key, paired.teacher, tx, params, opt_state, batch, ppo)[:2], score.mean()

    params = paired.init_teacher(jax.random.key(0), editor, 4, 16)
    opt_state, scores = tx.init(params), []
    for i in range(16):
        params, opt_state, score = learn(params, opt_state, jax.random.key(i))
        scores.append(float(score))
    assert scores[0] < 1.1  # by chance 8 walls / 13 rows = 0.62, with a standard error of 0.1 over the 64 levels
    assert np.mean(scores[-3:]) > 2.2
