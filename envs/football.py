"""Football, eleven against eleven, with what the Google Research Football engine (1907.11180) has that matters to a policy.

A step is a decision, 0.1 s. Each team has a keeper, scripted inside the world, and ten players with an action each; who is not
`active` stands outside and takes no part, so smaller games have the same shapes.

actions  (20,) int32, the left team's ten, then the right team's: 0 idle; 1-8 run left, top-left, top, top-right, right,
         bottom-right, bottom, bottom-left; 9 long, 10 high, 11 short pass; 12 shot; 13 sprint; 14 stop running; 15 stop sprinting;
         16 slide; 17 dribble; 18 stop dribbling. Direction, sprint and dribble last until they are changed. The right team acts in
         its own frame: the world turned by half a circle, so that both teams play towards +x
reward   (20,) float32: +1 to a team that scores and -1 to the other; with shaping="checkpoint" also +0.1 for each of ten rings
         around the other goal that a team's carrier enters for the first time, and what is left of them for a goal
obs      (20, F) float32, see `team_view`; or observation="simple115": (20, 115), see `simple115`
ends     with a goal where `end_on_score` (terminated), and after `max_steps_in_episode` steps (truncated)

A level is where a scenario begins: (42,) float32, x and y of the left team's ten, of the right team's ten, and of the ball, in the
engine's units: x in [-1, 1], y in [-0.42, 0.42], goals at x = -1 and 1. Inside, metres and seconds: 110 x 72 with y downwards.

Every array of a state has its players first, (2, 11) by team, and any axes of matches last: the functions here take one match or a
whole batch, `env.step_env(key, state, actions (20, B), params)`, and on CPU a batch in the last axis is the fast way. `jax.vmap`
over one match works too.

Differs from the engine: the clock runs on while the ball is out of play, and who takes a restart stands there at once; a player's
ball moves with him, it is not kicked ahead touch by touch; the ball has no spin; players differ only by `skill`, a team's
multiplier; no substitutions, no advantage, no animations; offside is judged when the ball is kicked; posts bounce plainly, without
nets; a shot's chance falls smoothly with distance (the engine's is largest at 14 m). Speeds, accelerations and latencies are those
measured in the engine; rates of fouls, deflections, saves and shots' errors were set so that matches have the engine's statistics.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common.env import Environment
from common.runs.config import require
from envs.football_state import (
    BOX_LENGTH,
    BOX_WIDTH,
    CORNER,
    DISTANCE,
    DRIBBLE,
    DT,
    FAR,
    FORMATION,
    FREE_KICK,
    GOAL_HEIGHT,
    GOAL_KICK,
    GOAL_WIDTH,
    HALF_LENGTH,
    HALF_WIDTH,
    HIGH,
    KEEPER,
    KICK_OFF,
    LEVEL_SIZE,
    LONG,
    NORMAL,
    NUM_ACTIONS,
    PENALTY,
    SCALE_X,
    SCALE_Y,
    SHORT,
    SHOT,
    SIDE,
    SLIDE,
    SPRINT,
    STOP,
    STOP_DRIBBLE,
    STOP_SPRINT,
    TEAM_VIEW,
    THROW_IN,
    FootballState,
    length,
    like,
    own_view,
    picture,
    simple115,
    team_view,
)  # fmt: skip

WALK, RUN, SLOW = 5.0, 7.82, 3.5  # m/s without the ball: walking, sprinting, dribbling
WALK_BALL, RUN_BALL, SLOW_BALL = 5.1, 7.1, 4.2
PUSH_OFF, APPROACH = 1.2, 0.2  # the most a velocity changes in a step, m/s; or the share of what it lacks, where that is less
REACH, KEEPER_REACH, HEAD, HANDS = 0.9, 1.8, 1.9, 2.6  # metres around a player, and above the ground
DRAG, ROLLING, GRAVITY, BOUNCE, RADIUS = 0.016, 1.6, 9.81, 0.62, 0.11
FREE_AFTER, FORCED_AFTER = 5, 30  # steps until a restart may be taken, and is
KEEPER_HOLDS = 10  # steps until a keeper kicks what he has caught
ORDER = np.arange(22, dtype=np.int32).reshape(2, 11)
RINGS = np.linspace(0.99, 0.19, 10, dtype=np.float32)  # the checkpoints' distances from the goal, in units of a level


class FootballParams(NamedTuple):
    skill: jax.Array | np.ndarray = np.ones(2, np.float32)  # (2,) or (2, B): each team's, 1 for the best
    max_steps_in_episode: int | jax.Array = 3000


class Chance(NamedTuple):
    """A step's luck: numbers in [0, 1) but for the first."""

    left_first: jax.Array  # () bool: who goes first where two are equally near
    u: jax.Array  # (24,)


class Call(NamedTuple):
    """A restart that the referee gives; mode NORMAL: none."""

    mode: jax.Array  # () int32
    team: jax.Array  # () int32
    x: jax.Array  # () metres
    y: jax.Array


