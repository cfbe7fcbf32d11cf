"""Football: the real engine's measured speeds, the laws on scripted scenes, exact symmetry, and what matches of bots look like.

The measured numbers are those of Google Research Football 2.10.2, taken from short scripts with one to three players.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.runs.config import UsageError
from envs.football import Football, FootballParams, FootballState, advance, check_level, draw
from envs.football_bots import bot_actions, bot_of, pair
from envs.football_state import (
    CORNER,
    DISTANCE,
    DRIBBLE,
    FREE_KICK,
    GOAL_KICK,
    HIGH,
    KICK_OFF,
    LONG,
    NORMAL,
    PENALTY,
    SHORT,
    SHOT,
    SLIDE,
    SPRINT,
    THROW_IN,
)  # fmt: skip

LANES, STEPS, MATCHES = 128, 50, 512
RIGHT, BOTTOM, LEFT = 5, 7, 1
env = Football(end_on_score=False, shaping="checkpoint")
near = partial(pytest.approx, rel=0.15)


@jax.jit
def run(state, actions, key):
    """actions (STEPS, 20, LANES) -> states and info after every step, info["reward"] with it."""

    def body(state, inputs):
        actions, key = inputs
        _, state, reward, _, info = env.step_env(key, state, actions, FootballParams())
        return state, (state, info | {"reward": reward})

    return jax.lax.scan(body, state, (actions, jax.random.split(key, STEPS)))[1]


@jax.jit
def matches(bots, seed):
    """MATCHES random levels, 128 steps -> the scores (128, 2, MATCHES), info summed over the steps by team, the last state."""
    key_level, key = jax.random.split(jax.random.key(seed))
    state = env.reset_to_level(env.sample_level(key_level, (MATCHES,)))
    params = FootballParams(bots.skill)

    def body(state, keys):
        _, state, _, _, info = env.step_env(keys[1], state, bot_actions(keys[0], state, bots), params)
        return state, (info, state.score)

    state, (info, score) = jax.lax.scan(body, state, jax.random.split(key, (128, 2)))
    return score, jax.tree.map(lambda x: x.astype(jnp.float32).sum(0).mean(-1), info), state


EMPTY = jax.tree.map(np.asarray, jax.jit(env.reset_to_level)(np.zeros((42, LANES), np.float32)))
EMPTY = EMPTY._replace(active=np.zeros_like(EMPTY.active))


def scene(players=None, ball=(0.0, 0.0, 0.11, 0.0, 0.0, 0.0), owner=None, last=None, **fields) -> FootballState:
    """LANES copies of a scene; players {(team, number): (x, y)} in metres; whom it does not name takes no part."""
    state = jax.tree.map(np.copy, EMPTY)
    for (team, number), (x, y) in (players or {}).items():
        state.x[team, number], state.y[team, number], state.active[team, number] = x, y, True
    for hot, who in ((state.owner, owner), (state.last, last or owner)):
        if who is not None:
            hot[who] = True
    state.ball[:] = np.reshape(np.float32(ball), (6, -1))
    for name, values in fields.items():
        getattr(state, name)[:] = values
    return state


def play(state, script=None, seed=0):
    """Runs a scene; script {(time, team, number): action} -> states, info with a leading axis of steps, as numpy."""
    actions = np.zeros((STEPS, 20, LANES), np.int32)
    for (time, team, number), action in (script or {}).items():
        actions[time, 10 * team + number - 1] = action
    return jax.tree.map(np.asarray, run(state, actions, jax.random.key(seed)))


def speed_of(states, team=0, number=1):
    return np.hypot(states.vx, states.vy)[:, team, number]


# --- how players move


def test_running_speeds():
    """Walk 5.00, sprint 7.82, dribble 3.50 m/s; from rest 2.4 m/s after 0.2 s, 4.8 after 0.5 s, 7 after about 1.2 s."""
    players = {(0, number): (-50.0, 6.0 * number) for number in (1, 2, 3)}
    script = {(0, 0, number): RIGHT for number in (1, 2, 3)} | {(1, 0, 2): SPRINT, (1, 0, 3): DRIBBLE}
    states, _ = play(scene(players), script)
    for number, expected in ((1, 5.0), (2, 7.82), (3, 3.5)):
        assert speed_of(states, 0, number)[-1] == near(expected)
    sprint = speed_of(play(scene({(0, 1): (-50.0, 0.0)}, sprint=True), {(0, 0, 1): RIGHT})[0])[:, 0]
    assert sprint[1] == near(2.4) and sprint[4] == near(4.8)
    assert 0.8 <= 0.1 * (1 + np.argmax(sprint > 7.0)) <= 1.6
    assert 0.7 <= 0.1 * (np.argmax(sprint > 7.5) - np.argmax(sprint > 5.0)) <= 1.3


def test_turns():
    """A sprinter who turns back stands after 0.7 s and runs 6 m/s after 1.4 s; who turns aside has lost the old way by 0.5 s."""
    state = scene({(0, 1): (0.0, 0.0)}, vx=7.8, sprint=True, stick_x=1.0)
    back = play(state, {(0, 0, 1): LEFT})[0].vx[:, 0, 1, 0]
    assert 0.5 <= 0.1 * (1 + np.argmax(back <= 0)) <= 0.9
    assert -back[13] == near(6.0)
    aside = play(state, {(0, 0, 1): BOTTOM})[0]
    assert aside.vx[4, 0, 1, 0] < 0.3 * 7.8 and aside.vy[4, 0, 1, 0] > 4.0  # action 7 is towards larger y


def test_running_with_the_ball():
    """5.0-5.25, 6.5-7.66 and 4.0-4.4 m/s; the ball 0.45-0.55 m ahead, 0.85-1.05 m at a sprint."""
    for action, (low, high), (least, most) in (
        (0, (5.0, 5.25), (0.45, 0.55)),
        (SPRINT, (6.5, 7.66), (0.85, 1.05)),
        (DRIBBLE, (4.0, 4.4), (0.4, 0.6)),
    ):
        states, _ = play(scene({(0, 1): (-50.0, 0.0)}, (-49.5, 0.0, 0.11, 0, 0, 0), (0, 1)), {(0, 0, 1): RIGHT, (1, 0, 1): action})
        assert low - 0.05 <= speed_of(states)[-1, 0] <= high + 0.05
        assert least - 0.02 <= states.ball[-1, 0, 0] - states.x[-1, 0, 1, 0] <= most + 0.02


def test_bodies_do_not_overlap():
    """Three on one spot are soon apart, in the middle of nowhere else."""
    states, _ = play(scene({(0, 1): (5.0, 5.0), (0, 2): (5.0, 5.0), (1, 1): (5.0, 5.0)}))
    x, y = states.x[-1, [0, 0, 1], [1, 2, 1], 0], states.y[-1, [0, 0, 1], [1, 2, 1], 0]
    gaps = np.hypot(x[:, None] - x, y[:, None] - y)[np.triu_indices(3, 1)]
    assert (gaps > 0.4).all() and (np.hypot(x - 5, y - 5) < 2).all()


# --- the ball


def test_rolling_and_bouncing():
    """29 m/s is 20 after 0.9 s and 15.8 after 1.8 s; a falling ball's bounce is 0.62 of its speed."""
    states, _ = play(scene(ball=(-50.0, 0.0, 0.11, 29.3, 0.0, 0.0)))
    speed = states.ball[:, 3, 0]
    assert 0.7 <= 0.1 * (1 + np.argmax(speed < 20.0)) <= 1.1 and speed[17] == near(15.8)
    slow, _ = play(scene(ball=(-50.0, 0.0, 0.11, 5.0, 0.0, 0.0)))
    assert 2.0 <= 0.1 * (1 + np.argmax(slow.ball[:, 3, 0] < 0.1)) <= 4.0  # 1.6 m/s2
    fall, _ = play(scene(ball=(0.0, 0.0, 5.0, 0.0, 0.0, 0.0)))
    speed = fall.ball[:, 5, 0]
    hit = np.argmax(speed > 0)
    assert speed[hit] == pytest.approx(0.62 * np.sqrt(2 * 9.81 * 4.9), rel=0.15)


