"""TiZero's joint ratio, ladder, rewards and league, each against numbers worked out another way."""

import os
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sizes import tiny

from algos import tizero
from algos.tizero import (
    CPU,
    LADDER,
    TOP,
    WHOLE_TEAMS,
    TeamStep,
    begin_levels,
    draw_rivals,
    init_critic,
    keep_checkpoint,
    keep_score,
    learn_from,
    make_train,
    opponent_weights,
    surrogate,
    team_reward,
)
from common.runs.config import UsageError
from envs.football import Football
from envs.football_bots import BOTS
from envs.football_state import KICK_OFF
from envs.football_team import init_team, load_league

SMALL = replace(
    CPU, num_seeds=1, num_updates=8, num_matches=64, num_groups=16, horizon=4, num_minibatches=2, hidden=8, league_size=4,
    log_every=1, eval_every=8, save_every=8, eval_matches=2, film_steps=3, final_matches=2, match_steps=20,
)  # fmt: skip
ENV = Football(max_steps_in_episode=128)


def state_of(config=SMALL, **changes):
    return make_train(config).init(jax.random.key(0))._replace(**changes)


# --- the joint ratio


def slow_surrogate(log_ratio, adv, active, eps, joint):
    """One sample and one player after another."""
    losses, clipped = [], []
    for b in range(adv.size):
        mine = [float(log_ratio[i, b]) for i in range(10) if active[i, b]]
        ratios = [np.exp(sum(mine))] if joint else [np.exp(x) for x in mine]
        clip = [min(max(r, 1 - eps), 1 + eps) for r in ratios]
        losses.append(-np.mean([min(r * adv[b], c * adv[b]) for r, c in zip(ratios, clip, strict=True)]))
        clipped.append(np.mean([abs(r - 1) > eps for r in ratios]))
    return np.mean(losses), np.mean(clipped)


@pytest.mark.parametrize("joint", [True, False])
def test_surrogate_is_the_papers(joint):
    rng = np.random.default_rng(0)
    log_ratio, adv = rng.normal(size=(10, 200)) * 0.1, rng.normal(size=200)
    active = rng.random((10, 200)) < 0.6
    active[0] = True
    slow = slow_surrogate(log_ratio, adv, active, 0.2, joint)
    loss, clipped = surrogate(jnp.asarray(log_ratio), jnp.asarray(adv), jnp.asarray(active), 0.2, joint)
    np.testing.assert_allclose([loss, clipped], slow, rtol=1e-4)


def test_the_joint_ratio_clips_what_players_do_together():
    """Ten players by 1.05 each are 1.63 together: without gradient where the advantage is positive, though none is beyond 1.2."""
    log_ratio, on = jnp.full((10, 1), np.log(1.05)), jnp.ones((10, 1), bool)
    slope = jax.grad(lambda x, joint: surrogate(x, jnp.ones(1), on, 0.2, joint)[0])
    assert (slope(log_ratio, True) == 0).all() and (slope(log_ratio, False) < 0).all()


@pytest.mark.parametrize("ratio", ["joint", "independent"])
def test_learning_makes_a_good_action_likelier(ratio):
    """Action 5 pays at once, all others nothing."""
    config = replace(SMALL, ratio=ratio, horizon=16, num_minibatches=4, gamma=0.0, ent_coef=0.0)
    rng, shape = np.random.default_rng(0), (16, 10, 32)
    action = rng.integers(0, 9, shape).astype(np.int8)
    ones, whole, own = np.ones(shape, bool), rng.normal(size=(16, 126, 32)), rng.normal(size=(16, 43, 10, 32)) + 0.5
    actor = init_team(jax.random.key(0), 8)
    params = {"actor": actor, "critic": init_critic(jax.random.key(1), 8)}
    log_prob = np.full(shape, -np.log(11.0))
    reward, zero = (action == 5).sum(1) / 10.0, np.zeros((16, 32))
    steps = TeamStep(whole, own, ones, np.zeros((16, 3, 32)), action, log_prob, zero, reward, zero > 0)
    steps = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32 if x.dtype == float else x.dtype), steps)
    likely = lambda actor: float(jax.nn.softmax(tizero.apply_team(actor, steps.whole[0], steps.own[0]), 0)[5].mean())
    tx = optax.adam(1e-2)
    new, _, _ = learn_from(jax.random.key(2), config, tx, 0.0, params, tx.init(params), steps, jnp.zeros(32))
    assert likely(new["actor"]) > likely(actor) + 0.01


