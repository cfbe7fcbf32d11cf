"""Short clips of video to learn from, without actions: CoinRun, a world of a moving dot, or videos of one's own.

A source gives clips of frames (num, T, H, W, 3) uint8 and, for evaluation only, what truly happened between each two frames.
"""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common.config import require
from common.env import select
from envs.coinrun import PIXELS, CoinRun, EnvParams
from envs.coinrun_expert import HOLD, make_planner

MOVES = np.array([[0, 0], [0, -1], [0, 1], [-1, 0], [1, 0]], np.int32)  # the dot: stay, left, right, up, down (rows down, columns)
POOL, HELD_OUT_LEVELS, LEAD = 256, 64, 128  # games going on; levels tested on; the most steps played before a game's first clip
EXPERT_POOL, EXPERT_LEAD = 64, 48  # the same of an expert, who thinks for long and wins soon
HELD_OUT = 0.1  # share of one's own videos, the last ones


class Clips(NamedTuple):
    """Frames, and the class and the cause of every transition (zeros where they are not known)."""

    frames: jax.Array  # (num, T, H, W, 3) uint8
    change: jax.Array  # (num, T - 1) int32
    action: jax.Array  # (num, T - 1) int32


class Source(NamedTuple):
    """Where clips come from, as pure functions. `world` is what must survive from one draw to the next."""

    shape: tuple[int, int]  # H, W
    num_changes: int  # classes of Clips.change
    init: Callable[[jax.Array], Any]  # key -> world
    draw: Callable[[jax.Array, Any, int], tuple[Clips, Any]]  # key, world, num -> clips to train on, world
    held_out: Callable[[jax.Array, int], Clips]  # key, num -> clips never trained on


def make_source(data: str, num_frames: int, size: int, num_levels: int, sticky: float) -> Source:
    """`coinrun`, `dots`, or the path of an .npz of videos. Raises UsageError for a file that holds none."""
    if data == "coinrun":
        return coinrun(num_frames, num_levels, sticky)
    return dots(num_frames, size) if data == "dots" else videos(Path(data), num_frames)


# --- CoinRun


class Games(NamedTuple):
    """Games of CoinRun that go on from clip to clip."""

    state: Any  # EnvState (num, ...)
    plan: jax.Array  # (num, P) int32: keys that are pressed in turn


def random_plan(sticky: float):
    """A plan of one key: with probability `sticky` the last one, else any of the 15."""

    def plan(key, state, last, params):
        key_new, key_keep = jax.random.split(key)
        return jnp.where(jax.random.uniform(key_keep) < sticky, last, jax.random.randint(key_new, (1,), 0, 15))

    return plan


def expert_plan(env: CoinRun):
    """The first HOLD keys of an expert's plan."""
    plan = make_planner(env)
    return lambda key, state, last, params: plan(key, state, params)[:HOLD]


def coinrun(num_frames: int, num_levels: int, sticky: float, expert: bool = False) -> Source:
    """Hard CoinRun, levels 0 .. num_levels - 1, and the next HELD_OUT_LEVELS to test on (Genie, appendix F.1).

    The policy repeats its action with probability `sticky` and else takes any of the 15, or is an expert. A game that ends within a
    clip stays at its last frame, and begins anew before its next clip. `change`: in which of 9 directions the player moved, by over
    half a pixel.
    """
    env = CoinRun()
    train, test = (EnvParams(env.levels(first + np.arange(num))) for first, num in ((0, num_levels), (num_levels, HELD_OUT_LEVELS)))
    make_plan, keys = (expert_plan(env), HOLD) if expert else (random_plan(sticky), 1)
    pool, longest = (EXPERT_POOL, EXPERT_LEAD) if expert else (POOL, LEAD)

    def step(key, t, games: Games, done, params):
        """Step t of the games that are not done -> games, which are done, actions. Plans are made at every `keys`-th t."""
        anew = lambda: jax.vmap(make_plan, (0, 0, 0, None))(jax.random.split(key, len(done)), games.state, games.plan, params)
        plan = jax.lax.cond(t % keys == 0, anew, lambda: games.plan)
        action = plan[:, t % keys]
        _, state, _, ended, _ = jax.vmap(env.step_env, (None, 0, 0, None))(key, games.state, action, params)
        state = jax.vmap(select)(done, games.state, state)
        return Games(state, plan), done | ended | (state.time >= params.max_steps_in_episode), action

    def start(level, params) -> Games:
        return Games(jax.vmap(env.reset_to_level, (0, None))(level, params), jnp.full((len(level), keys), 4))

    def begin(key, num, params) -> Games:
        """Games on levels of their own, each some steps from its start."""
        key_level, key_lead, key_play = jax.random.split(key, 3)
        lead = jax.random.randint(key_lead, (num,), 0, longest)
        first = start(jax.random.randint(key_level, (num,), 0, params.levels.themes.shape[0]), params)

        def play(carry, inputs):
            games, done = carry
            key, t = inputs
            games, ended, _ = step(key, t, games, done | (t >= lead), params)
            return (games, done | (ended & (t < lead))), None

        carry = (first, jnp.zeros(num, bool))
        (games, done), _ = jax.lax.scan(play, carry, (jax.random.split(key_play, longest), jnp.arange(longest)))
        return jax.vmap(select)(done, first, games)

    def film(key, games: Games, params) -> tuple[Clips, Games, jax.Array]:
        """num_frames frames of every game -> clips, games, which of them are over."""

        def frame(carry, inputs):
            games, done = carry
            image = jax.vmap(env.render, (0, None))(games.state, params)
            place = jnp.stack([games.state.x, games.state.y])
            games, done, action = step(*inputs, games, done, params)
            return (games, done), (image, place, action)

        carry = (games, jnp.zeros(games.plan.shape[0], bool))
        inputs = (jax.random.split(key, num_frames), jnp.arange(num_frames))
        (games, done), (frames, place, action) = jax.lax.scan(frame, carry, inputs)
        moved = jnp.diff(place, axis=0) * (PIXELS / 13)  # (T - 1, 2, num) pixels
        way = jnp.where(jnp.abs(moved) > 0.5, jnp.sign(moved), 0).astype(jnp.int32) + 1
        return Clips(frames.swapaxes(0, 1), (3 * way[:, 0] + way[:, 1]).T, action[:-1].T), games, done

    def draw(key, world: Games, num):
        key_which, key_film, key_begin = jax.random.split(key, 3)
        which = jax.random.choice(key_which, pool, (num,), replace=False)
        clips, games, done = film(key_film, jax.tree.map(lambda x: x[which], world), train)
        games = jax.vmap(select)(done, start(jax.random.randint(key_begin, (num,), 0, num_levels), train), games)
        return clips, jax.tree.map(lambda old, new: old.at[which].set(new), world, games)

    def held_out(key, num):
        key_begin, key_film = jax.random.split(key)
        return film(key_film, begin(key_begin, num, test), test)[0]

    return Source((PIXELS, PIXELS), 9, lambda key: begin(key, pool, train), draw, held_out)


