"""The state of envs/football.py's matches, what players see of it, and pictures."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SCALE_X, SCALE_Y = 54.4, 83.6  # metres for one unit of a level
HALF_LENGTH, HALF_WIDTH = 55.0, 36.0
GOAL_WIDTH, GOAL_HEIGHT = 3.7, 2.5  # half the width
BOX_LENGTH, BOX_WIDTH = 16.5, 20.15  # of the penalty area; half the width
DISTANCE = 9.15  # opponents' at a restart, and the circle's radius
NUM_ACTIONS, LEVEL_SIZE = 19, 42
LONG, HIGH, SHORT, SHOT, SPRINT, STOP, STOP_SPRINT, SLIDE, DRIBBLE, STOP_DRIBBLE = range(9, 19)
NORMAL, KICK_OFF, GOAL_KICK, FREE_KICK, CORNER, THROW_IN, PENALTY = range(7)

DT = 0.1
FAR = 1e6
SIDE = np.float32([[1], [-1]])  # (2, 1): where each team attacks
KEEPER = np.arange(11)[None] == 0  # (1, 11)
# the left team at its own kick-off, and at the other's, in units of a level; the first few make a good small team
FORMATION = [(-0.98, 0), (-0.02, 0), (-0.42, 0.05), (-0.2, -0.05), (-0.15, 0.28), (-0.15, -0.28), (-0.42, -0.1), (-0.36, 0.22),
             (-0.36, -0.25), (-0.24, 0.1), (-0.05, 0.1)]  # fmt: skip
FORMATION = np.float32(FORMATION)


class FootballState(NamedTuple):
    """Axes of matches come last. Team 0 plays towards +x."""

    x: jax.Array  # (2, 11) metres; a team's keeper is its first
    y: jax.Array
    vx: jax.Array  # (2, 11) m/s
    vy: jax.Array
    facing_x: jax.Array  # (2, 11) a unit vector
    facing_y: jax.Array
    stick_x: jax.Array  # (2, 11) the direction last chosen, a unit vector or 0
    stick_y: jax.Array
    sprint: jax.Array  # (2, 11) bool
    dribble: jax.Array  # (2, 11) bool
    stun: jax.Array  # (2, 11) int32: steps until he is on his feet again
    lock: jax.Array  # (2, 11) int32: steps until he may touch the ball again
    fatigue: jax.Array  # (2, 11) in [0, 1]
    offside: jax.Array  # (2, 11) bool: was in an offside position when a team-mate played the ball
    yellow: jax.Array  # (2, 11) bool
    active: jax.Array  # (2, 11) bool
    owner: jax.Array  # (2, 11) bool: who has the ball, at most one
    last: jax.Array  # (2, 11) bool: who touched it last, at most one
    ball: jax.Array  # (6,): x, y, z in metres, then m/s
    kick: jax.Array  # () int32: the owner's action 9-12 under way, or 0
    kick_wait: jax.Array  # () int32: steps until the ball leaves
    kick_stick: jax.Array  # (2,): the direction held when it was chosen
    passing: jax.Array  # () bool: the ball is on its way by a pass
    mode: jax.Array  # () int32: NORMAL ... PENALTY
    wait: jax.Array  # () int32: steps since the restart was given, or since the keeper caught the ball
    score: jax.Array  # (2,) int32
    rings: jax.Array  # (2,) int32: checkpoints passed
    time: jax.Array  # () int32


def like(values, array) -> np.ndarray:
    """`values` with axes of matches, so that it goes with `array`."""
    values = np.asarray(values)
    return values.reshape(*values.shape, *[1] * (array.ndim - values.ndim))


def length(x, y) -> jax.Array:
    return jnp.sqrt(x * x + y * y + 1e-12)


# --- what is seen


def framed(state: FootballState):
    """Each team's view of every player, 4 x (2, 22, ...): x, y, vx, vy in its frame, its own eleven first; 0 for the inactive."""
    side = like(SIDE[:, None], state.x[None])[:, 0]
    both = lambda v: jnp.concatenate([v, v[::-1]], axis=1)
    on = both(state.active)
    return [side * jnp.where(on, both(v), 0.0) for v in (state.x, state.y, state.vx, state.vy)]