def a_pass(action, distance, seed=0):
    """A pass along +x to a team-mate who stands -> speed and rise when it leaves, its top, steps to leave and to arrive."""
    state = scene({(0, 1): (-20.0, 0.0), (0, 2): (-20.0 + distance, 0.0)}, (-19.5, 0.0, 0.11, 0, 0, 0), (0, 1), stick_x=0.0)
    states, _ = play(state, {(0, 0, 1): action}, seed)
    left = np.argmax(states.lock[:, 0, 1] == 5, axis=0)
    there = np.argmax(states.owner[:, 0, 2], axis=0)
    ball = np.take_along_axis(states.ball, left[None, None], axis=0)[0]
    top = states.ball[:, 2].max(0)
    return np.hypot(ball[3], ball[4]), top, left + 1, np.where(there > 0, there - left, -1)


@pytest.mark.parametrize(
    ("action", "speeds", "tops"),
    [(SHORT, (12, 20, 29), None), (LONG, (12.7, 24, 29), None), (HIGH, (10.5, 15.5, 25), (1.2, 1.8, 3.9))],
)
def test_pass_speeds(action, speeds, tops):
    for k, distance in enumerate((8, 20, 35)):
        speed, top, left, _ = a_pass(action, distance)
        assert speed.mean() == near(speeds[k])
        assert left.min() >= 2 and left.max() <= 6 and 3 <= left.mean() <= 5
        assert tops is None or np.median(top) == pytest.approx(tops[k], rel=0.25)