class Football(Environment):
    """`outfield` players of each team take part (the first ones of FORMATION), and the keepers where `keepers`."""

    num_agents = 20

    def __init__(
        self,
        outfield: int | tuple[int, int] = 10,
        keepers: bool | tuple[bool, bool] = True,
        observation: str = "team_view",
        shaping: str = "none",
        offsides: bool = True,
        end_on_score: bool = True,
        max_steps_in_episode: int = 3000,
    ):
        outfield = (outfield, outfield) if isinstance(outfield, int) else tuple(outfield)
        keepers = (keepers, keepers) if isinstance(keepers, bool) else tuple(keepers)
        require(all(1 <= n <= 10 for n in outfield), f"outfield {outfield}: each team needs 1 to 10 players")
        require(observation in ("team_view", "simple115"), f"observation {observation!r}: must be team_view or simple115")
        require(shaping in ("none", "checkpoint"), f"shaping {shaping!r}: must be none or checkpoint")
        require(max_steps_in_episode >= 1, f"max_steps_in_episode {max_steps_in_episode}: must be at least 1")
        self.observation, self.shaping, self.offsides = observation, shaping, offsides
        self.end_on_score, self.max_steps = end_on_score, max_steps_in_episode
        number = np.array(outfield)[:, None] + 1
        self.active = (np.arange(11) < number) & (np.array(keepers)[:, None] | ~KEEPER)

    @property
    def default_params(self) -> FootballParams:
        return FootballParams(max_steps_in_episode=self.max_steps)

    @property
    def num_actions(self) -> int:
        return NUM_ACTIONS

    def action_space(self, params=None):
        from gymnax.environments import spaces  # on use only: gymnax starts the backend when it is imported

        return spaces.Discrete(NUM_ACTIONS)

    def observation_space(self, params=None):
        from gymnax.environments import spaces

        return spaces.Box(-20, 20, (20, TEAM_VIEW if self.observation == "team_view" else 115), jnp.float32)

    def reset_env(self, key, params: FootballParams, batch: tuple[int, ...] = ()):
        """A kick-off, by either team -> obs, state. `batch`: axes of matches."""
        state = self.reset_to_level(jnp.zeros((LEVEL_SIZE, *batch), jnp.float32), params)
        team, centre = jax.random.randint(key, batch, 0, 2, jnp.int32), jnp.zeros(batch, jnp.float32)
        state = restart(state, Call(jnp.full(batch, KICK_OFF, jnp.int32), team, centre, centre), jnp.bool_(True))
        return self.get_obs(state, params), state

    def sample_level(self, key, batch: tuple[int, ...] = ()) -> jax.Array:
        """Everyone and the ball anywhere, x in [-0.9, 0.9] and y in [-0.4, 0.4]: (42, *batch)."""
        bounds = np.float32([0.9, 0.4])[(None, slice(None), *[None] * len(batch))]
        return (jax.random.uniform(key, (21, 2, *batch), jnp.float32, minval=-1.0) * bounds).reshape(LEVEL_SIZE, *batch)

    def mutate_level(self, key, level, sigma: float = 0.1) -> jax.Array:
        """Gaussian noise on every coordinate, clipped to where `sample_level` draws from."""
        level = level + sigma * jax.random.normal(key, level.shape, jnp.float32)
        bounds = like(np.tile(np.float32([0.9, 0.4]), 21), level)
        return jnp.clip(level, -bounds, bounds)

    def reset_to_level(self, level, params: FootballParams | None = None) -> FootballState:
        """The state that begins a scenario (42, ...). Coordinates off the pitch are clipped to it, and players on one spot are
        pushed apart in the first steps; `check_level` is the strict way, outside jit."""
        level = jnp.clip(level, -like(LEVEL_BOUNDS, level), like(LEVEL_BOUNDS, level))
        batch = level.shape[1:]
        spots = level.reshape(21, 2, *batch)
        keepers = like(np.float32([[[-0.98, 0]], [[0.98, 0]]]), spots[None]) + jnp.zeros((2, 1, 2, *batch), jnp.float32)
        players = jnp.concatenate([keepers, spots[:20].reshape(2, 10, 2, *batch)], axis=1)
        active = jnp.broadcast_to(like(self.active, players[:, :, 0]), (2, 11, *batch))
        x, y = players[:, :, 0] * SCALE_X, players[:, :, 1] * SCALE_Y
        side = like(SIDE, x)
        x, y = jnp.where(active, x, -side * 60.0), jnp.where(active, y, side * 45.0)
        zero, no, none = jnp.zeros_like(x), jnp.zeros(x.shape, bool), jnp.zeros(x.shape, jnp.int32)
        ball = spots[20] * like(np.float32([SCALE_X, SCALE_Y]), spots[20])
        ball = jnp.concatenate([ball, jnp.full((1, *batch), RADIUS, jnp.float32), jnp.zeros((3, *batch), jnp.float32)])
        count, pair = jnp.zeros(batch, jnp.int32), jnp.zeros((2, *batch), jnp.int32)
        return FootballState(
            x, y, zero, zero, side + zero, zero, zero, zero, no, no, none, none, zero, no, no, active, no, no,
            ball, count, count, pair.astype(jnp.float32), count > 0, count, count, pair, pair, count,
        )  # fmt: skip

    def step_env(self, key, state: FootballState, actions, params: FootballParams):
        """actions (20, ...) -> obs, state, reward (20, ...), terminated, info.

        info, each by team (2, ...) bool: `goal`; `owned`, it has the ball; `passed`, a pass leaves; `completed`, one arrived;
        `lost`, the ball went to the other team; `shot`; `restart`, it was given one.
        """
        state, info = advance(state, actions, draw(key, state.time.shape), params, self.offsides)
        goal = info["goal"].astype(jnp.float32)
        reward = goal - goal[::-1]
        if self.shaping == "checkpoint":
            extra, rings = checkpoints(state, goal)
            reward, state = reward + extra, state._replace(rings=rings)
        terminated = info["goal"].any(0) & self.end_on_score
        return self.get_obs(state, params), state, jnp.repeat(reward, 10, axis=0), terminated, info

    def get_obs(self, state: FootballState, params: FootballParams | None = None, key=None) -> jax.Array:
        """(20, F, ...) float32."""
        if self.observation == "simple115":
            return simple115(state)
        left = 1.0 - state.time / (params or self.default_params).max_steps_in_episode
        whole, own = team_view(state, left), own_view(state)
        whole = jnp.broadcast_to(whole[:, None], (2, 10, *whole.shape[1:]))
        return jnp.concatenate([whole, own], axis=2).reshape(20, TEAM_VIEW, *state.time.shape)

    def render(self, state: FootballState) -> jax.Array:
        """One match from above; (HEIGHT, WIDTH, 3) uint8."""
        return picture(state)


