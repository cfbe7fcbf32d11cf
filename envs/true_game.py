"""The true game beside a model of it: films to begin from, what each code of the model means, and which keys to press for it.

`infer` is the model's: clips (B, T, H, W, 3) uint8 -> the codes between their frames (B, T - 1). No code was ever told an action: a
code's actions are looked up in clips where both are known (the dictionary of Genie's section 3.3).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common.play import Film, Truth
from envs.clips import OUTCOMES, Source, play_at_random

FILMS = 64  # where there is no game: films to choose from


class Meaning(NamedTuple):
    """How often each code was inferred from held-out clips where this happened."""

    changes: np.ndarray  # (num_codes, source.num_changes)
    actions: np.ndarray | None  # (num_codes, actions of the game), where there is one
    num_clips: int


def read_codes(infer: Callable, source: Source, num_codes: int, num: int) -> Meaning:
    """What the codes of `num` held-out clips go with."""
    clips = jax.device_get(jax.jit(source.held_out, static_argnums=1)(jax.random.key(1), num))
    codes = np.asarray(infer(clips.frames))

    def count(things, kinds):
        table = np.zeros((num_codes, kinds), np.float32)
        np.add.at(table, (codes[things >= 0], things[things >= 0]), 1)
        return table

    actions = count(clips.action, source.game.num_actions) if source.game else None
    return Meaning(count(clips.change, source.num_changes), actions, num)


def truth_of(infer: Callable, source: Source, meaning: Meaning, num_frames: int, prompt_frames: int, sticky: float) -> Truth:
    """Held-out films and, where the source has a game, that game: of a code, an action drawn from those that had it."""
    game = source.game
    if not game:
        one = jax.jit(lambda number: source.held_out(jax.random.fold_in(jax.random.key(1), number), 1).frames[0])
        return Truth(FILMS, prompt_frames, lambda number: Film(np.asarray(one(number)), None))
    labels = meaning.actions.copy()
    labels[:, game.nothing] += 1e-3  # of codes without an action
    at_random = jax.jit(lambda level: play_at_random(jax.random.key(level), game, level, num_frames, sticky))

    def film(number):
        frames, _, states = jax.device_get(at_random(number))
        return Film(frames, [jax.tree.map(lambda x, t=t: x[t], states) for t in range(num_frames)])

    @jax.jit
    def play(seed, time, state, code):
        key = jax.random.fold_in(jax.random.key(seed), time)
        state, outcome = game.step(state, jax.random.categorical(key, jnp.log(jnp.asarray(labels)[code])))
        return state, game.render(state), outcome

    def step(seed, time, state, code):
        state, frame, outcome = jax.device_get(play(seed, time, state, code))
        return state, frame, OUTCOMES[outcome]

    return Truth(game.num_levels, prompt_frames, film, step)


def describe_codes(source: Source, meaning: Meaning) -> dict:
    """What a page says of every code: the way things most often moved, beyond chance, where it was inferred."""
    table, where = meaning.changes, f"inferred in {meaning.num_clips} held-out clips."
    used = table.sum(1)
    if not source.game:
        words = [f"{100 * n / used.sum():.0f} %" for n in used]
        return {"arrows": [""] * len(used), "words": words, "legend": f"Share: how often it was {where}"}
    share = table / np.maximum(used[:, None], 1)
    best = (share - table.sum(0) / table.sum()).argmax(1)
    arrows = [source.game.arrows[i] if n else "" for i, n in zip(best, used, strict=True)]
    words = [f"{100 * row[i]:.0f} % of {n:.0f}" if n else "never seen" for row, i, n in zip(share, best, used, strict=True)]
    return {"arrows": arrows, "words": words, "legend": f"Arrow: how things most often moved, beyond chance, where it was {where}"}
