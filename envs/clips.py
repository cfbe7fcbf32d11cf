"""Short clips of video to learn from, without actions: CoinRun, a world of a moving dot, or videos of one's own.

A source gives clips of frames (num, T, H, W, 3) uint8 and, for evaluation only, what truly happened between each two frames.
"""

import zipfile
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common.env import select
from common.runs.config import UsageError, require
from common.runs.plot import fit_image
from envs.coinrun import PIXELS, CoinRun, EnvParams, difficulty
from envs.coinrun_expert import make_expert

MOVES = np.array([[0, 0], [0, -1], [0, 1], [-1, 0], [1, 0]], np.int32)  # the dot: stay, left, right, up, down (rows down, columns)
POOL, HELD_OUT_LEVELS, LEAD = 256, 64, 128  # games going on; levels tested on; the most steps played before a game's first clip
EXPERT_POOL, EXPERT_LEAD = 64, 48  # the same of an expert, who thinks for long and wins soon
HELD_OUT = 0.1  # share of one's own videos, the last ones
VIDEO_FILES, MAX_BYTES = (".mp4", ".webm", ".mov", ".avi", ".mkv"), 1 << 30  # of all frames: they are part of the compiled program


class Clips(NamedTuple):
    """Frames, and the class and the cause of every transition (zeros where they are not known)."""

    frames: jax.Array  # (num, T, H, W, 3) uint8
    change: jax.Array  # (num, T - 1) int32
    action: jax.Array  # (num, T - 1) int32; -1 where the game was over


class Game(NamedTuple):
    """The true game behind clips, on levels never trained on, to be played beside a model of it."""

    num_levels: int
    num_actions: int
    nothing: int  # the action that presses no key
    arrows: tuple[str, ...]  # of every class of Clips.change
    start: Callable[[jax.Array], Any]  # level -> state
    step: Callable[[Any, jax.Array], tuple[Any, jax.Array]]  # state, action -> state, which of OUTCOMES
    render: Callable[[Any], jax.Array]  # state -> (H, W, 3) uint8
    grades: Any = 1  # (num_levels,) int32 in [1, 3]: how hard each level is


OUTCOMES = ("", "the true game is won", "the true game is lost")


class Source(NamedTuple):
    """Where clips come from, as pure functions. `world` is what must survive from one draw to the next."""

    shape: tuple[int, int]  # H, W
    num_changes: int  # classes of Clips.change
    init: Callable[[jax.Array], Any]  # key -> world
    draw: Callable[[jax.Array, Any, int], tuple[Clips, Any]]  # key, world, num -> clips to train on, world
    held_out: Callable[[jax.Array, int], Clips]  # key, num -> clips never trained on
    game: Game | None = None
    most: int = 2**31  # clips of one draw


def make_source(data: str, num_frames: int, size: int, num_levels: int, sticky: float, blank: bool = False) -> Source:
    """`coinrun`, `expert` (CoinRun well played), `dots`, or the path of an .npz or a folder of videos.

    `blank`: CoinRun's levels are not made, and only the shapes of what it gives are right. Raises UsageError for a path that holds
    none.
    """
    if data in ("coinrun", "expert"):
        return coinrun(num_frames, num_levels, sticky, data == "expert", blank)
    return dots(num_frames, size) if data == "dots" else videos(Path(data), num_frames, size)


# --- CoinRun


class Games(NamedTuple):
    """Games of CoinRun that go on from clip to clip."""

    state: Any  # EnvState (num, ...)
    action: jax.Array  # (num,) int32: the last


def sticky_policy(sticky: float):
    """With probability `sticky` the last action, else any of the 15."""

    def policy(key, state, last, params):
        key_new, key_keep = jax.random.split(key)
        new = jax.random.randint(key_new, (), 0, 15, jnp.int32)
        return jnp.where(jax.random.uniform(key_keep, dtype=jnp.float32) < sticky, last, new)

    return policy


def expert_policy(env: CoinRun):
    """What the expert does, whatever the last action was."""
    policy = make_expert(env)
    return lambda key, state, last, params: policy(key, state, params)


