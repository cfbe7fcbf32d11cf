"""LOLA's estimates against exact gradients of the infinite discounted game, and games of N players against two."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algos.lola import CPU, Games, Params, imagine, lola_gradient, magic_box, make_train, own, play, returns, value_error
from common.runs.config import UsageError
from envs.matrix_games import discounted_values, two_player

GAMMA = 0.8  # games of 40 steps leave out a share of 1e-4
EXACT = dataclasses.replace(CPU, gamma=GAMMA, num_steps=40, num_envs=4000, lr_imagined=0.5)


def exact(logits):
    """The returns (2,) of two policies (2, 5), logits of defecting."""
    first, second = jax.nn.sigmoid(-logits)
    return discounted_values(first, second, two_player("ipd"), GAMMA) / (1 - GAMMA)


def policies(seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(2, 5)), jnp.float32)


@pytest.fixture(scope="module")
def value():
    """A baseline that is wrong on purpose: it may cost variance, never bias."""
    return jnp.asarray(np.random.default_rng(9).normal(size=(2, 5)) - 5, jnp.float32)


def test_magic_box_differentiates_again_and_again():
    f = lambda x: magic_box(jnp.sin(x))
    x = 0.7
    assert f(x) == 1
    np.testing.assert_allclose(jax.grad(f)(x), np.cos(x), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(jax.grad(f))(x), np.cos(x) ** 2 - np.sin(x), rtol=1e-5)


def test_returns_and_their_gradient_are_those_of_the_game(value):
    logits = policies()
    games = jax.jit(partial(play, config=EXACT))(jax.random.key(0), logits)
    of = lambda x: returns(x, value, games, GAMMA)
    np.testing.assert_allclose(of(logits), exact(logits), rtol=0.01)
    np.testing.assert_allclose(jax.jit(jax.jacrev(of))(logits), jax.jacrev(exact)(logits), atol=0.06)


@pytest.mark.slow
def test_lola_differentiates_through_what_the_other_learns(value):
    """Exactly: d V_1(x_1, x_2 + lr dV_2/dx_2) / d x_1. It is far from the naive gradient here."""
    logits = policies(1)
    keys = jax.random.split(jax.random.key(1), 16)
    ours = jax.jit(jax.vmap(lambda key: lola_gradient(key, logits, value, 0, EXACT)))
    ours = np.concatenate([ours(keys[:8]), ours(keys[8:])])

    def objective(mine):
        x = logits.at[0].set(mine)
        return exact(x.at[1].add(EXACT.lr_imagined * jax.jacrev(exact)(x)[1, 1]))[0]

    wanted, naive = jax.grad(objective)(logits[0]), jax.jacrev(exact)(logits)[0, 0]
    error = 4 * ours.std(0, ddof=1) / 4 + 0.02  # 4 standard errors of 16 estimates, and the rest of the game past step 40
    assert (np.abs(ours.mean(0) - wanted) < error).all()
    assert (np.abs(naive - wanted) > 2 * error).any()


def test_only_the_others_learn_in_imagination(value):
    logits = policies(2)
    config = dataclasses.replace(EXACT, num_envs=50, num_lookaheads=2)
    after = imagine(jax.random.key(0), logits, value, 0, config)
    np.testing.assert_array_equal(after[0], logits[0])
    assert np.abs(after[1] - logits[1]).max() > 0.01
    nothing = imagine(jax.random.key(0), logits, value, 0, dataclasses.replace(config, num_lookaheads=0))
    np.testing.assert_array_equal(nothing, logits)


def test_two_players_of_the_n_player_game_are_the_two_player_game():
    """Public goods of two pays 3, 1, 0, 2 - 1 for DC, DD, CD, CC... what each gets is worked out here by hand."""
    config = dataclasses.replace(CPU, env="public_goods", num_envs=30, num_steps=20)
    games = play(jax.random.key(3), policies(), config)
    pays = {(0, 0): 2, (0, 1): 0, (1, 0): 3, (1, 1): 1}
    for i in range(2):
        mine, other = games.action[..., i], games.action[..., 1 - i]
        expected = np.vectorize(lambda a, b: pays[a, b])(mine, other)
        np.testing.assert_array_equal(games.reward[..., i], expected)
        np.testing.assert_array_equal(games.view[1:, :, i], 2 * mine[:-1] + other[:-1])


def test_baseline_learns_the_returns():
    """For a constant reward of 1 the return is (1 - gamma^n) / (1 - gamma); the best table of one state is its mean."""
    steps = 10
    games = Games(jnp.zeros((steps, 3, 2), jnp.int32), jnp.zeros((steps, 3, 2), jnp.int32), jnp.ones((steps, 3, 2)))
    mean = np.mean([(1 - 0.5**n) / 0.5 for n in range(1, steps + 1)])
    grad = jax.grad(value_error)(jnp.full((2, 5), mean), games, 0.5)
    np.testing.assert_allclose(grad, 0, atol=1e-6)
    assert np.abs(jax.grad(value_error)(jnp.full((2, 5), mean + 1), games, 0.5)[:, 0]).min() > 0.1


def test_own():
    grads = jnp.arange(2 * 2 * 3).reshape(2, 2, 3)
    np.testing.assert_array_equal(own(grads), [[0, 1, 2], [9, 10, 11]])


@pytest.mark.parametrize("num_lola", [0, 1, 3])
def test_three_players_learn(num_lola):
    config = dataclasses.replace(CPU, env="snowdrift", num_players=3, num_lola=num_lola, num_envs=4, num_steps=8)
    train = make_train(config)
    state = train.init(jax.random.key(0))
    after, metrics = jax.jit(train.update)(state, 0)
    assert isinstance(after.params, Params) and np.isfinite(after.params.logits).all()
    assert (np.abs(after.params.logits - state.params.logits).max(1) > 0.01).all()
    np.testing.assert_allclose(metrics["welfare"], np.mean([metrics[f"reward_{i}"] for i in (1, 2, 3)]), rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(num_players=3), "--num-players 3: --env ipd needs 2 to 2"),
        (dict(env="tragedy", num_players=11), "--num-players 11: --env tragedy needs 2 to 10"),
        (dict(num_lola=3), "--num-lola 3: must lie between 0 and 2"),
        (dict(gamma=1.0), "--gamma 1.0: must lie in"),
    ],
)
def test_bad_input(changes, words):
    with pytest.raises(UsageError, match=words.replace("[", r"\[")):
        dataclasses.replace(CPU, **changes)