def team_view(state: FootballState, left) -> jax.Array:
    """What a team sees as a whole, in its frame (2, 128, ...).

    x, y (by the pitch's half), vx, vy (by 10 m/s), each of its own 11, then of the other 11; the ball's place and velocity (6);
    nobody, we or they have it (3); the mode (7); who has the ball (22); the goals' difference by 5; the share of time `left`.
    """
    x, y, vx, vy = framed(state)
    side = like(SIDE, x)
    ball = jnp.stack([side[:, 0] * state.ball[k] for k in (0, 1)] + [state.ball[2] + 0 * side[:, 0]], axis=1)
    motion = jnp.stack([side[:, 0] * state.ball[k] for k in (3, 4)] + [state.ball[5] + 0 * side[:, 0]], axis=1)
    ball, motion = ball / like(np.float32([HALF_LENGTH, HALF_WIDTH, 5]), ball[0]), motion / 20.0
    own = state.owner.any(1)
    has = jnp.concatenate([state.owner, state.owner[::-1]], axis=1)
    flags = jnp.stack([~own.any(0) & jnp.ones_like(own), own, own[::-1]], axis=1)
    mode = state.mode == like(np.arange(7), state.mode[None])
    mode = jnp.broadcast_to(mode, (2, *mode.shape))
    ahead = (state.score - state.score[::-1])[:, None] / 5.0
    left = jnp.broadcast_to(left, ahead.shape)
    parts = [x / HALF_LENGTH, y / HALF_WIDTH, vx / 10.0, vy / 10.0, ball, motion, flags, mode, has, ahead, left]
    return jnp.concatenate([p.astype(jnp.float32) for p in parts], axis=1)


def offside_line(state: FootballState) -> jax.Array:
    """How far forward a team may stand, in its frame (2, 1, ...)."""
    side = like(SIDE, state.x)
    deep = jnp.where(state.active, -side * state.x, -FAR)[::-1]
    first = deep.max(1, keepdims=True)
    second = jnp.where(deep >= first, -FAR, deep).max(1, keepdims=True)
    return jnp.maximum(jnp.maximum(second, side * state.ball[0]), 0.0)


def nearest_rival(state: FootballState):
    """Everyone's distance to the nearest of the other team, and the way to him, 3 x (2, 11, ...), metres."""
    (ax, bx), (ay, by) = state.x, state.y
    dx, dy = bx - ax[:, None], by - ay[:, None]  # (11, 11, ...): from left to right
    gap = dx * dx + dy * dy
    found = []
    for axis, sign in ((1, 1.0), (0, -1.0)):
        least = gap.min(axis, keepdims=True)
        here = gap <= least
        found.append(jnp.stack([jnp.sqrt(least.squeeze(axis)), *(sign * jnp.where(here, d, 0.0).sum(axis) for d in (dx, dy))]))
    return jnp.stack(found, axis=1)


def own_view(state: FootballState) -> jax.Array:
    """What each player adds to his team's view, in its frame (2, 10, 43, ...).

    x, y, vx, vy, facing (2), direction held (2); sprint, dribble, tiredness, booked, offside, off his feet, has the ball, his kick
    is under way; the ball from him (3) and how far; the goal from him (2) and how far; how far the nearest opponent is; which way
    the ball will be when he could reach it (2), and the nearest opponent is (2); whether he is his team's nearest to the ball, and
    how much farther than the nearest; how far the offside line is before him; whether he has just kicked; how long a restart has
    waited; which of the ten he is (10).
    """
    side = like(SIDE, state.x)
    x, y = side * state.x, side * state.y
    bx, by = side * state.ball[0] - x, side * state.ball[1] - y
    gx = HALF_LENGTH - x
    rival, rx, ry = nearest_rival(state)
    far = length(bx, by)
    soon = jnp.clip(far / 10.0, 0.1, 1.5)  # seconds, at 10 m/s
    lx, ly = bx + soon * side * state.ball[3], by + soon * side * state.ball[4]
    best = jnp.where(state.active & ~like(KEEPER, x), far, FAR).min(1, keepdims=True)
    unit = lambda dx, dy: (dx / jnp.maximum(length(dx, dy), 1e-3), dy / jnp.maximum(length(dx, dy), 1e-3))
    motion = (state.vx / 10, state.vy / 10, state.facing_x, state.facing_y, state.stick_x, state.stick_y)
    parts = [
        *(x / HALF_LENGTH, y / HALF_WIDTH, *(side * v for v in motion)),
        *(state.sprint, state.dribble, state.fatigue, state.yellow, state.offside, state.stun > 0),
        *(state.owner, state.owner & (state.kick > 0), bx / 20, by / 20, state.ball[2] / 5, far / 20),
        *(gx / 20, -y / 20, length(gx, y) / 20, jnp.minimum(rival, 30.0) / 10, *unit(lx, ly), *unit(side * rx, side * ry)),
        *(far <= best, jnp.minimum(far - best, 30.0) / 10, jnp.clip(offside_line(state) - x, -30.0, 30.0) / 20),
        *(state.lock > 0, jnp.minimum(state.wait, 30) / 30.0 * (state.mode > 0)),
    ]
    own = jnp.stack([jnp.broadcast_to(p, x.shape).astype(jnp.float32) for p in parts], axis=2)[:, 1:]
    own = jnp.where(state.active[:, 1:, None], own, 0.0)
    who = jnp.broadcast_to(like(np.eye(10, dtype=np.float32)[None], own), (2, 10, 10, *state.time.shape))
    return jnp.concatenate([own, who], axis=2)


OWN_VIEW = 43
TEAM_VIEW = 128 + OWN_VIEW


