"""A football team's network and a league's file, against what they are made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.runs.checkpoint import read_meta, save
from common.runs.config import UsageError
from envs.football import Football, FootballParams
from envs.football_state import DRIBBLE, HIGH, LONG, SHORT, SHOT, SLIDE, SPRINT, STOP, STOP_DRIBBLE, STOP_SPRINT
from envs.football_team import (
    Team,
    init_team,
    legal_actions,
    load_league,
    match_actions,
    sample_actions,
    save_league,
    shipped_league,
    team_actions,
    team_logits,
    views,
)

ENV, PARAMS = Football(), FootballParams()
KICKS = {LONG, HIGH, SHORT, SHOT}


def team(hidden=8, seed=0):
    """Random parameters, none of them zero."""
    like = init_team(jax.random.key(seed), hidden)
    rng = np.random.default_rng(seed)
    return Team(*(jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in like))


def level(seed=0, batch=()):
    return ENV.reset_to_level(ENV.sample_level(jax.random.key(seed), batch))


def with_ball(state, side, player):
    """`player` of a team (0 left, 1 right) has the ball."""
    return state._replace(owner=state.owner.at[side, player].set(True))


# --- the network


def test_logits_are_those_of_a_plain_network_over_the_worlds_observations():
    params, state = team(), with_ball(level(), 0, 4)
    obs = np.delete(np.asarray(ENV.get_obs(state, PARAMS)), (126, 127), 1)  # (20, 169), without score and clock
    first = np.tanh(obs @ np.concatenate([params.whole, params.own], 1).T + params.first_bias)
    plain = np.tanh(first @ params.hidden.T + params.hidden_bias) @ params.last.T + params.last_bias
    for side in (0, 1):
        logits = np.asarray(team_logits(params, state, side))
        legal = np.asarray(legal_actions(*views(state, side))).T
        assert legal.any(1).all() and not legal.all()
        np.testing.assert_allclose(logits[legal], plain[10 * side : 10 * side + 10][legal], rtol=1e-4, atol=1e-4)
        assert (logits[~legal] < -1e8).all()


def test_matches_side_by_side_are_matches_alone():
    params, many = team(), level(1, (2, 3))
    logits = team_logits(params, many, 1)
    assert logits.shape == (10, 19, 2, 3)
    alone = team_logits(params, jax.tree.map(lambda x: x[..., 1, 2], many), 1)
    np.testing.assert_allclose(logits[..., 1, 2], alone, rtol=1e-4, atol=1e-4)
    actions = team_actions(jax.random.key(0), params, many, 1)
    assert actions.shape == (10, 2, 3) and actions.dtype == jnp.int32


def test_two_teams_at_once_act_as_each_alone():
    pairing = [team(seed=seed)._replace(last=1e4 * team(seed=seed).last) for seed in (0, 5)]  # sure of what they do
    many = level(1, (64,))
    both = match_actions(jax.random.key(0), *pairing, many)
    alone = [team_actions(jax.random.key(1), one, many, side) for side, one in enumerate(pairing)]
    assert both.shape == (20, 64) and (alone[0] != alone[1]).any()
    assert (both == jnp.concatenate(alone)).mean() > 0.99  # but where two logits are equal to rounding


def test_the_right_team_sees_what_the_left_would_in_the_turned_world():
    params, spots = team(), ENV.sample_level(jax.random.key(3)).reshape(21, 2)
    turned = jnp.concatenate([-spots[10:20], -spots[:10], -spots[20:]])
    here, there = (ENV.reset_to_level(x.reshape(42)) for x in (spots, turned))
    np.testing.assert_allclose(team_logits(params, here, 0), team_logits(params, there, 1), rtol=1e-4, atol=1e-4)


def test_initial_actions_are_about_equally_likely():
    logits = np.asarray(team_logits(init_team(jax.random.key(0), 16), level()))
    legal = logits > -1e8
    assert np.abs(logits[legal]).max() < 0.2


# --- what is legal


def legal_of(state, side, player):
    return set(np.flatnonzero(legal_actions(*views(state, side))[:, player - 1]))


def test_legal_actions():
    state = with_ball(level(), 0, 4)
    runs = set(range(9))
    assert legal_of(state, 0, 4) == runs | KICKS | {SPRINT, DRIBBLE}
    assert legal_of(state, 0, 5) == runs | {SPRINT}
    beside = lambda gap: state._replace(x=state.x.at[1, 5].set(state.ball[0] + gap), y=state.y.at[1, 5].set(state.ball[1]))
    near = beside(2.0)
    assert legal_of(beside(4.0), 1, 5) == runs | {SPRINT}
    assert legal_of(near, 1, 5) == runs | {SPRINT, SLIDE} and SLIDE not in legal_of(near, 0, 5)
    for changes in (dict(mode=jnp.int32(1)), dict(stun=near.stun.at[1, 5].set(3))):
        assert SLIDE not in legal_of(near._replace(**changes), 1, 5)
    kicking = state._replace(kick=jnp.int32(SHOT))
    assert not KICKS & legal_of(kicking, 0, 4)
    on = state.sprint.at[0, 4].set(True)
    moving = state._replace(sprint=on, dribble=on, stick_y=state.stick_y.at[0, 4].set(-1.0))
    assert legal_of(moving, 0, 4) == runs | KICKS | {STOP, STOP_SPRINT, STOP_DRIBBLE}


def test_what_the_world_ignores_is_not_legal():
    """Player 7, without the ball, moves on as if he idled, whatever kick he asks for."""
    state, step = with_ball(level(2), 0, 4), jax.jit(ENV.step_env)
    idle = jnp.zeros(20, jnp.int32)
    _, after, *_ = step(jax.random.key(1), state, idle, PARAMS)
    for action in (*KICKS, STOP, STOP_SPRINT, STOP_DRIBBLE):
        assert action not in legal_of(state, 0, 7)
        _, other, *_ = step(jax.random.key(1), state, idle.at[6].set(action), PARAMS)
        jax.tree.map(np.testing.assert_array_equal, after, other)


def test_actions_are_drawn_as_the_logits_say():
    row = np.linspace(-1, 2, 19)
    row[[3, 0, 18]] = [-1e9, 1.0, -1e9]
    logits = jnp.broadcast_to(jnp.asarray(row, jnp.float32)[:, None, None], (19, 10, 20_000))
    actions, log_prob = sample_actions(jax.random.key(0), logits)
    expected = np.exp(row) / np.exp(row).sum()  # 0 for those that are not legal
    counts = np.bincount(np.ravel(actions), minlength=19)
    assert counts[3] == counts[18] == 0
    error = (counts / actions.size - expected) / np.sqrt(expected * (1 - expected) / actions.size + 1e-12)
    assert np.abs(error).max() < 5
    np.testing.assert_allclose(log_prob, (row - np.log(np.exp(row).sum()))[np.asarray(actions)], atol=1e-5)
    same = (actions[0] == actions[1]).mean()
    assert abs(same - (expected**2).sum()) < 0.02  # players draw independently


# --- files


def league(num=3, hidden=8):
    return jax.tree.map(lambda *x: np.stack(x), *(team(hidden, seed) for seed in range(num)))


def test_a_league_comes_back_as_it_was(tmp_path):
    teams, path = league(), tmp_path / "league.npz"
    save_league(path, teams, ["a", "b", "c"], {"seed": 4})
    again, names = load_league(path)
    assert names == ["a", "b", "c"]
    for x, y in zip(teams, again, strict=True):
        assert y.dtype == np.float32
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6)  # float16
    assert path.stat().st_size < 3 * 2 * sum(x[0].size for x in teams) + 8192


def test_the_shipped_league_is_small_and_whole():
    teams, names = load_league()
    assert len(names) == len(teams.whole) >= 2 and shipped_league().stat().st_size < 2**20
    meta = read_meta(shipped_league())
    assert meta["command"].startswith("python algos/tizero.py") and meta["commit"]


def spoilt(teams):
    """Files that are no league: name -> (pytree, meta)."""
    half = jax.tree.map(lambda x: x.astype(np.float16), teams)
    good = {"names": ["a", "b", "c"], "hidden": 8}
    return {
        "another width": (half, good | {"hidden": 9}),
        "another number": (half, good | {"names": ["a"]}),
        "no names": (half, {"hidden": 8}),
        "float32": (teams, good),
        "a part left out": (half._asdict() | {"own": np.zeros(1, np.float16)}, good),
        "not finite": (half._replace(last_bias=half.last_bias * np.float16(np.inf)), good),
        "absurd": (half, good | {"hidden": 10**9}),
    }


@pytest.mark.parametrize("kind", spoilt(league()))
def test_a_file_that_is_no_league_is_refused_in_one_line(kind, tmp_path):
    path = tmp_path / "league.npz"
    save(path, *spoilt(league())[kind])
    with pytest.raises(UsageError) as error:
        load_league(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_pickled_damaged_and_missing_files_are_refused(tmp_path):
    path = tmp_path / "league.npz"
    np.savez(path, x=np.array([{}], dtype=object))
    with pytest.raises(UsageError, match="no league"):
        load_league(path)
    save_league(path, league(), ["a", "b", "c"], {})
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    with pytest.raises(UsageError, match="no league"):
        load_league(path)
    with pytest.raises(UsageError, match="cannot be read"):
        load_league(tmp_path / "none.npz")
    with pytest.raises(UsageError, match="3 teams has 2 names"):
        save_league(path, league(), ["a", "b"], {})