def check_level(level) -> np.ndarray:
    """A scenario (42,) or (42, B) as float32. Raises UsageError where `reset_to_level` would have to put it right."""
    level = np.asarray(level, np.float32)
    require(level.ndim >= 1 and len(level) == LEVEL_SIZE, f"a scenario has {LEVEL_SIZE} numbers, not {level.shape[:1]}")
    require(bool(np.isfinite(level).all()), "a scenario's numbers must be finite")
    outside = np.abs(level) > like(LEVEL_BOUNDS, level)
    place = int(np.argmax(outside.reshape(LEVEL_SIZE, -1).any(1)))
    require(not outside.any(), f"scenario, {name_of(place // 2)}: {'xy'[place % 2]} is off the pitch (|x| <= 1, |y| <= 0.42)")
    spots = level[:40].reshape(20, 2, -1) * np.float32([SCALE_X, SCALE_Y])[:, None]
    near = (((spots[:, None] - spots) ** 2).sum(2) < 0.5**2).any(-1) & ~np.eye(20, dtype=bool)
    first, second = np.divmod(int(np.argmax(near)), 20)
    require(not near.any(), f"scenario: {name_of(first)} and {name_of(second)} are less than 0.5 m apart")
    return level


def name_of(place: int) -> str:
    """What the place-th pair of a scenario is."""
    return "the ball" if place == 20 else f"{('left', 'right')[place // 10]} player {place % 10}"


LEVEL_BOUNDS = np.tile(np.float32([1.0, 0.42]), 21)


# --- small things


def read(hot, values) -> jax.Array:
    """The value (2, 11, ...) of the one that is set in `hot` (bool), 0 where nobody is."""
    return jnp.where(hot, values, 0).sum((0, 1), dtype=values.dtype)


def nearest_player(distance, among, left_first) -> tuple[jax.Array, jax.Array]:
    """Which of the players set in `among` is nearest (2, 11, ...) bool, and its distance, FAR where there is none."""
    distance = jnp.where(among, distance, FAR)
    least = distance.min((0, 1))
    order = like(ORDER, distance)
    order = jnp.where((order < 11) == left_first, order, order + 22)
    order = jnp.where((distance <= least) & among, order, 99)
    return (order == order.min((0, 1))) & among, least


def others_of(hot) -> jax.Array:
    """The other team than that of the one in `hot` (2, 11, ...): (2, 1, ...) bool, none where nobody is set."""
    return hot.any(1, keepdims=True)[::-1]


def draw(key, batch) -> Chance:
    """One word of threefry a match, and a multiply-xorshift hash of it for each number."""
    seed = jax.random.bits(key, batch, jnp.uint32)
    word = seed ^ like(np.arange(1, 26, dtype=np.uint32) * np.uint32(0x9E3779B9), seed[None])
    word = (word ^ (word >> 16)) * np.uint32(0x7FEB352D)
    word = (word ^ (word >> 15)) * np.uint32(0x846CA68B)
    u = (word >> 8).astype(jnp.float32) * 2.0**-24
    return Chance(u[24] < 0.5, u[:24])


def gauss(u) -> jax.Array:
    """Four numbers in [0, 1), (4, ...), to one that is nearly normal."""
    return (u.sum(0) - 2.0) * 3**0.5


# --- a step


def advance(state: FootballState, actions, chance: Chance, params: FootballParams, offsides: bool):
    """One step of 0.1 s -> state, info."""
    u, before = chance.u, state
    skill = jnp.asarray(params.skill, jnp.float32)
    skill = jnp.broadcast_to(
        skill.reshape(2, 1, *skill.shape[1:], *[1] * (state.x.ndim - 1 - skill.ndim)), (2, 1, *state.time.shape)
    )
    state, actions = steer(state, actions)
    state = move(state, keeper_runs(state), skill)
    state, call = challenge(state, u[:6], chance.left_first, skill)
    state = wind_up(state, actions, u[6])
    state, kicked = strike(state, u[7:16], chance.left_first, skill, offsides)
    for k in (16, 20):
        state, call = fly(state, call, u[k : k + 4], chance.left_first)
    goal = (call.mode == KICK_OFF) & jnp.stack([call.team == 1, call.team == 0])
    state = restart(state, call, chance.left_first)
    owned = state.owner.any(1)
    by = lambda s: s.last.any(1)
    arrived = before.passing & ~state.passing & owned.any(0) & (state.mode == NORMAL)
    info = {
        "goal": goal,
        "owned": owned,
        "completed": arrived & owned & by(before) & (state.last & ~before.last).any(1),
        "lost": by(before) & owned[::-1] & (call.mode == NORMAL),
        "restart": (call.mode > 0) & jnp.stack([call.team == 0, call.team == 1]),
        "passed": (kicked > 0) & (kicked != SHOT) & by(state),
        "shot": (kicked == SHOT) & by(state),
    }
    return state._replace(time=state.time + 1, score=state.score + goal), info


def steer(state: FootballState, actions):
    """What the players chose: sticky directions, sprint, dribble; slides begin -> state, actions (2, 11, ...)."""
    a = actions.reshape(2, 10, *state.time.shape)
    a = jnp.concatenate([jnp.zeros_like(a[:, :1]), a], axis=1)
    side = like(SIDE, state.x)
    east, west = (a >= 4) & (a <= 6), (a == 1) | (a == 2) | (a == 8)
    south, north = (a >= 6) & (a <= 8), (a >= 2) & (a <= 4)
    size = side * jnp.where((a & 1) == 0, 0.5**0.5, 1.0)
    turn, halt = (a >= 1) & (a <= 8), a == STOP
    slide = (a == SLIDE) & ~state.owner & (state.stun == 0) & (state.mode == NORMAL) & state.active
    stick = lambda plus, minus, old: jnp.where(turn, size * (plus * 1.0 - minus), jnp.where(halt, 0.0, old))
    state = state._replace(
        stick_x=stick(east, west, state.stick_x),
        stick_y=stick(south, north, state.stick_y),
        sprint=(state.sprint | (a == SPRINT)) & (a != STOP_SPRINT),
        dribble=(state.dribble | (a == DRIBBLE)) & (a != STOP_DRIBBLE),
        stun=jnp.where(slide, 10, jnp.maximum(state.stun - 1, 0)),
        lock=jnp.maximum(state.lock - 1, 0),
        vx=jnp.where(slide, 8.0 * state.facing_x, state.vx),
        vy=jnp.where(slide, 8.0 * state.facing_y, state.vy),
    )
    return state, a


