"""Short clips of video to learn from, without actions: a world of a moving dot, or videos of one's own.

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

MOVES = np.array([[0, 0], [0, -1], [0, 1], [-1, 0], [1, 0]], np.int32)  # the dot: stay, left, right, up, down (rows down, columns)
HELD_OUT = 0.1  # share of one's own videos, the last ones


class Clips(NamedTuple):
    """Frames, and the class of every transition (zeros where it is not known)."""

    frames: jax.Array  # (num, T, H, W, 3) uint8
    change: jax.Array  # (num, T - 1) int32


class Source(NamedTuple):
    """Where clips come from, as pure functions. `world` is what must survive from one draw to the next."""

    shape: tuple[int, int]  # H, W
    num_changes: int  # classes of Clips.change
    init: Callable[[jax.Array], Any]  # key -> world
    draw: Callable[[jax.Array, Any, int], tuple[Clips, Any]]  # key, world, num -> clips to train on, world
    held_out: Callable[[jax.Array, int], Clips]  # key, num -> clips never trained on


def make_source(data: str, num_frames: int, size: int) -> Source:
    """`dots`, or the path of an .npz of videos. Raises UsageError for a file that holds none."""
    return dots(num_frames, size) if data == "dots" else videos(Path(data), num_frames)


# --- a world of one dot


def dots(num_frames: int, size: int) -> Source:
    """A square of size / 8 pixels on plain ground; an action moves it by its own size, walls stop it. `change` is the action."""
    cell = size // 8

    def clip(key):
        key_place, key_colour, key_action = jax.random.split(key, 3)
        action = jax.random.randint(key_action, (num_frames - 1,), 0, len(MOVES))
        start = jax.random.randint(key_place, (2,), 0, 8)

        def step(place, action):
            place = jnp.clip(place + jnp.asarray(MOVES)[action], 0, 7)
            return place, place

        _, places = jax.lax.scan(step, start, action)
        places = jnp.concatenate([start[None], places])  # (T, 2) row, column
        ground, dot = jax.random.randint(key_colour, (2, 3), jnp.array([[0], [160]]), jnp.array([[96], [256]]))
        near = jnp.arange(size) // cell == places[..., None]  # (T, 2, size)
        here = near[:, 0, :, None] & near[:, 1, None, :]
        return jnp.where(here[..., None], dot, ground).astype(jnp.uint8), action

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
        return Clips(frames, jnp.zeros((num, num_frames - 1), jnp.int32))

    def draw(key, world, num):
        return cut(key, 0, len(found) - num_held, num), world

    return Source(found.shape[2:4], 1, lambda key: (), draw, lambda key, num: cut(key, len(found) - num_held, len(found), num))