# --- a world of one dot


def dots(num_frames: int, size: int) -> Source:
    """A square of size / 8 pixels on plain ground; an action moves it by its own size, walls stop it. `change` is the move made."""
    cell = size // 8

    def clip(key):
        key_place, key_colour, key_action = jax.random.split(key, 3)
        action = jax.random.randint(key_action, (num_frames - 1,), 0, len(MOVES))
        start = jax.random.randint(key_place, (2,), 0, 8)

        def step(place, action):
            after = jnp.clip(place + jnp.asarray(MOVES)[action], 0, 7)
            return after, (after, jnp.where((after == place).all(), 0, action))

        _, (places, change) = jax.lax.scan(step, start, action)
        places = jnp.concatenate([start[None], places])  # (T, 2) row, column
        ground, dot = jax.random.randint(key_colour, (2, 3), jnp.array([[0], [160]]), jnp.array([[96], [256]]))
        near = jnp.arange(size) // cell == places[..., None]  # (T, 2, size)
        here = near[:, 0, :, None] & near[:, 1, None, :]
        return jnp.where(here[..., None], dot, ground).astype(jnp.uint8), change, action

    def draw(key, world, num):
        return Clips(*jax.vmap(clip)(jax.random.split(key, num))), world

    return Source((size, size), len(MOVES), lambda key: (), draw, lambda key, num: draw(key, (), num)[0])


# --- videos of one's own


def load_videos(path: Path, num_frames: int) -> np.ndarray:
    """The first array of an .npz file, which must be (videos, frames, H, W, 3) uint8 with at least `num_frames` frames each.

    Raises UsageError, one line, for anything else.
    """
    require(path.exists(), f"--data {path}: there is no such file; give dots, or an .npz of videos")
    try:
        with np.load(path, allow_pickle=False) as held:
            name = held.files[0]
            found = held[name]
    except (OSError, ValueError, IndexError, zipfile.BadZipFile, AttributeError) as error:
        require(False, f"--data {path}: not an .npz file of arrays ({error})")
    what = f"--data {path}: {name} is {found.dtype} {list(found.shape)}"
    fits = found.ndim == 5 and found.shape[-1] == 3 and found.dtype == np.uint8
    require(fits, f"{what}: must be uint8 (videos, frames, height, width, 3)")
    require(found.shape[1] >= num_frames, f"{what}: videos need at least --num-frames {num_frames} frames")
    require(len(found) >= 2, f"{what}: at least two videos are needed, one of them to test on")
    return found


def videos(path: Path, num_frames: int) -> Source:
    """Clips that begin anywhere in any of a file's videos; the last tenth of the videos (at least one) is held out."""
    found = load_videos(path, num_frames)
    num_held = max(1, int(HELD_OUT * len(found)))
    last = found.shape[1] - num_frames

    def cut(key, low, high, num):
        held = jnp.asarray(found)
        key_video, key_start = jax.random.split(key)
        video = jax.random.randint(key_video, (num,), low, high)
        start = jax.random.randint(key_start, (num,), 0, last + 1)
        frames = held[video[:, None], start[:, None] + jnp.arange(num_frames)]
        unknown = jnp.zeros((num, num_frames - 1), jnp.int32)
        return Clips(frames, unknown, unknown)

    def draw(key, world, num):
        return cut(key, 0, len(found) - num_held, num), world

    return Source(found.shape[2:4], 1, lambda key: (), draw, lambda key, num: cut(key, len(found) - num_held, len(found), num))