def keeper_runs(state: FootballState):
    """The velocity that each keeper wants, 2 x (2, ...) m/s.

    To the line from the goal's middle to the ball, further out the further the ball; to where a shot will pass him; to the ball
    when it is loose in his area, he is the nearest of his team, or it is carried close to him.
    """
    side = like(SIDE[:, 0], state.time[None])
    x, y = side * state.x[:, 0], side * state.y[:, 0]  # each in his own frame
    bx, by, vx, vy = (side * state.ball[i] for i in (0, 1, 3, 4))
    to_x, to_y = bx + HALF_LENGTH, by
    far = length(to_x, to_y)
    ours, theirs = state.owner.any(1), state.owner[::-1].any(1)
    loose = ~ours & ~theirs
    out = jnp.clip(0.12 * far, 0.7, 4.0) / far
    goal_x, goal_y = -HALF_LENGTH + to_x * out, to_y * out
    t = (x - bx) / jnp.minimum(vx, -1.0)  # until the ball is level with him
    cross = by + vy * t
    shot = loose & (vx < -7.0) & (t > 0) & (t < 2.0) & (jnp.abs(by - vy * (bx + HALF_LENGTH) / jnp.minimum(vx, -1.0)) < 6.0)
    goal_x, goal_y = jnp.where(shot, x, goal_x), jnp.where(shot, jnp.clip(cross, -5.0, 5.0), goal_y)
    own = length(bx - x, by - y)
    mates = length(state.x[:, 1:] - state.ball[0], state.y[:, 1:] - state.ball[1])
    first = own < jnp.where(state.active[:, 1:], mates, FAR).min(1)
    in_box = (bx < -HALF_LENGTH + BOX_LENGTH) & (jnp.abs(by) < BOX_WIDTH)
    rush = in_box & ~ours & ~shot & ((loose & (own < 12.0) & first) | (theirs & (far < 11.0)))
    goal_x, goal_y = jnp.where(rush, bx + 0.2 * vx, goal_x), jnp.where(rush, by + 0.2 * vy, goal_y)
    dx, dy = goal_x - x, goal_y - y
    gap = length(dx, dy)
    speed = jnp.minimum(3.0 * gap, jnp.where(shot | rush, RUN, WALK)) / gap * ~state.owner[:, 0]
    return side * dx * speed, side * dy * speed


def move(state: FootballState, keepers, skill) -> FootballState:
    """A velocity changes by at most PUSH_OFF a step, by up to twice that across the way one runs, and ever less near its goal, as
    measured in the engine. Bodies push each other apart. A carried ball goes along."""
    has, held = state.owner, state.owner & (state.mode > 0)
    speed = jnp.where(
        state.sprint & ~state.dribble,
        jnp.where(has, RUN_BALL, RUN),
        jnp.where(state.dribble, jnp.where(has, SLOW_BALL, SLOW), jnp.where(has, WALK_BALL, WALK)),
    )
    speed = speed * (0.85 + 0.15 * skill) * (1.0 - 0.1 * state.fatigue)
    is_keeper = like(KEEPER, state.x)
    want_x = jnp.where(is_keeper, keepers[0][:, None], speed * state.stick_x)
    want_y = jnp.where(is_keeper, keepers[1][:, None], speed * state.stick_y)
    able = (state.stun == 0) & state.active & ~held
    want_x, want_y = jnp.where(able, want_x, 0.0), jnp.where(able, want_y, 0.0)
    dx, dy = want_x - state.vx, want_y - state.vy
    gap, old, new = length(dx, dy), length(state.vx, state.vy), length(want_x, want_y)
    across = 1.0 + jnp.abs(state.vx * want_y - state.vy * want_x) / jnp.maximum(old * new, 1.0)
    share = across * jnp.minimum(PUSH_OFF / gap, APPROACH)
    vx, vy = state.vx + share * dx, state.vy + share * dy
    vx, vy = jnp.where(held, 0.0, vx), jnp.where(held, 0.0, vy)
    push_x, push_y = pushes(state)
    x = jnp.clip(state.x + vx * DT + jnp.where(held, 0.0, push_x), -HALF_LENGTH - 2, HALF_LENGTH + 2)
    y = jnp.clip(state.y + vy * DT + jnp.where(held, 0.0, push_y), -HALF_WIDTH - 2, HALF_WIDTH + 2)
    x, y = keep_off(state, x, y)
    x, y = jnp.where(state.active, x, state.x), jnp.where(state.active, y, state.y)
    fast = length(vx, vy)
    slow_turn = (fast < 0.5) & ((state.stick_x != 0) | (state.stick_y != 0)) & able
    facing_x = jnp.where(fast > 0.5, vx / fast, jnp.where(slow_turn, state.stick_x, state.facing_x))
    facing_y = jnp.where(fast > 0.5, vy / fast, jnp.where(slow_turn, state.stick_y, state.facing_y))
    ahead = jnp.where(state.sprint & (fast > 5.5), 0.95, 0.5)
    carried = jnp.stack([read(has, x + ahead * facing_x), read(has, y + ahead * facing_y), 0 * state.ball[2] + RADIUS])
    carried = jnp.concatenate([carried, jnp.stack([read(has, vx), read(has, vy), 0 * state.ball[2]])])
    ball = jnp.where(has.any((0, 1)) & (state.mode == NORMAL), carried, state.ball)
    fatigue = jnp.minimum(state.fatigue + 3e-5 * fast * DT, 1.0)
    return state._replace(x=x, y=y, vx=vx, vy=vy, facing_x=facing_x, facing_y=facing_y, ball=ball, fatigue=fatigue)