def test_short_pass_arrives():
    """20 m in 0.7-1.3 s; most arrive."""
    *_, steps = a_pass(SHORT, 20)
    assert (steps > 0).mean() > 0.85
    assert 7 <= np.median(steps[steps > 0]) <= 13


def goals(x, y, keeper, **fields):
    """Share of shots from (x, y) that are goals."""
    players = {(0, 1): (x, y)} | ({(1, 0): (53.3, 0.0)} if keeper else {})
    state = scene(players, (x + 0.5, y, 0.11, 0, 0, 0), (0, 1), **fields)
    _, info = play(state, {(0, 0, 1): SHOT})
    return info["goal"][:20, 0].any(0).mean()


def test_shots():
    """Into an open goal from 10 to 28 m nearly all; past a keeper from 18 m some; from 12 m aside, 3 m off the line, hardly any."""
    assert all(goals(55.0 - d, 0.0, False) >= 0.9 for d in (10, 18, 28))
    assert 0.15 <= goals(37.0, 0.0, True) <= 0.6
    assert goals(52.0, 12.0, True) <= 0.1 and goals(27.0, 0.0, True) <= 0.15
    sprinting = goals(22.0, 0.0, False, vx=7.8, stick_x=1.0, sprint=True)
    assert sprinting < goals(22.0, 0.0, False, vx=3.5, stick_x=1.0, dribble=True) - 0.02


def test_shot_speed():
    """27-31 m/s, three to six steps after it is ordered."""
    state = scene({(0, 1): (27.0, 0.0)}, (27.5, 0.0, 0.11, 0, 0, 0), (0, 1))
    ball = play(state, {(0, 0, 1): SHOT})[0].ball
    speed = np.sqrt((ball[:, 3:6] ** 2).sum(1))  # (T, lanes)
    left = np.argmax(speed > 15, axis=0)
    fastest = np.take_along_axis(speed, left[None], axis=0)[0]
    assert (fastest > 15).all() and 27 <= fastest.mean() <= 31 and fastest.min() >= 26 and fastest.max() <= 32
    assert left.min() + 1 >= 3 and left.max() + 1 <= 6


# --- the laws


def given(states, info):
    """The first restart of every lane: mode, team, x, y; mode 0 where there was none."""
    first = np.argmax(info["restart"].any(1), axis=0)
    at = lambda v: v[first, ..., np.arange(LANES)]
    some = info["restart"].any((0, 1))
    return (
        np.where(some, at(states.mode), 0),
        np.where(at(info["restart"])[:, 0], 0, 1),
        at(states.ball)[:, 0],
        at(states.ball)[:, 1],
    )


