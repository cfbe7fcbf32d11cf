"""Rule bots for envs/football.py: easy, medium and hard, a slow dribbler, and one that passes first.

All are one rule with different numbers. The player nearest to the ball goes for it; the others keep a formation that moves with the
ball, and the second nearest presses its carrier. The carrier shoots near the goal, passes forward to who stands free when he is
pressed, and else runs at the goal.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common.runs.config import require
from envs.football_state import (
    DRIBBLE,
    FAR,
    FORMATION,
    HALF_LENGTH,
    HALF_WIDTH,
    HIGH,
    KEEPER,
    NORMAL,
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
    FootballState,
    length,
    like,
    nearest_rival,
    offside_line,
)  # fmt: skip


class Bot(NamedTuple):
    """A bot's numbers; a field may have an axis of matches (B,), so that every match has its own bot."""

    skill: float | jax.Array  # what FootballParams.skill should be for its team
    sleep: float | jax.Array  # share of the steps in which a player does nothing new
    shoot: float | jax.Array  # metres from the goal within which it shoots
    press: float | jax.Array  # metres: a rival so near makes the carrier pass
    eager: float | jax.Array  # chance of a pass in a step in which he could, pressed or not
    close: float | jax.Array  # metres from the carrier within which the second defender presses him
    sprints: float | jax.Array  # 1: sprints when that helps; 0: never
    dribbles: float | jax.Array  # 1: the carrier moves with the ball close to his foot
    slides: float | jax.Array  # chance of a slide in a step near the carrier


BOTS = {
    "easy": Bot(0.55, 0.75, 14.0, 2.0, 0.0, 4.0, 0.0, 0.0, 0.0),
    "medium": Bot(0.8, 0.4, 18.0, 3.0, 0.01, 10.0, 1.0, 0.0, 0.005),
    "hard": Bot(1.0, 0.05, 21.0, 4.0, 0.02, 20.0, 1.0, 0.0, 0.01),
    "dribbler": Bot(1.0, 0.05, 12.0, 0.0, 0.0, 10.0, 0.0, 1.0, 0.0),
    "passer": Bot(1.0, 0.05, 18.0, 9.0, 0.3, 15.0, 1.0, 0.0, 0.0),
}


def bot_of(name: str) -> Bot:
    """The bot of that name."""
    require(name in BOTS, f"bot {name!r}: must be one of {', '.join(BOTS)}")
    return BOTS[name]


def pair(left: Bot, right: Bot) -> Bot:
    """The two teams' bots as one, a leading axis of teams on every field."""
    return Bot(*(jnp.stack(jnp.broadcast_arrays(jnp.float32(x), jnp.float32(y))) for x, y in zip(left, right, strict=True)))


def bot_actions(key, state: FootballState, bots: Bot) -> jax.Array:
    """Actions (20, ...) of both teams; `bots` from `pair`."""
    bots = Bot(*(x.reshape(2, 1, *x.shape[1:], *[1] * (state.x.ndim - 1 - x.ndim)) for x in bots))
    u = chances(key, state)
    side = like(SIDE, state.x)
    x, y = side * state.x, side * state.y  # each team in its own frame
    ball = [side * state.ball[k] for k in (0, 1)] + [side * state.ball[k] for k in (3, 4)]
    ours = state.owner.any(1, keepdims=True)
    theirs = ours[::-1]
    to_x, to_y, chase, near = run_to(state, x, y, ball, ours, theirs, bots)
    carry_x, carry_y, kick = with_ball(state, x, y, u, bots)
    to_x, to_y = jnp.where(state.owner, carry_x, to_x), jnp.where(state.owner, carry_y, to_y)
    gap = length(to_x, to_y)
    walk = (gap > 1.0) | chase | state.owner
    wanted = jnp.where(walk, direction(to_x, to_y), 0)
    held = direction(side * state.stick_x, side * state.stick_y)
    quick = bots.sprints * ((gap > 6.0) | chase | (state.owner & (near > 5.0))) > 0.5
    close = state.owner & (bots.dribbles > 0.5)
    act = jnp.where(quick != state.sprint, jnp.where(quick, SPRINT, STOP_SPRINT), 0)
    act = jnp.where(close != state.dribble, jnp.where(close, DRIBBLE, STOP_DRIBBLE), act)
    act = jnp.where(wanted != held, jnp.where(wanted > 0, wanted, STOP), act)
    act = jnp.where(state.owner & (kick > 0) & (state.kick == 0) & (act == 0), kick, act)
    slide = theirs & (length(x - ball[0], y - ball[1]) < 1.6) & (u[1] < bots.slides)
    act = jnp.where(slide, SLIDE, act)
    act = jnp.where(u[0] < bots.sleep, 0, act)
    return act[:, 1:].reshape(20, *state.time.shape).astype(jnp.int32)


def chances(key, state: FootballState) -> jax.Array:
    """(2, 2, 11, ...): two numbers in [0, 1) for each player, by a hash of one word of threefry a match."""
    seed = jax.random.bits(key, state.time.shape, jnp.uint32)
    index = np.arange(44, dtype=np.uint32).reshape(2, 2, 11) + 1
    word = seed ^ like(index * np.uint32(0x9E3779B9), state.x[None])
    word = (word ^ (word >> 16)) * np.uint32(0x7FEB352D)
    word = (word ^ (word >> 15)) * np.uint32(0x846CA68B)
    return (word >> 8).astype(jnp.float32) * 2.0**-24