def pushes(state: FootballState):
    """How far each body is pushed by the others, 2 x (2, 11, ...) metres."""
    nudge = like(1e-4 * SIDE * np.arange(11, dtype=np.float32), state.x)  # for two on the very same spot
    flat = lambda v: v.reshape(22, *state.time.shape)
    x, y = flat(state.x + nudge), flat(state.y + nudge)
    dx, dy = x[:, None] - x, y[:, None] - y
    push = jnp.maximum(0.36 - (dx * dx + dy * dy), 0.0)
    return tuple((push * d).sum(1).reshape(state.x.shape) for d in (dx, dy))


def keep_off(state: FootballState, x, y):
    """Keeps the other team DISTANCE from a ball that is to be put into play; at a penalty keepers may stay."""
    dx, dy = x - state.ball[0], y - state.ball[1]
    gap = length(dx, dy)
    off = others_of(state.owner) & (state.mode > 0) & (gap < DISTANCE) & ~like(KEEPER, x)
    grow = jnp.where(off, DISTANCE / gap, 1.0)
    return state.ball[0] + grow * dx, state.ball[1] + grow * dy


def challenge(state: FootballState, u, left_first, skill):
    """The nearest opponent who can reach the carried ball may win it, by standing near or by a slide, or foul -> state, Call."""
    has, dx, dy = state.owner, state.x - state.ball[0], state.y - state.ball[1]
    slides = state.stun > 6
    smothers = like(KEEPER, has) & in_own_box(state)
    reach = jnp.where(slides | smothers, 1.5, 1.0)
    gap2 = dx * dx + dy * dy
    hands = (has & like(KEEPER, has)).any((0, 1))
    able = others_of(has) & state.active & (slides | (state.stun == 0)) & (state.lock == 0)
    who, _ = nearest_player(gap2, able & (gap2 < reach * reach), left_first)
    tries = who.any((0, 1)) & (state.mode == NORMAL) & ~hands
    sliding, ease = (who & slides).any((0, 1)), read(who, skill)
    loose = 1.0 + 0.8 * (has & state.sprint).any((0, 1)) - 0.4 * (has & state.dribble).any((0, 1))
    share = jnp.where((who & smothers).any((0, 1)), 0.5, jnp.where(sliding, 0.35, 0.1))
    wins = tries & (u[0] < share * loose * ease)
    fouls = tries & ~wins & (u[1] < jnp.where(sliding, 0.1, 0.06) * (2.0 - ease))
    clean = wins & (u[2] < 0.6)
    owner = jnp.where(wins, who & clean, has)
    attack = read(has, like(SIDE, state.x))
    away = attack * 8.0 * (u[3:5] - 0.5)
    ball = jnp.concatenate([state.ball[:3], jnp.where(wins & ~clean, away, state.ball[3:5]), state.ball[5:]])
    booked = who & fouls & sliding & (u[5] < 0.3)
    sent_off = booked & state.yellow
    place = jnp.stack([read(has, state.x), read(has, state.y)])
    penalty = (attack * place[0] > HALF_LENGTH - BOX_LENGTH) & (jnp.abs(place[1]) < BOX_WIDTH)
    mode = jnp.where(fouls, jnp.where(penalty, PENALTY, FREE_KICK), NORMAL)
    spot = jnp.where(penalty, attack * (HALF_LENGTH - 11.0), place[0]), jnp.where(penalty, 0.0, place[1])
    call = Call(mode, jnp.where(attack > 0, 0, 1), *spot)
    state = state._replace(
        owner=owner,
        last=jnp.where(wins, who, state.last),
        lock=jnp.where(wins & has, 5, state.lock),
        offside=state.offside & ~wins,
        passing=state.passing & ~wins,
        kick=jnp.where(wins, 0, state.kick),
        ball=ball,
        yellow=state.yellow | booked,
    )
    return send_off(state, sent_off), call


def send_off(state: FootballState, who) -> FootballState:
    """Takes players out of the match."""
    side = like(SIDE, state.x)
    x, y = jnp.where(who, -60.0 * side, state.x), jnp.where(who, 45.0 * side, state.y)
    return state._replace(x=x, y=y, active=state.active & ~who)


def wind_up(state: FootballState, actions, u) -> FootballState:
    """Begins the owner's kick: the ball leaves two to four steps later. A restart not taken in time is taken all the same, and
    a keeper kicks what he holds."""
    has = state.owner
    act = read(has, actions)
    keeper = (has & like(KEEPER, has)).any((0, 1))
    act = jnp.where(keeper, jnp.where(state.wait >= KEEPER_HOLDS, HIGH, 0), act)
    late = (state.mode > 0) & (state.wait >= FORCED_AFTER) & ((act < LONG) | (act > SHOT))
    act = jnp.where(late, jnp.where(state.mode == PENALTY, SHOT, SHORT), act)
    owned, ready = has.any((0, 1)), (state.mode == NORMAL) | (state.wait >= FREE_AFTER)
    starts = owned & ready & (state.kick == 0) & (act >= LONG) & (act <= SHOT)
    stick = jnp.stack([read(has, state.stick_x), read(has, state.stick_y)])
    ahead = read(has, like(SIDE, state.x))
    none = (stick[0] == 0) & (stick[1] == 0)
    facing = jnp.stack([read(has, state.facing_x), read(has, state.facing_y)])
    stick = jnp.where(none, facing, stick)
    stick = jnp.where(keeper | late, jnp.stack([ahead, 0 * ahead]), stick)
    return state._replace(
        kick=jnp.where(starts, act, jnp.where(owned, state.kick, 0)),
        kick_wait=jnp.where(starts, 2 + (3 * u).astype(jnp.int32), state.kick_wait - 1),
        kick_stick=jnp.where(starts, stick, state.kick_stick),
        wait=state.wait + 1,
    )