def coinrun(num_frames: int, num_levels: int, sticky: float, expert: bool = False, blank: bool = False) -> Source:
    """Hard CoinRun, levels 0 .. num_levels - 1, and the next HELD_OUT_LEVELS to test on (Genie, appendix F.1).

    The policy repeats its action with probability `sticky` and else takes any of the 15, or is an expert. A game that ends within a
    clip stays at its last frame, and begins anew before its next clip. `change`: in which of 9 directions the player moved, by over
    half a pixel.
    """
    env = CoinRun()
    banks = ((0, num_levels), (num_levels, HELD_OUT_LEVELS))
    train, test = (EnvParams(env.levels(first + np.arange(num), blank)) for first, num in banks)
    policy = expert_policy(env) if expert else sticky_policy(sticky)
    pool, longest = (EXPERT_POOL, EXPERT_LEAD) if expert else (POOL, LEAD)

    def step(key, games: Games, done, params):
        """One step of the games that are not done -> games, which are done, actions."""
        keys = jax.random.split(key, len(done))
        action = jax.vmap(policy, (0, 0, 0, None))(keys, games.state, games.action, params)
        _, state, _, ended, _ = jax.vmap(env.step_env, (None, 0, 0, None))(key, games.state, action, params)
        state = jax.vmap(select)(done, games.state, state)
        return Games(state, action), done | ended | (state.time >= params.max_steps_in_episode), action

    def start(level, params) -> Games:
        return Games(jax.vmap(env.reset_to_level, (0, None))(level, params), jnp.full(len(level), 4, jnp.int32))

    def begin(key, num, params) -> Games:
        """Games on levels of their own, each some steps from its start."""
        key_level, key_lead, key_play = jax.random.split(key, 3)
        lead = jax.random.randint(key_lead, (num,), 0, longest, jnp.int32)
        first = start(jax.random.randint(key_level, (num,), 0, params.levels.themes.shape[0], jnp.int32), params)

        def play(carry, inputs):
            games, done = carry
            key, t = inputs
            games, ended, _ = step(key, games, done | (t >= lead), params)
            return (games, done | (ended & (t < lead))), None

        carry = (first, jnp.zeros(num, bool))
        (games, done), _ = jax.lax.scan(play, carry, (jax.random.split(key_play, longest), jnp.arange(longest)))
        return jax.vmap(select)(done, first, games)

    def film(key, games: Games, params) -> tuple[Clips, Games, jax.Array]:
        """num_frames frames of every game -> clips, games, which of them are over."""

        def frame(carry, key):
            games, done = carry
            image = jax.vmap(env.render, (0, None))(games.state, params)
            place = jnp.stack([games.state.x, games.state.y])
            games, ended, action = step(key, games, done, params)
            return (games, ended), (image, place, jnp.where(done, -1, action))

        carry = (games, jnp.zeros(len(games.action), bool))
        (games, done), (frames, place, action) = jax.lax.scan(frame, carry, jax.random.split(key, num_frames))
        moved = jnp.diff(place, axis=0) * (PIXELS / 13)  # (T - 1, 2, num) pixels
        way = jnp.where(jnp.abs(moved) > 0.5, jnp.sign(moved), 0).astype(jnp.int32) + 1
        return Clips(frames.swapaxes(0, 1), (3 * way[:, 0] + way[:, 1]).T, action[:-1].T), games, done

    def draw(key, world: Games, num):
        key_which, key_film, key_begin = jax.random.split(key, 3)
        which = jax.random.choice(key_which, pool, (num,), replace=False)
        clips, games, done = film(key_film, jax.tree.map(lambda x: x[which], world), train)
        games = jax.vmap(select)(done, start(jax.random.randint(key_begin, (num,), 0, num_levels, jnp.int32), train), games)
        return clips, jax.tree.map(lambda old, new: old.at[which].set(new), world, games)

    def held_out(key, num):
        key_begin, key_film = jax.random.split(key)
        return film(key_film, begin(key_begin, num, test), test)[0]

    def play(state, action):
        _, state, reward, ended, _ = env.step_env(None, state, action, test)
        return state, jnp.where(reward > 0, 1, jnp.where(ended | (state.time >= test.max_steps_in_episode), 2, 0))

    seeds = num_levels + np.arange(HELD_OUT_LEVELS)
    grades = np.ones(len(seeds), np.int32) if blank else np.asarray(jax.jit(jax.vmap(difficulty))(seeds))
    at_level, render = partial(env.reset_to_level, params=test), partial(env.render, params=test)
    game = Game(HELD_OUT_LEVELS, env.num_actions, 4, tuple("↙←↖↓·↑↘→↗"), at_level, play, render, grades)
    return Source((PIXELS, PIXELS), 9, lambda key: begin(key, pool, train), draw, held_out, game, pool)