def simple115(state: FootballState) -> jax.Array:
    """The engine's `simple115v2` for each player (20, 115, ...), in its units: velocities by step; the ball's height in metres.

    xy of the own 11 (-1 for the inactive), their velocities, the same of the other 11; the ball and its velocity (6); nobody, we,
    they have it (3); which of the 11 one is; the mode (7).
    """
    x, y, vx, vy = framed(state)
    on = jnp.concatenate([state.active, state.active[::-1]], axis=1)
    pairs = lambda a, b: jnp.stack([a, b], axis=2).reshape(2, 44, *state.time.shape)
    spots = pairs(jnp.where(on, x / SCALE_X, -1.0), jnp.where(on, y / SCALE_Y, -1.0))
    speeds = pairs(vx * DT / SCALE_X, vy * DT / SCALE_Y)
    view = team_view(state, jnp.float32(0))
    units = np.float32([HALF_LENGTH / SCALE_X, HALF_WIDTH / SCALE_Y, 5, 20 * DT / SCALE_X, 20 * DT / SCALE_Y, 20 * DT])
    ball = view[:, 88:94] * like(units, view[0])
    head = [spots[:, :22], speeds[:, :22], spots[:, 22:], speeds[:, 22:], ball, view[:, 94:97]]
    spread = lambda v: jnp.broadcast_to(v[:, None], (2, 10, *v.shape[1:]))
    who = jnp.broadcast_to(like(np.eye(11, dtype=np.float32)[None, 1:], view[:, None]), (2, 10, 11, *state.time.shape))
    return jnp.concatenate([spread(jnp.concatenate(head, axis=1)), who, spread(view[:, 97:104])], axis=2).reshape(
        20, 115, *state.time.shape
    )


# --- pictures

PIXELS = 4  # a metre
MARGIN = 4  # metres
WIDTH, HEIGHT = int(2 * (HALF_LENGTH + MARGIN) * PIXELS), int(2 * (HALF_WIDTH + MARGIN) * PIXELS)
TEAM_COLOURS = np.float32([[226, 60, 60], [70, 120, 250]])
KEEPER_COLOURS = np.float32([[255, 170, 60], [120, 220, 240]])


def _pitch() -> np.ndarray:
    """Mown grass and white lines (HEIGHT, WIDTH, 3) float32."""
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32) / PIXELS
    x, y = x - HALF_LENGTH - MARGIN, y - HALF_WIDTH - MARGIN
    image = np.float32([52, 122, 60]) + 6.0 * (np.floor(x / 5.5) % 2)[..., None]
    near = lambda a: np.abs(a) < 0.15
    field = (np.abs(x) < HALF_LENGTH + 0.15) & (np.abs(y) < HALF_WIDTH + 0.15)
    lines = near(np.abs(x) - HALF_LENGTH) | near(np.abs(y) - HALF_WIDTH) | near(x) | near(np.hypot(x, y) - DISTANCE)
    for deep, wide in ((BOX_LENGTH, BOX_WIDTH), (5.5, 9.15)):
        edge = HALF_LENGTH - deep
        lines |= near(np.abs(x) - edge) & (np.abs(y) < wide) | near(np.abs(y) - wide) & (np.abs(x) > edge)
    image[lines & field] = 220
    image[(np.abs(x) > HALF_LENGTH) & (np.abs(x) < HALF_LENGTH + 2) & (np.abs(y) < GOAL_WIDTH)] = 170
    return image


PITCH = _pitch()


def picture(state: FootballState) -> jax.Array:
    """One match from above (HEIGHT, WIDTH, 3) uint8: left red, right blue, keepers lighter, the ball white with its shadow."""
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32) / PIXELS
    x, y = x - HALF_LENGTH - MARGIN, y - HALF_WIDTH - MARGIN
    image = jnp.asarray(PITCH)
    disc = lambda image, at, radius, colour: jnp.where((jnp.hypot(x - at[0], y - at[1]) < radius)[..., None], colour, image)

    def player(image, who):
        px, py, fx, fy, colour, active, has = who
        shown = disc(image, (px, py), jnp.where(has, 1.5, 1.25), np.float32([20, 25, 20]))
        shown = disc(shown, (px, py), 1.0, colour)
        shown = disc(shown, (px + 0.9 * fx, py + 0.9 * fy), 0.4, colour * 0.6)
        return jnp.where(active, shown, image), None

    colours = np.where(KEEPER[..., None], KEEPER_COLOURS[:, None], TEAM_COLOURS[:, None])
    flat = (state.x, state.y, state.facing_x, state.facing_y, colours, state.active, state.owner)
    image, _ = jax.lax.scan(player, image, jax.tree.map(lambda v: jnp.asarray(v).reshape(22, *v.shape[2:]), flat))
    bx, by, z = state.ball[0], state.ball[1], state.ball[2]
    image = disc(image, (bx, by), 0.6, np.float32([30, 60, 30]))
    return disc(image, (bx, by - 0.8 * z), 0.6, np.float32([255, 255, 255])).astype(jnp.uint8)