def strike(state: FootballState, u, left_first, skill, offsides: bool):
    """The ball leaves the owner's foot, where it is time -> state, the kick's action or 0."""
    has = state.owner
    leaves = (state.kick > 0) & (state.kick_wait <= 0) & has.any((0, 1))
    ease, side = read(has, skill), read(has, like(SIDE, state.x))
    px, py = read(has, state.x), read(has, state.y)
    gap = length(state.x - px, state.y - py)
    pressure = jnp.clip(1.0 - jnp.where(others_of(has), gap, FAR).min((0, 1)) / 3.0, 0.0, 1.0)
    passed = aim_pass(state, px, py, gap, left_first)
    speed = length(read(has, state.vx), read(has, state.vy))
    shot, spread = aim_shot(state, px, py, side, speed, pressure, u[4])
    is_shot = state.kick == SHOT
    velocity = jnp.where(is_shot, shot, passed)
    error = gauss(u[:4]) * jnp.where(is_shot, spread, 0.018 + 0.03 * pressure) * (2.5 - 1.5 * ease)
    cos, sin = jnp.cos(error), jnp.sin(error)
    rise = jnp.where(is_shot, gauss(u[5:9]) * (0.3 + 6.0 * spread), 0.0)
    velocity = jnp.stack(
        [cos * velocity[0] - sin * velocity[1], sin * velocity[0] + cos * velocity[1], jnp.maximum(velocity[2] + rise, 0.0)]
    )
    throw = state.mode == THROW_IN
    velocity = jnp.where(throw, velocity * jnp.minimum(1.0, 14.0 / length(velocity[0], velocity[1])), velocity)
    height = jnp.where(throw, 1.8, state.ball[2])
    ball = jnp.concatenate([jnp.stack([state.ball[0], state.ball[1], height]), velocity])
    free = throw | (state.mode == CORNER) | (state.mode == GOAL_KICK)
    flags = offside_positions(state) & ~free if offsides else jnp.zeros_like(has)
    kicked = jnp.where(leaves, state.kick, 0)
    return state._replace(
        ball=jnp.where(leaves, ball, state.ball),
        owner=has & ~leaves,
        last=jnp.where(leaves, has, state.last),
        lock=jnp.where(leaves & has, 5, state.lock),
        offside=jnp.where(leaves, flags, state.offside),
        passing=(state.passing & ~has.any((0, 1))) | (leaves & ~is_shot),
        kick=jnp.where(leaves, 0, state.kick),
        mode=jnp.where(leaves, NORMAL, state.mode),
    ), kicked


def aim_pass(state: FootballState, px, py, gap, left_first) -> jax.Array:
    """The velocity (3, ...) of a pass to where the best team-mate will be, by angle and distance, as the engine rates them.

    Speeds for 8, 20 and 35 m: short 12, 20, 29; long 12.7, 24, 29; high 10, 17, 25 m/s with a top at 1.2, 2, 4 m.
    """
    long, high = state.kick == LONG, state.kick == HIGH
    sx, sy = state.kick_stick[0], state.kick_stick[1]
    power = jnp.where(long, 30.0, jnp.where(high, 28.0, 12.0))
    dx, dy = state.x - px, state.y - py
    mates = state.owner.any(1, keepdims=True) & state.active & ~state.owner
    off = length(dx - sx * power, dy - sy * power)
    angle = jnp.arccos(jnp.clip((dx * sx + dy * sy) / gap, -1.0, 1.0))
    rating = 0.8 * jnp.clip(off / 70.0, 0.0, 1.0) ** 0.8 + angle / np.pi
    mate, _ = nearest_player(rating, mates, left_first)
    flight = jnp.minimum(0.4 + 0.03 * gap, 1.5)
    alone = ~mate.any((0, 1))
    tx = jnp.where(alone, sx * power, read(mate, dx + flight * state.vx))
    ty = jnp.where(alone, sy * power, read(mate, dy + flight * state.vy))
    grow = jnp.where(long, 1.2, 1.0)
    tx, ty = (
        (jnp.clip(px + grow * tx, -HALF_LENGTH + 1, HALF_LENGTH - 1) - px),
        (jnp.clip(py + grow * ty, -HALF_WIDTH + 1, HALF_WIDTH - 1) - py),
    )
    d = length(tx, ty) + 0.1
    short_speed = jnp.clip(7.0 + 0.63 * d, 8.0, 30.0)
    speed = jnp.where(
        long, jnp.minimum(5.2 + 0.94 * d / 1.2, 29.0), jnp.where(high, jnp.minimum(5.6 + 0.55 * d, 26.0), short_speed)
    )
    rise = jnp.where(high, jnp.sqrt(2 * GRAVITY * (1.0 + 0.0025 * jnp.minimum(d, 40.0) ** 2)), 0.0)
    return jnp.stack([tx / d * speed, ty / d * speed, rise])