# --- the ladder


def test_levels_are_those_of_their_rungs():
    rung = jnp.repeat(jnp.arange(len(LADDER)), 100)
    state = begin_levels(jax.random.key(0), ENV, rung)
    for place, row in enumerate(LADDER):
        here = np.asarray(rung) == place
        active, x, y = (np.asarray(v)[..., here] for v in (state.active, state.x, state.y))
        assert (active[0, 1:].sum(0) == row.attackers).all() and (active[1, 1:].sum(0) == row.defenders).all()
        assert active[0, 0].all() and (active[1, 0] == row.keeper).all()
        ball, kick_off = np.asarray(state.ball)[0, here] / 54.4, np.asarray(state.mode)[here] == KICK_OFF
        assert kick_off.mean() == (pytest.approx(0.2, abs=0.12) if place >= WHOLE_TEAMS else 0)
        assert (ball >= row.ball_from - 1e-5)[~kick_off].all() and (ball <= row.ball_to + 1e-5).all()
        assert (np.abs(x[active]) <= 55).all() and (np.abs(y[active]) <= 36).all()
        if row.attackers < 10:
            assert (np.abs(x[0, 1 : row.attackers + 1] / 54.4 - ball) < 0.3).all()
    assert np.asarray(state.x)[0, 1, np.asarray(rung) == TOP].std() > 10, "large teams' levels are all alike"


def score(config, state, won, lost, t=0):
    """A rollout of which each match ended one level, and these shares were won and lost."""
    num = config.num_matches
    count = np.stack([np.ones(num), np.arange(num) < won * num, np.arange(num) >= (1 - lost) * num]).astype(np.int32)
    slot = jnp.full(config.num_groups, -1)
    return keep_score(config, state, jnp.full(num, state.rung), jnp.zeros(num, bool), slot, jnp.asarray(count), jnp.int32(t))[0]


def test_a_rung_is_left_when_it_is_mastered_or_its_time_is_over():
    config = replace(SMALL, num_updates=4000, climb_at=0.6, ladder_share=0.4)
    good = state_of(config, rates=jnp.array([0.9, 0.0]))
    assert score(config, good, 0.9, 0.0).rung == 1
    assert (score(config, good, 0.9, 0.0).rates == 0).all(), "the next rung begins with its own means"
    weak = state_of(config)
    assert score(config, weak, 0.5, 0.0).rung == 0  # a running mean: one good update is not enough
    beaten = state_of(config, rates=jnp.array([0.5, 0.45]), rung=jnp.int32(3))
    assert score(config, beaten, 0.5, 0.45).rung == 3  # many goals, but too many of the others
    assert score(config, weak, 0.0, 0.0, t=1599).rung == TOP
    assert score(config, weak, 0.0, 0.0, t=800).rung == TOP // 2
    assert score(config, state_of(config, rung=jnp.int32(TOP)), 1.0, 0.0).rung == TOP


# --- rewards


def info_of(**true):
    info = {name: np.zeros((2, 1), bool) for name in ("goal", "completed", "owned")}
    for name, side in true.items():
        info[name][side] = True
    return {name: jnp.asarray(x) for name, x in info.items()}