# --- a world of one dot


class Dot(NamedTuple):
    """The world of a dot."""

    place: jax.Array  # (2,) int32 row, column, in [0, 8)
    colours: jax.Array  # (2, 3) int32: the ground's and the dot's


def dots(num_frames: int, size: int) -> Source:
    """A square of size / 8 pixels on plain ground; an action moves it by its own size, walls stop it. `change` is the move made."""

    def start(key) -> Dot:
        key_place, key_colour = jax.random.split(key)
        colours = jax.random.randint(key_colour, (2, 3), jnp.array([[0], [160]]), jnp.array([[96], [256]]), jnp.int32)
        return Dot(jax.random.randint(key_place, (2,), 0, 8, jnp.int32), colours)

    def step(dot: Dot, action):
        return dot._replace(place=jnp.clip(dot.place + jnp.asarray(MOVES)[action], 0, 7)), jnp.int32(0)

    def render(dot: Dot):
        near = jnp.arange(size) // (size // 8) == dot.place[:, None]  # (2, size)
        here = near[0][:, None] & near[1]
        return jnp.where(here[..., None], dot.colours[1], dot.colours[0]).astype(jnp.uint8)

    def clip(key):
        key_start, key_action = jax.random.split(key)
        action, first = jax.random.randint(key_action, (num_frames - 1,), 0, len(MOVES), jnp.int32), start(key_start)
        _, later = jax.lax.scan(lambda dot, action: (step(dot, action)[0],) * 2, first, action)
        place = jnp.concatenate([first.place[None], later.place])
        change = jnp.where((place[1:] == place[:-1]).all(1), 0, action)
        return jnp.concatenate([render(first)[None], jax.vmap(render)(later)]), change, action

    def draw(key, world, num):
        return Clips(*jax.vmap(clip)(jax.random.split(key, num))), world

    on_level = lambda level: start(jax.random.fold_in(jax.random.key(0), level))
    game = Game(HELD_OUT_LEVELS, len(MOVES), 0, tuple("·←→↑↓"), on_level, step, render)
    return Source((size, size), len(MOVES), lambda key: (), draw, lambda key, num: draw(key, (), num)[0], game)


def play_at_random(key, game: Game, level, num_frames: int, sticky: float):
    """A random policy's film of a level -> frames (T, H, W, 3) uint8, actions (T - 1,) int32, states (T, ...); a game that ends
    stays where it is. The policy repeats its action with probability `sticky`."""

    def step(carry, key):
        state, action, over = carry
        key_new, key_keep = jax.random.split(key)
        new = jax.random.randint(key_new, (), 0, game.num_actions, jnp.int32)
        action = jnp.where(jax.random.uniform(key_keep, dtype=jnp.float32) < sticky, action, new)
        after, outcome = game.step(state, action)
        state = select(over, state, after)
        return (state, action, over | (outcome > 0)), (state, action)

    first = game.start(level)
    carry = (first, jnp.int32(game.nothing), jnp.bool_(False))
    _, (states, actions) = jax.lax.scan(step, carry, jax.random.split(key, num_frames - 1))
    states = jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]), first, states)
    return jax.vmap(game.render)(states), actions, states


# --- videos of one's own


class Videos(NamedTuple):
    """Videos end to end."""

    frames: np.ndarray  # (F, H, W, 3) uint8
    lengths: np.ndarray  # (V,) of each video; they add up to F
    names: list[str]  # V


def load_videos(path: Path, num_frames: int, size: int) -> Videos:
    """An .npz file's array `videos`, or its first, (videos, frames, H, W, 3) uint8; or a folder's .gif and video files, the middle
    square scaled to `size`. At least two videos of at least `num_frames` frames each.

    Raises UsageError, one line, for anything else.
    """
    require(path.exists(), f"--data {path}: there is no such file; give dots, an .npz of videos, or a folder of .gif or .mp4 files")
    found = read_folder(path, size) if path.is_dir() else read_npz(path)
    what = f"--data {path}"
    require(len(found.lengths) >= 2, f"{what}: at least two videos are needed, one of them to test on")
    shortest = found.lengths.argmin()
    words = f"{what}: {found.names[shortest]} has {found.lengths[shortest]} frames"
    require(found.lengths[shortest] >= num_frames, f"{words}: at least --num-frames {num_frames} are needed")
    require_fits(path, found.frames.nbytes)
    return found