def aim_shot(state: FootballState, px, py, side, run, pressure, u):
    """The velocity (3, ...) of a shot, and the standard deviation of its direction (radians).

    The stick's angle to the goal chooses the side. The error grows with how far the kicker's speed is from 3.5 m/s, with how narrow
    the goal is from there, and with pressure.
    """
    dx, dy = side * HALF_LENGTH - px, -py
    d = length(dx, dy)
    sx, sy = state.kick_stick[0], state.kick_stick[1]
    turn, along = (dx * sy - dy * sx) / d, (dx * sx + dy * sy) / d
    share = jnp.clip(jnp.abs(jnp.arctan2(turn, along)) / (np.pi / 2), 0.0, 1.0)
    aim = 0.9 * GOAL_WIDTH * side * jnp.sign(turn) * jnp.clip(share, 1e-6, 1.0) ** 0.7
    dy = jnp.where(share < 1e-3, dy, dy + aim)
    d = length(dx, dy)
    speed = 29.0 + 2.0 * u
    t = d / (0.85 * speed)
    rise = (0.3 + u) / t + 0.5 * GRAVITY * t
    narrow = 1.0 - jnp.abs(dx) / d
    spread = 0.02 + 0.07 * ((run - 3.5) / 4.3) ** 2 + 0.8 * narrow + 0.04 * pressure
    return jnp.stack([dx / d * speed, dy / d * speed, rise]), spread


def offside_positions(state: FootballState) -> jax.Array:
    """The owner's team-mates nearer to the other goal than its second-last player, the ball, and the middle; (2, 11, ...) bool."""
    x = like(SIDE, state.x) * state.x
    ball = like(SIDE, state.x) * state.ball[0]
    deep = jnp.where(state.active, -x, -FAR)[::-1]  # the other team's players, in this team's frame
    first = deep.max(1, keepdims=True)
    is_first = deep >= first
    second = jnp.where(is_first, -FAR, deep).max(1, keepdims=True)
    second = jnp.where(is_first.sum(1, keepdims=True) > 1, first, second)
    line = jnp.maximum(jnp.maximum(second, ball), 0.0)
    enough = state.active[::-1].sum(1, keepdims=True) > 1
    return state.owner.any(1, keepdims=True) & ~state.owner & state.active & (x > line) & enough


def fly(state: FootballState, call: Call, u, left_first):
    """Half a step of a free ball, and who touches it -> state, Call: the one given, or else what comes of this flight."""
    dt, ball = DT / 2, state.ball
    owned, live = state.owner.any((0, 1)), call.mode == NORMAL
    vx, vy, vz = ball[3], ball[4], ball[5]
    speed = jnp.sqrt(vx * vx + vy * vy + vz * vz + 1e-12)
    ground = (ball[2] < 0.135) & (jnp.abs(vz) < 0.7)
    rolling = jnp.where(ground, ROLLING * jnp.clip((14.0 - speed) / 8.0, 0.1, 1.0), 0.0)  # a fast one skips over the grass
    keep = jnp.maximum(0.0, 1.0 - (DRAG * speed + rolling / speed) * dt)
    vx, vy, vz = keep * vx, keep * vy, jnp.where(ground, 0.0, keep * vz - GRAVITY * dt)
    z = ball[2] + vz * dt
    lands = z < RADIUS
    vz = jnp.where(lands, jnp.maximum(BOUNCE * jnp.abs(vz) - 0.06, 0.0), vz)
    vz = jnp.where(lands & (vz < 0.5), 0.0, vz)
    moved = jnp.stack([ball[0] + vx * dt, ball[1] + vy * dt, jnp.maximum(z, RADIUS), vx, vy, vz])
    rests = owned | ~live | (state.mode > 0)
    moved = jnp.where(rests, ball, moved)
    by_left = jnp.where(state.last.any((0, 1)), state.last[0].any(0), left_first)
    moved, out = leave(ball, moved, by_left)
    playing = live & (state.mode == NORMAL)
    moved = jnp.where(playing, moved, ball)
    out = out._replace(mode=jnp.where(playing, out.mode, NORMAL))
    state, offence = touch(state._replace(ball=moved), u, ~rests & (out.mode == NORMAL), left_first)
    return state, first_call(call, first_call(out, offence))


def first_call(first: Call, second: Call) -> Call:
    """The first if it is one."""
    return Call(*(jnp.where(first.mode > 0, x, y) for x, y in zip(first, second, strict=True)))


def leave(old, ball, by_left):
    """Where the ball crosses a line; `by_left`: the left team touched it last -> ball (back off a post), Call."""
    x, y, z = ball[0], ball[1], ball[2]
    over, aside = jnp.abs(x) > HALF_LENGTH, jnp.abs(y) > HALF_WIDTH
    sign, dx = jnp.where(x > 0, 1.0, -1.0), x - old[0]
    share = jnp.clip((sign * HALF_LENGTH - old[0]) / jnp.where(jnp.abs(dx) < 1e-6, 1e-6, dx), 0.0, 1.0)
    at_y, at_z = old[1] + share * (y - old[1]), old[2] + share * (z - old[2])
    goal = over & (jnp.abs(at_y) < GOAL_WIDTH) & (at_z < GOAL_HEIGHT)
    frame = (jnp.abs(at_y) < GOAL_WIDTH + 2 * RADIUS) & (at_z < GOAL_HEIGHT + 2 * RADIUS)
    post = over & ~goal & frame
    back = jnp.stack([sign * (HALF_LENGTH - 0.2), y, z, -0.6 * ball[3], ball[4], ball[5]])
    defends = jnp.where(x > 0, 1, 0)  # who defends the line that was crossed
    corner = by_left == (defends == 0)
    mode = jnp.where(goal, KICK_OFF, jnp.where(over, jnp.where(corner, CORNER, GOAL_KICK), jnp.where(aside, THROW_IN, NORMAL)))
    team = jnp.where(goal, defends, jnp.where(over, jnp.where(corner, 1 - defends, defends), jnp.where(by_left, 1, 0)))
    sign_y = jnp.where(y > 0, 1.0, -1.0)
    spot_x = jnp.where(goal, 0.0, jnp.where(over, sign * jnp.where(corner, 54.5, 0.92 * HALF_LENGTH), x))
    spot_y = jnp.where(goal, 0.0, jnp.where(over, jnp.where(corner, sign_y * 35.5, 0.0), sign_y * HALF_WIDTH))
    return jnp.where(post, back, ball), Call(jnp.where(post, NORMAL, mode), team, spot_x, spot_y)