@pytest.mark.parametrize(
    ("ball", "last", "mode", "team", "spot"),
    [
        ((10, 35, 0.11, 0, 15, 0), 0, THROW_IN, 1, (10, 36)),
        ((10, -35, 0.11, 0, -15, 0), 1, THROW_IN, 0, (10, -36)),
        ((54, 20, 0.11, 15, 0, 0), 0, GOAL_KICK, 1, (50.6, 0)),
        ((54, 20, 0.11, 15, 0, 0), 1, CORNER, 0, (54.5, 35.5)),
        ((-54, -20, 0.11, -15, 0, 0), 0, CORNER, 1, (-54.5, -35.5)),
        ((54, 2, 0.11, 15, 0, 0), 0, KICK_OFF, 1, (0, 0)),
        ((-54, 2, 1.5, -15, 0, 0), 0, KICK_OFF, 0, (0, 0)),  # an own goal
        ((54, 2, 3.2, 15, 0, 2), 0, GOAL_KICK, 1, (50.6, 0)),  # over the bar
    ],
)
def test_restarts(ball, last, mode, team, spot):
    players = {(0, 0): (-53, 0), (0, 1): (-20, 0), (0, 2): (0, 3), (1, 0): (53, -9), (1, 1): (20, 0), (1, 2): (0, -3)}
    states, info = play(scene(players, ball, last=(last, 1)))
    modes, teams, x, y = given(states, info)
    assert (modes == mode).all() and (teams == team).all()
    np.testing.assert_allclose([x[0], y[0]], spot, atol=1.0)
    goal = info["goal"].sum(0)[:, 0]
    assert goal.tolist() == [int(mode == KICK_OFF and team == 1), int(mode == KICK_OFF and team == 0)]
    np.testing.assert_array_equal(states.score[-1], info["goal"].sum(0))
    when = np.argmax(info["restart"].any(1), axis=0)[0]
    taker = np.argwhere(states.owner[when, ..., 0])
    assert len(taker) == 1 and taker[0, 0] == team and (taker[0, 1] == 0) == (mode == GOAL_KICK)
    assert np.hypot(*(states.ball[when, :2, 0] - [states.x[when][*taker[0], 0], states.y[when][*taker[0], 0]])) < 1.0
    waits = states.mode[when + 3, 0] == mode
    rivals = states.active[when + 3, 1 - team, 1:, 0]
    gap = np.hypot(states.x - states.ball[:, None, None, 0], states.y - states.ball[:, None, None, 1])[when + 3, 1 - team, 1:, 0]
    assert waits and (gap[rivals] > DISTANCE - 0.6).all()
    assert (states.mode[-1] == NORMAL).all() and not states.owner[-1][*taker[0]].all(), "it is taken without being asked"


def test_offside():
    """A flag at the pass, the offence at the reception; none where a defender is level or from a throw-in."""
    players = {(0, 1): (10, 0), (0, 2): (30, 0), (1, 1): (20, 15), (1, 2): (53, 0)}
    ball = (10.5, 0, 0.11, 0, 0, 0)
    states, info = play(scene(players, ball, (0, 1)), {(0, 0, 1): SHORT})
    modes, teams, x, _ = given(states, info)
    flagged = states.offside.any(0)
    assert flagged[0, 2].all() and not flagged[0, 1].any() and not flagged[1].any()
    assert (modes == FREE_KICK).mean() > 0.8 and (teams[modes == FREE_KICK] == 1).all()
    assert abs(np.median(x[modes == FREE_KICK]) - 30) < 1.5
    level = players | {(1, 1): (31, 15)}
    states, info = play(scene(level, ball, (0, 1)), {(0, 0, 1): SHORT})
    assert not states.offside.any() and states.owner[:, 0, 2].any(0).mean() > 0.8
    states, info = play(scene(players, ball, (0, 1), mode=THROW_IN, wait=9), {(0, 0, 1): SHORT})
    assert not states.offside.any() and states.lock[:, 0, 1].max() == 5