def test_rewards_are_the_teams_difference():
    state = begin_levels(jax.random.key(0), ENV, jnp.array([0]))  # three attackers and a keeper on the left, nobody on the right
    x, y = state.x.at[0, 1:4, 0].set(jnp.array([0.0, 2.0, 6.0])), state.y.at[0, 1:4, 0].set(0.0)
    state, none = state._replace(x=x, y=y), jnp.zeros((2, 1))
    config = replace(SMALL, checkpoint_coef=0.5, pass_coef=0.1, hold_coef=0.01, crowd_coef=1.0, out_coef=0.2)
    crowd = -0.2  # two pairs are within 5 m, one is not
    reward = lambda rings=none, **true: float(team_reward(config, state, info_of(**true), rings)[0])
    assert reward() == pytest.approx(crowd)
    assert reward(goal=0) == pytest.approx(crowd + 1) and reward(goal=1) == pytest.approx(crowd - 1)
    assert reward(completed=0, owned=1) == pytest.approx(crowd + 0.1 - 0.01)
    waits = team_reward(config, state._replace(mode=jnp.full(1, 4)), info_of(owned=1), none)
    assert float(waits[0]) == pytest.approx(crowd)  # the ball is out of play
    off = team_reward(config, state._replace(x=state.x.at[0, 3].set(56.0)), info_of(), none)
    assert float(off[0]) == pytest.approx(-0.1 - 0.2)  # one pair fewer; one player beyond the right end
    assert reward(jnp.array([[0.1], [0.3]])) == pytest.approx(crowd - 0.1)


# --- the league


def test_opponents_are_drawn_evenly_then_by_how_hard_they_are():
    born, points = jnp.array([2, 4, 0, 0]), jnp.array([0.9, 0.4, 0.5, 0.5])
    np.testing.assert_allclose(opponent_weights(born, points, False), [1, 1, 0, 0])
    np.testing.assert_allclose(opponent_weights(born, points, True), [0.01, 0.36, 0, 0], rtol=1e-5)


def drawn(config, state, t, times=200):
    draw = jax.vmap(lambda key: draw_rivals(key, config, state, t))
    return draw(jax.random.split(jax.random.key(0), times))


def test_rivals_come_from_where_they_should():
    config = replace(SMALL, newest_share=0.8, bot_share=0.25, newest_rung=0.5, generalise_from=0.5)
    league = jax.tree.map(lambda x: jnp.stack([0 * x + 1, 0 * x + 2, 0 * x + 3, 0 * x + 4]), state_of().params["actor"])
    state = state_of(config, rung=jnp.int32(TOP), born=jnp.array([2, 4, 0, 0]), league_params=league)
    state = state._replace(points=jnp.array([0.9, 0.4, 0.5, 0.5]))
    rung, rivals, slot = drawn(config, state, 0)
    assert (slot == -1).mean() == pytest.approx(0.8, abs=0.03)
    assert (slot == 0).mean() == pytest.approx(0.1, abs=0.03) and not (slot >= 2).any()
    where = rivals.teams.whole[..., 0, 0]
    assert (where[slot == 1] == 2).all() and (where[slot == -1] == state.params["actor"].whole[0, 0]).all()
    assert (rung == TOP).mean() == pytest.approx(0.5 + 0.5 / (len(LADDER) - WHOLE_TEAMS), abs=0.03)
    assert rung.min() == WHOLE_TEAMS, "at the top only whole teams play"
    assert rivals.is_team[rung == TOP].mean() == pytest.approx(0.75, abs=0.03) and not rivals.is_team[rung < TOP].any()
    easy = np.isclose(rivals.bots.skill, BOTS["easy"].skill)
    assert not easy[rung == TOP].any()
    for place, row in list(enumerate(LADDER[:TOP]))[WHOLE_TEAMS:]:
        assert np.allclose(rivals.bots.skill[rung == place], BOTS[row.bot].skill)
    _, _, slot = drawn(config, state, config.num_updates - 1)  # generalise
    old = slot[slot >= 0]
    assert (slot == -1).mean() == pytest.approx(0.2, abs=0.03)
    assert (old == 1).mean() == pytest.approx(0.36 / 0.37, abs=0.03)
    _, _, slot = drawn(config, state_of(config, rung=jnp.int32(TOP)), 0)
    assert (slot == -1).all(), "nobody is in the league yet"


