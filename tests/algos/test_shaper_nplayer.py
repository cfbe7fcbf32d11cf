"""The N-player shapers' trials against numbers worked out by hand: seats, payoffs, what is recorded, pairing, bad input."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algos import shaper_nplayer as nplayer
from algos.shaper_nplayer import CPU, Player, Side, keep, make_train, play_trial, seat_learners, seat_shapers
from common.runs.config import UsageError
from envs.matrix_games import n_player, two_player

SMALL = dataclasses.replace(
    CPU, num_updates=5, population_size=4, num_opponents=3, num_envs=2, num_episodes=3, num_steps=10, hidden=4, eval_learners=3
)


def config_of(**changes):
    return dataclasses.replace(SMALL, **changes)


def one_seat(tolerated):
    """A seat whose player defects after more than `tolerated` of the others defected; -1 always defects."""
    act = lambda weights, memory, obs: (nplayer.tit_for_tat(obs, np.float32([tolerated] * obs.shape[-1])), None, memory)
    return Side(Player(act, keep), 1, (), ())


def rewards_of(tolerances, config):
    """The mean rewards (N,) of fixed players in a trial."""
    config = dataclasses.replace(config, num_players=len(tolerances), num_shapers=0)
    outcome = play_trial(jax.random.key(0), [one_seat(x) for x in tolerances], (1, 1), config, True)
    return np.array(outcome.reward)[:, :, 0, 0], np.array(outcome.visits)[..., 0, 0]


def test_fixed_players_by_hand():
    """Public goods, an episode of 10 steps: always defects; harsh, which cooperates at START alone; always cooperates."""
    rewards, visits = rewards_of([-1, 0, 2], config_of(env="public_goods"))
    # step 1: D C C, two cooperate: C gets 2 (2 - 1) = 2, D gets 2 * 2 + 1 = 5. Then D D C: C 0, D 3.
    np.testing.assert_allclose(rewards, np.tile([(5 + 9 * 3) / 10, (2 + 9 * 3) / 10, (2 + 9 * 0) / 10], (3, 1)), rtol=1e-5)
    # states C0 C1 C2 D0 D1 D2 of each player
    expected = [[0, 0, 0, 0.1, 0.9, 0], [0, 0.1, 0, 0, 0.9, 0], [0, 0.1, 0.9, 0, 0, 0]]
    np.testing.assert_allclose(visits, np.tile(expected, (3, 1, 1)), atol=1e-6)


@pytest.mark.parametrize("env", ["public_goods", "snowdrift", "stag_hunt", "tragedy"])
def test_permuting_players_permutes_rewards(env):
    config, players = config_of(env=env, num_episodes=1), [-1, 0, 3, 1.5]
    rewards, _ = rewards_of(players, config)
    order = [2, 0, 3, 1]
    permuted, _ = rewards_of([players[i] for i in order], config)
    np.testing.assert_allclose(permuted, rewards[:, order], rtol=1e-5)
    assert np.ptp(rewards) > 0.1


def test_two_players_play_the_prisoners_dilemma():
    """With two players the public-goods game is the iterated prisoner's dilemma 3 higher, and learners end in its defection."""
    np.testing.assert_array_equal(n_player("public_goods", 2), two_player("ipd") + 3)
    config = dataclasses.replace(CPU, env="public_goods", num_players=2, lr=1.0, num_episodes=20, eval_learners=32)
    reward = np.array(jax.jit(partial(nplayer.learners_alone, config=config))(jax.random.key(0)).reward)
    assert reward.shape == (20, 2, 1, 32)
    assert abs(reward[0].mean() - 1.5) < 0.05  # uniform play: (2 + 0 + 3 + 1) / 4
    ends = reward[-3:].mean((0, 1, 2))
    assert np.median(ends) < 1.1 and ends.mean() < 1.3


def test_record_of_an_episode():
    """Observation, action and reward of one step belong together (the authors' code shifts them), as a seat sees them."""
    config, records = config_of(env="public_goods", num_shapers=0, num_episodes=1), []
    (learner,) = seat_learners(jax.random.key(1), 1, 1, 3, config)

    def end(key, weights, memory, episode):
        records.append(jax.tree.map(np.array, episode))
        return weights, memory

    sides = [one_seat(-1), one_seat(1.0), learner._replace(player=learner.player._replace(end=end))]
    with jax.disable_jit():  # so that the record can be looked at from outside
        play_trial(jax.random.key(0), sides, (1, 3), config)
    (episode,) = records
    seen = episode.obs.argmax(2)  # (T, E, M): own action, then clockwise seat 0 and seat 1
    assert (seen[0] == 8).all() and (seen[1:] != 8).all(), "START comes first and only first"
    own, first, second = seen[1:] // 4, seen[1:] // 2 % 2, seen[1:] % 2
    np.testing.assert_array_equal(own, episode.action[:-1])
    np.testing.assert_array_equal(first, 1)  # always defects
    np.testing.assert_array_equal(second[1:], own[:-1])  # bears one defector, so it does as this learner did
    cooperators = 3 - own - first - second
    np.testing.assert_array_equal(episode.reward[:-1], np.where(own == 1, 2 * cooperators + 1, 2 * (cooperators - 1)))
    assert 0 < own.mean() < 1