def require_fits(path: Path, num_bytes: int) -> None:
    """Raises UsageError for more frames than can be held."""
    words = f"--data {path}: holds over {MAX_BYTES >> 20} MB of frames: take fewer, or smaller ones"
    require(num_bytes <= MAX_BYTES, words)


def read_npz(path: Path) -> Videos:
    """Videos of one length."""
    try:
        with np.load(path, allow_pickle=False) as held:
            name = "videos" if "videos" in held.files else held.files[0]
            found = held[name]
    except (OSError, ValueError, IndexError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        require(False, f"--data {path}: not an .npz file of arrays ({first_line_of(error)})")
    fits = found.ndim == 5 and found.shape[-1] == 3 and found.dtype == np.uint8
    what = f"--data {path}: {name} is {found.dtype} {list(found.shape)}"
    require(fits, f"{what}: must be uint8 (videos, frames, height, width, 3)")
    names = [f"video {i}" for i in range(len(found))]
    return Videos(found.reshape(-1, *found.shape[2:]), np.full(found.shape[0], found.shape[1]), names)


def read_folder(folder: Path, size: int) -> Videos:
    """A folder's videos, by name."""
    seen = (path for path in folder.iterdir() if not path.name.startswith("."))
    paths = sorted(path for path in seen if path.suffix.lower() in (".gif", *VIDEO_FILES))
    require(paths, f"--data {folder}: holds no {', '.join(('.gif', *VIDEO_FILES))} file")
    videos = []
    for path in paths:
        videos.append(read_video(path, size))
        require_fits(folder, sum(video.nbytes for video in videos))
    return Videos(np.concatenate(videos), np.array([len(video) for video in videos]), [path.name for path in paths])


def read_video(path: Path, size: int) -> np.ndarray:
    """A file's frames (T, size, size, 3) uint8. Raises UsageError where it cannot be read."""
    read = read_gif if path.suffix.lower() == ".gif" else read_with_ffmpeg
    most = MAX_BYTES // (3 * size * size) + 1  # so many that they do not fit
    try:
        frames = [fit_image(image, (size, size)) for image in islice(read(path), most)]
    except ImportError as error:
        raise UsageError(f"--data {path}: needs a reader of videos: pip install 'nightjax[video]'") from error
    except Exception as error:  # whatever a damaged file makes Pillow or ffmpeg raise
        raise UsageError(f"--data {path}: cannot be read as a video ({first_line_of(error)})") from error
    require(frames, f"--data {path}: holds no frames")
    return np.stack(frames)


def read_gif(path: Path):
    """Yields a GIF's frames as RGB images."""
    from PIL import Image, ImageSequence

    with Image.open(path, formats=("GIF",)) as film:
        for frame in ImageSequence.Iterator(film):
            yield frame.convert("RGB")


def read_with_ffmpeg(path: Path):
    """Yields a video's frames as RGB images."""
    import imageio_ffmpeg  # of the extra `video`
    from PIL import Image

    frames = imageio_ffmpeg.read_frames(str(path.resolve()))
    shape = next(frames)["size"]
    for frame in frames:
        yield Image.frombytes("RGB", shape, frame)


def first_line_of(error: Exception) -> str:
    """What an error says, or what kind it is."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def videos(path: Path, num_frames: int, size: int) -> Source:
    """Clips that begin anywhere in any of the videos; the last tenth of the videos (at least one) is held out."""
    found = load_videos(path, num_frames, size)
    first = np.cumsum(found.lengths) - found.lengths
    num_held = max(1, int(HELD_OUT * len(first)))
    starts = [begin + np.arange(length - num_frames + 1) for begin, length in zip(first, found.lengths, strict=True)]
    train, held = np.concatenate(starts[:-num_held]), np.concatenate(starts[-num_held:])

    def cut(key, starts, num):
        start = jax.random.choice(key, jnp.asarray(starts), (num,))
        frames = jnp.asarray(found.frames)[start[:, None] + jnp.arange(num_frames)]
        unknown = jnp.zeros((num, num_frames - 1), jnp.int32)
        return Clips(frames, unknown, unknown)

    draw = lambda key, world, num: (cut(key, train, num), world)
    return Source(found.frames.shape[1:3], 1, lambda key: (), draw, lambda key, num: cut(key, held, num))