def test_points_against_a_checkpoint_follow_its_matches():
    config = replace(SMALL, num_matches=8, num_groups=4)
    slot, is_team = jnp.array([1, -1, 1, 2]), jnp.array([1, 1, 1, 1, 1, 0, 0, 0], bool)
    count = jnp.array([[2, 1, 9, 9, 1, 5, 5, 5], [1, 1, 0, 0, 0, 5, 5, 5], [0, 0, 9, 9, 0, 0, 0, 0]])
    state = state_of(config, points=jnp.full(4, 0.5))
    new, _ = keep_score(config, state, jnp.full(8, TOP), is_team, slot, count, jnp.int32(0))
    # of four levels two were won, and two had no goal; the other's were against bots
    np.testing.assert_allclose(new.points, [0.5, 0.9 * 0.5 + 0.1, 0.5, 0.5], rtol=1e-5)


def test_checkpoints_join_the_league_at_equal_distances():
    state, joined = state_of(), []
    for t in range(SMALL.num_updates):
        params = jax.tree.map(lambda x, t=t: jnp.full_like(x, t), state.params)
        state = keep_checkpoint(SMALL, state._replace(params=params), t)
        joined.append(np.asarray(state.born).tolist())
    assert joined[0] == [0, 0, 0, 0] and joined[1] == [2, 0, 0, 0] and joined[-1] == [2, 4, 6, 8]
    np.testing.assert_array_equal(state.league_params.last_bias[:, 0], [1, 3, 5, 7])


# --- a run


@pytest.mark.slow
def test_a_run_leaves_its_league_and_says_how_matches_ended(tmp_path, monkeypatch, capsys):
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", "none")
    changes = dict(out=str(tmp_path / "run"), cache=cache, seed=3, final_matches=2, match_steps=20)
    config = replace(tiny("tizero")[1], **changes)
    monkeypatch.setattr("sys.argv", ["tizero"])
    tizero.main(config)
    teams, names = load_league(tmp_path / "run" / "league.npz")
    assert names == ["update 2", "update 4"] and teams.whole.shape == (2, 8, 126)
    newest = np.load(tmp_path / "run" / "checkpoints" / "00000004.npz")["params/actor/whole"][0]
    np.testing.assert_allclose(teams.whole[-1], newest, rtol=1e-3, atol=1e-6)
    assert "2 whole matches against the hard bot" in capsys.readouterr().out
    table = np.load(tmp_path / "run" / "arrays" / "league_table.npy")[0]
    np.testing.assert_allclose((table + table.T)[~np.eye(2, dtype=bool)], 1.0)
    assert np.isnan(np.diag(table)).all()
    assert tizero.command_of(config) == (
        "python algos/tizero.py --preset cpu --seed 3 --num-seeds 2 --num-updates 4 --log-every 2 --eval-every 4 --save-every 2 "
        "--num-matches 8 --horizon 8 --hidden 8 --num-epochs 1 --num-minibatches 2 --num-groups 2 --league-size 2 --eval-matches 2 "
        "--film-steps 3 --final-matches 2 --match-steps 20"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(num_updates=10), "--num-updates 10: must be a multiple of --league-size"),
        (dict(num_matches=60), "--num-matches 60: must be a multiple of --num-groups"),
        (dict(horizon=5), "--horizon 5: must be a multiple of --num-minibatches"),
        (dict(bot_share=1.5), "--bot-share 1.5: must lie between 0 and 1"),
        (dict(ladder_share=0.0), "--ladder-share 0: must be positive"),
        (dict(final_matches=-1), "--final-matches -1: must not be negative"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes, words):
    with pytest.raises(UsageError, match=words):
        replace(SMALL, **changes)