def random_population(config, members, seed=0):
    """Random weights (S, P, ...) whose rows are copies of a few members, as numbered by `members` (S, P)."""
    rng = np.random.default_rng(seed)
    count = np.max(members) + 1
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=(count, *x.shape)), jnp.float32)[np.array(members)], nplayer.zero_policy(config)
    )


def test_chance_is_common_and_index_pairs():
    """Trials of equal shapers are equal; a member meets those of its own number in the other populations."""
    config = config_of(num_players=3, num_shapers=2, env="public_goods")
    population = random_population(config, [[0, 0, 0, 1], [2, 2, 3, 2]])

    @jax.jit
    def play(population):
        sides = [seat_shapers(population, 3, config), *seat_learners(jax.random.key(1), 1, 4, 3, config)]
        return play_trial(jax.random.key(0), sides, (4, 3), config).reward

    reward = np.array(play(population))  # (K, N, P, O)
    assert reward.shape == (3, 3, 4, 3) and np.isfinite(reward).all()
    np.testing.assert_allclose(reward[:, :, 0], reward[:, :, 1], atol=1e-5)
    assert np.abs(reward[:, :, 0] - reward[:, :, 2]).max() > 1e-3, "the second shaper is another"
    assert np.abs(reward[:, :, 0] - reward[:, :, 3]).max() > 1e-3, "the first shaper is another"
    assert np.abs(reward[..., 0] - reward[..., 1]).max() > 1e-3, "the groups of learners do the same"


def test_pairing():
    """By number, or with --repair by a permutation of its own for each shaper; fitness goes back to its owner."""
    config = config_of(num_shapers=2, population_size=16)
    np.testing.assert_array_equal(nplayer.pairing(jax.random.key(0), config), [np.arange(16)] * 2)
    order = np.array(nplayer.pairing(jax.random.key(0), dataclasses.replace(config, repair=True)))
    assert (np.sort(order) == np.arange(16)).all() and not np.array_equal(*order)
    owners = nplayer.rows(jnp.tile(jnp.arange(16), (2, 1)), order)
    np.testing.assert_array_equal(nplayer.rows(owners, jnp.argsort(jnp.asarray(order))), [np.arange(16)] * 2)


@pytest.mark.parametrize("num_shapers", [0, 2, 3])
def test_any_number_of_shapers(num_shapers):
    """Learners alone, a mixture and shapers alone: an update and an evaluation give a reward for each player.

    A wide search, so that tiny policies act unlike one another.
    """
    config = config_of(sigma=1.0, num_shapers=num_shapers, repair=num_shapers > 1, learner="gru", learner_hidden=3)
    train = make_train(config)
    state, metrics = jax.jit(train.update)(jax.jit(train.init)(jax.random.key(0)), jnp.int32(0))
    results = jax.jit(train.evaluate)(state)
    for name in config.names:
        assert np.isfinite(metrics[name]) and np.isfinite(results[f"eval_{name}"])
    assert len(config.names) == 3 and all(np.isfinite(x).all() for x in results.values())
    welfare = np.mean([results[f"eval_{name}"] for name in config.names])
    np.testing.assert_allclose(results["eval_welfare"], welfare, rtol=1e-5)
    assert ("tft_harsh_welfare" in results) == (num_shapers > 0)
    if num_shapers:
        assert state.params.any() and not np.array_equal(state.params[0], state.params[1])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(num_players=1), "--num-players 1: must lie between 2 and 10"),
        (dict(num_players=11), "--num-players 11: must lie between 2 and 10"),
        (dict(num_shapers=4), "--num-shapers 4: must lie between 0 and the number of players, 3"),
        (dict(num_shapers=-1), "--num-shapers -1: must lie between 0"),
        (dict(population_size=5), "--population-size 5: must be even"),
        (dict(num_minibatches=7), "--num-minibatches 7: must divide num-envs x num-steps, 20"),
        (dict(repair=True), "--repair: --num-shapers 1"),
        (dict(lr=0.0), "--lr 0.0: must be positive"),
    ],
)
def test_bad_settings(changes, words):
    with pytest.raises(UsageError) as refusal:
        config_of(**changes)
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


def test_unknown_game(capsys):
    with pytest.raises(SystemExit):
        nplayer.cli(nplayer.Config, nplayer.__doc__, nplayer.PRESETS, ["--env", "chess"])
    printed = capsys.readouterr().err
    assert "snowdrift" in printed and printed.count("\n") == 1