def test_tackles_and_fouls():
    """A slide beside a carrier often wins the ball; some are fouls: a free kick, a penalty in the area, sometimes a card."""
    for x, mode in ((0.0, FREE_KICK), (45.0, PENALTY)):
        players = {(0, 1): (x, 0.0), (1, 1): (x + 1.4, 0.0)}
        state = scene(players, (x + 0.5, 0.0, 0.11, 0, 0, 0), (0, 1))
        states, info = play(state, {(0, 1, 1): SLIDE})
        won = info["lost"][:12, 0].any(0) | (states.last[:12, 1, 1]).any(0)
        assert 0.3 < won.mean() < 0.95
        modes, teams, spot, _ = given(states, info)
        fouls = modes == mode
        assert 0.02 < fouls.mean() < 0.5 and set(np.unique(modes)) <= {NORMAL, mode, GOAL_KICK, CORNER, KICK_OFF, THROW_IN}
        assert (teams[fouls] == 0).all() and np.allclose(spot[fouls], 44.0 if mode == PENALTY else x, atol=1.5)
    booked = scene(players, (x + 0.5, 0.0, 0.11, 0, 0, 0), (0, 1), yellow=True)
    states, _ = play(booked, {(0, 1, 1): SLIDE})
    off = ~states.active[-1, 1, 1]
    assert 0 < off.mean() < 0.3 and states.active[-1, 0, 1].all()


# --- symmetry, levels, observations


def mirrored(state: FootballState) -> FootballState:
    """The same match with the teams exchanged and the pitch turned by half a circle."""
    turned = ("x", "y", "vx", "vy", "facing_x", "facing_y", "stick_x", "stick_y")
    match = ("ball", "kick", "kick_wait", "kick_stick", "passing", "mode", "wait", "time")
    fields = {k: v if k in match else -v[::-1] if k in turned else v[::-1] for k, v in state._asdict().items()}
    sign = np.float32([-1, -1, 1, -1, -1, 1])[:, None]
    return FootballState(**fields | {"ball": sign * fields["ball"], "kick_stick": -fields["kick_stick"]})


@jax.jit
def one_step(state, actions, chance, params):
    """-> state, info, observations."""
    state, info = advance(state, actions, chance, params, True)
    return state, info, env.get_obs(state, FootballParams())


def test_mirror_symmetry():
    """A turned state with exchanged actions and the same luck gives the turned state, and turned views."""
    state = matches(pair(bot_of("hard"), bot_of("hard")), 0)[2]
    actions = jax.random.randint(jax.random.key(3), (20, MATCHES), 0, 19)
    chance, params = draw(jax.random.key(4), (MATCHES,)), FootballParams(np.float32([1.0, 0.6]))
    once, info, view = one_step(state, actions, chance, params)
    turned = (mirrored(state), jnp.concatenate([actions[10:], actions[:10]]), chance._replace(left_first=~chance.left_first))
    again, turned_info, turned_view = one_step(*turned, params._replace(skill=params.skill[::-1]))
    assert (once.mode > 0).any() and once.owner.any((0, 1)).mean() > 0.2 and (once.kick > 0).any()
    for name, x, y in zip(FootballState._fields, once, mirrored(again), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5, err_msg=name)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y[::-1]), info, turned_info)
    np.testing.assert_allclose(view, np.concatenate([turned_view[10:], turned_view[:10]]), atol=2e-5)


def test_single_matches_and_auto_reset():
    """`vmap` of the single match's `step` plays what the wide batch plays; where the time is up a match begins anew."""
    world = Football(max_steps_in_episode=200)
    state = matches(pair(bot_of("hard"), bot_of("hard")), 0)[2]
    over = np.arange(MATCHES) % 2 == 1
    state = state._replace(time=jnp.where(over, 199, 7))
    actions = jax.random.randint(jax.random.key(5), (20, MATCHES), 0, 19)
    keys = jax.random.split(jax.random.key(6), MATCHES)
    obs, after, reward, terminated, truncated, info = jax.jit(jax.vmap(world.step, (0, -1, -1), -1))(keys, state, actions)
    chance = jax.vmap(lambda key: draw(jax.random.split(key)[0], ()), out_axes=-1)(keys)
    wide, wide_info, _ = one_step(state, actions, chance, FootballParams())
    goal = np.asarray(wide_info["goal"]).any(0)
    np.testing.assert_array_equal(terminated, goal)
    np.testing.assert_array_equal(truncated, over)
    goes_on = ~over & ~goal
    for name, x, y in zip(FootballState._fields, after, wide, strict=True):
        np.testing.assert_allclose(x[..., goes_on], y[..., goes_on], atol=2e-5, err_msg=name)
    assert obs.shape == (20, 171, MATCHES) and reward.shape == (20, MATCHES)
    assert (
        (after.time[over] == 0).all() and (after.mode[over] == KICK_OFF).all() and (after.owner[..., over].sum((0, 1)) == 1).all()
    )
    assert (np.abs(np.asarray(after.x)[0][:, over]) <= 54).all() and np.isfinite(obs).all()
    space = world.observation_space()
    assert space.contains(obs[..., 0]) and space.shape == obs.shape[:2] and world.action_space().n == 19