def direction(dx, dy) -> jax.Array:
    """The action 1-8 that runs nearest to (dx, dy), 0 where both are 0."""
    ax, ay = jnp.abs(dx), jnp.abs(dy)
    sx = jnp.where(ax > 0.4142 * ay, jnp.sign(dx), 0.0)
    sy = jnp.where(ay > 0.4142 * ax, jnp.sign(dy), 0.0)
    code = jnp.where(sy < 0, 3 + sx, jnp.where(sy > 0, 7 - sx, jnp.where(sx > 0, 5, jnp.where(sx < 0, 1, 0))))
    return code.astype(jnp.int32)


def run_to(state: FootballState, x, y, ball, ours, theirs, bots):
    """Where those without the ball run, from where they are; who chases it; and everyone's distance to the nearest rival."""
    bx, by, bvx, bvy = ball
    ahead = jnp.clip(length(bx - x, by - y) / jnp.where(theirs, 9.0, 12.0), 0.1, 1.5)
    dx, dy = bx + ahead * bvx - x, by + ahead * bvy - y
    far = jnp.where(state.active & ~like(KEEPER, x), length(dx, dy), FAR)
    best = far.min(1, keepdims=True)
    second = jnp.where(far <= best, FAR, far).min(1, keepdims=True)
    free = (state.mode == NORMAL) | ours
    chase = ~ours & ((far <= best) | ((far <= second) & theirs & (far < bots.close))) & free & (far < FAR)
    goalwards = jnp.where(theirs, 1.0, 0.0)  # come from between the ball and the own goal
    dx = dx - goalwards * jnp.clip(length(dx, dy) - 1.0, 0.0, 3.0)
    place = like(FORMATION * np.float32([SCALE_X, SCALE_Y]), x)[None]
    shift = jnp.where(ours, 12.0, jnp.where(theirs, -8.0, 0.0))
    home_x = jnp.clip(place[:, :, 0] + 0.75 * bx + shift + 14.0, -HALF_LENGTH + 8, HALF_LENGTH - 6)
    line = offside_line(state)
    home_x = jnp.where(ours | (home_x > line), jnp.minimum(home_x, line - 0.7), home_x)
    home_y = jnp.clip(place[:, :, 1] + 0.25 * by, -HALF_WIDTH + 2, HALF_WIDTH - 2)
    return jnp.where(chase, dx, home_x - x), jnp.where(chase, dy, home_y - y), chase, nearest_rival(state)[0]


def with_ball(state: FootballState, x, y, u, bots):
    """What the carrier does: where he runs to, from where he is, and the kick he wants or 0. All (2, 11, ...)."""
    has = state.owner
    near = nearest_rival(state)[0]
    gx = HALF_LENGTH - x
    goal = length(gx, y)
    px, py = (jnp.where(has, v, 0).sum(1, keepdims=True) for v in (x, y))
    dx, dy = x - px, y - py
    gap = length(dx, dy)
    onside = (x < offside_line(state) + 0.0) | (x < px)
    mates = state.active & ~has & ~like(KEEPER, x) & (gap > 5.0) & (gap < 30.0) & onside
    value = jnp.where(mates, 0.6 * dx + 1.5 * jnp.minimum(near, 6.0) - 0.1 * jnp.abs(gap - 14.0), -FAR)
    best = value.max(1, keepdims=True)
    to = mates & (value >= best)
    mate_x, mate_y = (jnp.where(to, v, 0).sum(1, keepdims=True) for v in (dx, dy))
    there = to.any(1, keepdims=True)
    alone = (near > bots.press) & (state.mode == NORMAL)
    passes = there & (~alone | (u[1] < bots.eager)) & ((best > 6.0) | (near < 1.5) | (state.mode > 0))
    shoots = (goal < bots.shoot) & (jnp.abs(y) < 0.5 * gx + 6.0)
    far_pass = length(mate_x, mate_y) > 22.0
    kick = jnp.where(shoots, SHOT, jnp.where(passes, jnp.where(far_pass, HIGH, SHORT), 0))
    aside = jnp.where(near < 4.0, 0.7 * (y - near_y(state, y)), 0.0)  # around the nearest rival
    corner = jnp.where(u[0] < 0.5, 2.5, -2.5)
    run_x, run_y = gx, jnp.where(gx > 16.0, -0.3 * y + aside * 3.0, -y)
    run_x = jnp.where(shoots, gx, jnp.where(passes, mate_x, run_x))
    return run_x, jnp.where(shoots, corner * 3.0 - y, jnp.where(passes, mate_y, run_y)), kick


def near_y(state: FootballState, y) -> jax.Array:
    """The y of the rival nearest to the carrier, in the carrier's team's frame (2, 1, ...)."""
    side = like(SIDE, state.x)
    px, py = (jnp.where(state.owner, v, 0).sum((0, 1)) for v in (state.x, state.y))
    gap = jnp.where(state.active, (state.x - px) ** 2 + (state.y - py) ** 2, FAR)
    least = gap <= gap.min(1, keepdims=True)
    return side * (jnp.where(least, state.y, 0).sum(1, keepdims=True))[::-1]