def in_own_box(state: FootballState) -> jax.Array:
    """Who stands in the penalty area of his own goal (2, 11, ...) bool."""
    return (like(SIDE, state.x) * state.x < BOX_LENGTH - HALF_LENGTH) & (jnp.abs(state.y) < BOX_WIDTH)


def touch(state: FootballState, u, live, left_first):
    """The nearest player within reach of a free ball controls it, the likelier the slower it is for him; or it bounces off him.

    -> state, Call where he was offside.
    """
    dx, dy = state.x - state.ball[0], state.y - state.ball[1]
    gap2 = dx * dx + dy * dy
    hands = like(KEEPER, dx) & in_own_box(state)
    reach, height = jnp.where(hands, KEEPER_REACH, REACH), jnp.where(hands, HANDS, HEAD)
    able = state.active & (state.stun == 0) & (state.lock == 0) & (gap2 < reach * reach) & (state.ball[2] < height)
    who, _ = nearest_player(gap2, able & live, left_first)
    any_one = who.any((0, 1))
    rel = length(state.ball[3] - read(who, state.vx), state.ball[4] - read(who, state.vy))
    keeper, mate = (who & hands).any((0, 1)), (who.any(1) & state.last.any(1)).any(0)
    chance = jnp.where(keeper, 0.92 - 0.028 * rel, jnp.where(mate, 1.4 - 0.03 * rel, 0.85 - 0.025 * rel))
    chance = jnp.clip(chance, 0.1, 1.0)
    off_him = chance + (1.0 - chance) * jnp.where(keeper, 0.16, 0.6)
    gets, bounces = any_one & (u[0] < chance), any_one & (u[0] >= chance) & (u[0] < off_him)
    offence = (gets | bounces) & (who & state.offside).any((0, 1))
    call = Call(jnp.where(offence, FREE_KICK, NORMAL), jnp.where(who[0].any(0), 1, 0), read(who, state.x), read(who, state.y))
    turn = 2.4 * (u[1] - 0.5) + np.pi * (u[2] < 0.5)
    slow, cos, sin = 0.2 + 0.3 * u[3], jnp.cos(turn), jnp.sin(turn)
    vx, vy = state.ball[3], state.ball[4]
    away = jnp.stack([slow * (cos * vx - sin * vy), slow * (sin * vx + cos * vy), 0.5 * state.ball[5]])
    ball = jnp.concatenate([state.ball[:3], jnp.where(bounces, away, state.ball[3:])])
    return state._replace(
        owner=state.owner | (who & gets),
        last=jnp.where(gets | bounces, who, state.last),
        offside=state.offside & ~gets,
        passing=state.passing & ~gets,
        lock=jnp.where(who & bounces, 3, state.lock),
        wait=jnp.where(gets, 0, state.wait),
        kick=jnp.where(gets, 0, state.kick),
        ball=ball,
    ), call


def restart(state: FootballState, call: Call, left_first) -> FootballState:
    """Puts the ball on the spot and the team's nearest player beside it, the keeper for a goal kick; for a kick-off everyone in his
    place. The others keep their way; `keep_off` sees to the distance."""
    given, start = call.mode > 0, call.mode == KICK_OFF
    side, team = like(SIDE, state.x), call.team == like(np.int32([[0], [1]]), state.x)
    place = like(np.float32([SCALE_X, SCALE_Y]) * FORMATION, state.x)[None]
    back = jnp.where(team, place[:, :, 0], jnp.minimum(place[:, :, 0], -0.2 * SCALE_X))
    set_up = start & state.active
    x, y = jnp.where(set_up, side * back, state.x), jnp.where(set_up, side * place[:, :, 1], state.y)
    wrong = like(KEEPER, x) != (call.mode == GOAL_KICK)
    taker, _ = nearest_player(length(x - call.x, y - call.y) + 1e3 * wrong, team & state.active, left_first)
    takes = taker & given
    spot = jnp.stack([jnp.clip(call.x, -54.5, 54.5), jnp.clip(call.y, -HALF_WIDTH, HALF_WIDTH), 0 * call.x + RADIUS])
    stands = start & state.active | takes
    clear = lambda v: jnp.where(given, jnp.zeros_like(v), v)
    return state._replace(
        x=jnp.where(takes, spot[0] - 0.5 * side, x),
        y=jnp.where(takes, spot[1], y),
        vx=jnp.where(stands, 0.0, state.vx),
        vy=jnp.where(stands, 0.0, state.vy),
        facing_x=jnp.where(stands, side, state.facing_x),
        facing_y=jnp.where(stands, 0.0, state.facing_y),
        stun=jnp.where(stands, 0, state.stun),
        lock=clear(state.lock),
        offside=clear(state.offside),
        owner=jnp.where(given, taker, state.owner),
        last=jnp.where(given, taker, state.last),
        ball=jnp.where(given, jnp.concatenate([spot, jnp.zeros_like(spot)]), state.ball),
        kick=clear(state.kick),
        kick_wait=clear(state.kick_wait),
        passing=clear(state.passing),
        mode=jnp.where(given & taker.any((0, 1)), call.mode, clear(state.mode)),
        wait=clear(state.wait),
    )


def checkpoints(state: FootballState, goal):
    """The engine's checkpoint reward (2, ...), and the rings passed so far. goal (2, ...)."""
    side, has = like(SIDE, state.x), state.owner
    far = length((HALF_LENGTH - side * state.x) / SCALE_X, state.y / SCALE_Y)
    far = jnp.where(has, far, FAR).min(1)
    reached = (far < like(RINGS[:, None], far[None])).sum(0, dtype=jnp.int32)
    rings = jnp.maximum(state.rings, jnp.where(goal > 0, len(RINGS), reached))
    return 0.1 * (rings - state.rings), rings