def test_levels():
    level = np.asarray(env.sample_level(jax.random.key(0)))
    spots = level.reshape(21, 2)
    assert level.shape == (42,) and (np.abs(spots) <= [0.9, 0.4]).all()
    state = env.reset_to_level(level)
    np.testing.assert_allclose(np.stack([state.x, state.y], -1)[:, 1:].reshape(20, 2), spots[:20] * [54.4, 83.6], rtol=1e-5)
    np.testing.assert_allclose(state.ball[:3], [*spots[20] * [54.4, 83.6], 0.11], rtol=1e-5)
    assert state.x[0, 0] < -52 and state.x[1, 0] > 52 and not state.owner.any() and state.active.all()
    clipped = env.reset_to_level(jnp.full(42, 7.0))
    np.testing.assert_allclose([clipped.x[0, 3], clipped.y[1, 4], clipped.ball[0]], [54.4, 0.42 * 83.6, 54.4], rtol=1e-5)
    changed = env.mutate_level(jax.random.key(1), level)
    assert 0.05 < np.std(np.asarray(changed) - level) < 0.15 and (np.abs(np.reshape(changed, (21, 2))) < [0.901, 0.401]).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v[:40], "42 numbers"),
        (lambda v: np.where(np.arange(42) == 2, 1.2, v), "left player 1: x is off the pitch"),
        (lambda v: np.where(np.arange(42) == 41, -0.5, v), "the ball: y is off the pitch"),
        (lambda v: np.where(np.arange(42) // 2 == 13, np.tile(v[4:6], 21), v), "left player 2 and right player 3"),
        (lambda v: np.where(np.arange(42) == 7, np.nan, v), "finite"),
    ],
)
def test_bad_levels(change, words):
    good = np.stack(np.broadcast_arrays(np.linspace(-0.8, 0.8, 21), 0.1), -1).reshape(-1)
    assert check_level(good).dtype == np.float32
    with pytest.raises(UsageError, match=words) as error:
        check_level(change(good))
    assert "\n" not in str(error.value)


def test_bad_settings():
    for settings, words in (
        (dict(outfield=0), "1 to 10 players"),
        (dict(outfield=(3, 11)), "1 to 10 players"),
        (dict(observation="pixels"), "team_view or simple115"),
        (dict(shaping="yes"), "none or checkpoint"),
        (dict(max_steps_in_episode=0), "at least 1"),
    ):
        with pytest.raises(UsageError, match=words):
            Football(**settings)
    with pytest.raises(UsageError, match="easy, medium, hard"):
        bot_of("nobody")


def test_simple115():
    """The engine's layout, from both sides."""
    state = scene({(0, 0): (-54.4, 0), (0, 1): (27.2, 8.36), (1, 1): (5.44, -8.36)}, (27.2, 8.36, 0.11, 5.0, 0, 0), (0, 1), vx=5.44)
    world = Football(observation="simple115")
    obs = np.asarray(world.get_obs(jax.tree.map(jnp.asarray, state)))[..., 0]
    assert obs.shape == (20, 115)
    left, right = obs[0], obs[10]
    np.testing.assert_allclose(left[:6], [-1, 0, 0.5, 0.1, -1, -1], atol=1e-6)
    np.testing.assert_allclose(left[22:24], [0.01, 0], atol=1e-6)  # 5.44 m/s by step
    np.testing.assert_allclose(left[46:48], [0.1, -0.1], atol=1e-6)
    np.testing.assert_allclose(right[2:4], [-0.1, 0.1], atol=1e-6)
    np.testing.assert_allclose(left[88:94], [0.5, 0.1, 0.11, 0.5 / 54.4, 0, 0], atol=1e-6)
    np.testing.assert_allclose([left[94:97], right[94:97]], [[0, 1, 0], [0, 0, 1]])
    assert left[97:108].argmax() == 1 and obs[12][97:108].argmax() == 3 and left[108:].tolist() == [1, 0, 0, 0, 0, 0, 0]


def test_checkpoints():
    """A run at the goal collects the rings, each once; a goal pays the rest: 1 in all, for the attackers alone."""
    states, info = play(scene({(0, 1): (34.0, 0.0)}, (34.5, 0, 0.11, 0, 0, 0), (0, 1)), {(0, 0, 1): RIGHT})
    reward = info["reward"][..., 0]
    assert (states.score[-1] == [[1], [0]]).all() and (states.rings[-1] == [[10], [0]]).all()
    assert reward[0, 0] == pytest.approx(0.7)  # he is 0.38 units from the goal: seven of the ten rings are wider
    np.testing.assert_allclose(reward.sum(0), [2.0] * 10 + [-1.0] * 10, atol=1e-5)


# --- matches


def first_goals(score):
    """Share of the matches in which each team scored first."""
    led = score > 0
    first = np.argmax(np.asarray(led).any(1), axis=0)
    return np.asarray(led)[first, :, np.arange(led.shape[-1])].mean(0)


@pytest.mark.slow
def test_matches_of_the_hard_bot():
    """What 1000 random levels of 128 steps look like; the sides are equal."""
    bots = pair(bot_of("hard"), bot_of("hard"))
    found = [jax.tree.map(np.asarray, matches(bots, seed)) for seed in (0, 1)]
    shares = np.mean([first_goals(score) for score, *_ in found], axis=0)
    info = jax.tree.map(lambda *v: np.mean(v, axis=0), *[info for _, info, _ in found])
    numbers = {
        "goal within 128 steps": (shares.sum(), 0.04, 0.2),
        "the sides' difference": (abs(shares[0] - shares[1]), 0, 0.06),
        "ball owned": (info["owned"].sum() / 128, 0.3, 0.55),
        "turnovers": (info["lost"].sum(), 0.5, 3.0),
        "restarts in 300 steps": (info["restart"].sum() * 300 / 128, 1.0, 6.0),
        "passes that arrive": (info["completed"].sum() / info["passed"].sum(), 0.4, 0.9),
    }
    wrong = {name: found for name, found in numbers.items() if not found[1] <= found[0] <= found[2]}
    assert not wrong, numbers
    for *_, state in found:
        assert all(np.isfinite(x).all() for x in state)
        assert (state.owner.sum((0, 1)) <= 1).all() and (state.last.sum((0, 1)) <= 1).all()
        assert (np.abs(state.x[state.active]) <= 57).all() and (np.abs(state.y[state.active]) <= 38).all()


@pytest.mark.slow
def test_the_hard_bot_beats_the_easy_one():
    """And on either side."""
    for left, right, better in (("hard", "easy", 0), ("easy", "hard", 1)):
        shares = first_goals(np.asarray(matches(pair(bot_of(left), bot_of(right)), 5)[0]))
        assert shares[better] > 0.1 and shares[better] > 5 * shares[1 - better]


def test_picture():
    image = np.asarray(jax.jit(env.render)(jax.tree.map(lambda v: v[..., 0], EMPTY)))
    players = jax.tree.map(lambda v: v[..., 0], scene({(0, 1): (0.0, 10.0), (1, 1): (30.0, 0.0)}))
    shown = np.asarray(jax.jit(env.render)(players))
    assert image.dtype == np.uint8 and image.shape == (320, 472, 3)
    y, x = np.argwhere((image != shown).any(-1)).mean(0)  # the two discs' middle, 4 pixels a metre, a margin of 4 m
    assert abs(x - 4 * (15 + 59)) < 3 and abs(y - 4 * (5 + 40)) < 3


def test_no_gathers():
    """They are slow on CPU in wide batches."""
    state = jax.eval_shape(env.reset_to_level, jax.ShapeDtypeStruct((42, 4), jnp.float32))
    step = lambda s, a: env.step_env(jax.random.key(0), s, a, FootballParams())
    act = lambda s: bot_actions(jax.random.key(0), s, pair(bot_of("hard"), bot_of("easy")))
    text = str(jax.make_jaxpr(step)(state, jax.ShapeDtypeStruct((20, 4), jnp.int32))) + str(jax.make_jaxpr(act)(state))
    used = {word for word in ("gather", "scatter", "conv_general", "sort", "dynamic_slice", "cond") if f"= {word}[" in text}
    assert not used, used
