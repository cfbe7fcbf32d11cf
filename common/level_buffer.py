"""The level buffer of prioritised level replay: PLR (2010.03934), robust PLR (2110.02439), ACCEL (2203.01302).

A buffer holds K levels with a score and an age each, and two things are asked of it: which levels to play again, and whether a new
level should take the place of an old one. Ranks are kept up to date as scores change, at O(K) a level and without sorting.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class LevelBuffer(NamedTuple):
    """K slots; the first `size` of them are filled. An empty slot has score -inf."""

    levels: Any  # a level pytree, leading axis K
    hashes: jax.Array  # (K, 2) uint32: levels with equal hashes are taken to be equal
    score: jax.Array  # (K,)
    rank: jax.Array  # (K,) int32: 0 for the highest score, ties in the order of their slots
    age: jax.Array  # (K,) int32: levels drawn or tried since this one was last played
    max_return: jax.Array  # (K,): the best return any episode on it ever had
    edits: jax.Array  # (K,) int32: how many times its ancestors were edited (ACCEL)
    size: jax.Array  # () int32


def init_buffer(level, capacity: int) -> LevelBuffer:
    """An empty buffer for levels like `level` (a pytree of arrays or shapes)."""
    return LevelBuffer(
        levels=jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape), x.dtype), level),
        hashes=jnp.zeros((capacity, 2), jnp.uint32),
        score=jnp.full(capacity, -jnp.inf, jnp.float32),
        rank=jnp.arange(capacity, dtype=jnp.int32),
        age=jnp.zeros(capacity, jnp.int32),
        max_return=jnp.full(capacity, -jnp.inf, jnp.float32),
        edits=jnp.zeros(capacity, jnp.int32),
        size=jnp.int32(0),
    )


def _bits(x) -> jax.Array:
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    return jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32) if is_float else x.astype(jnp.uint32)


def hash_levels(levels) -> jax.Array:
    """64 bits that tell levels apart, as (N, 2) uint32: two random linear functions (mod 2^32) of all leaves of each level."""
    words = jnp.concatenate([_bits(x).reshape(x.shape[0], -1) for x in jax.tree.leaves(levels)], axis=1)
    factors = np.random.default_rng(0).integers(0, 2**32, (words.shape[1], 2), dtype=np.uint32) | 1
    return jnp.stack([(words * factors[:, i]).sum(1, dtype=jnp.uint32) for i in range(2)], axis=1)


def replay_weights(buffer: LevelBuffer, temperature: float, staleness_coef: float) -> jax.Array:
    """P_replay = (1 - rho) P_S + rho P_C over the K slots (2010.03934, Sec. 3, with rank prioritisation: P_S ~ rank^(-1 / beta)).

    P_C is proportional to age; where nothing has aged, P_S is all.
    """
    return _mix(_score_weights(buffer, temperature), buffer.age, staleness_coef)


def _score_weights(buffer: LevelBuffer, temperature: float) -> jax.Array:
    capacity = buffer.score.shape[0]
    by_rank = (1.0 / np.arange(1, capacity + 1) ** (1 / temperature)).astype(np.float32)
    weights = jnp.where(jnp.arange(capacity) < buffer.size, jnp.asarray(by_rank)[buffer.rank], 0.0)
    return weights / jnp.maximum(weights.sum(), 1e-30)


def _mix(score_weights, age, staleness_coef: float) -> jax.Array:
    total = age.sum(dtype=jnp.int32)
    stale = age / jnp.maximum(total, 1)
    return jnp.where(total > 0, (1 - staleness_coef) * score_weights + staleness_coef * stale, score_weights)


def sample_replay(key, buffer: LevelBuffer, num: int, temperature: float, staleness_coef: float):
    """Draws `num` slots one after another: every draw ages the others by one and rejuvenates the level drawn.

    -> indices (num,), the buffer with its new ages.
    """
    score_weights = _score_weights(buffer, temperature)
    filled = jnp.arange(buffer.score.shape[0]) < buffer.size

    def draw(age, uniform):
        cumulative = jnp.cumsum(_mix(score_weights, age, staleness_coef))
        index = jnp.searchsorted(cumulative, uniform * cumulative[-1], side="right")
        index = jnp.minimum(index, buffer.size - 1)
        return jnp.where(filled, age + 1, 0).at[index].set(0), index

    age, indices = jax.lax.scan(draw, buffer.age, jax.random.uniform(key, (num,), jnp.float32))
    return indices, buffer._replace(age=age)


def _set_score(score, rank, slot, new):
    """Writes one score and moves the ranks that this changes."""
    before, slots = score[slot], jnp.arange(score.shape[0])

    def beats(x):  # does a score x in `slot` stand before each slot's own
        return (x > score) | ((x == score) & (slot < slots))

    others = slots != slot
    rank = rank + (others & beats(new)).astype(jnp.int32) - (others & beats(before)).astype(jnp.int32)
    own = (others & ~beats(new)).sum(dtype=jnp.int32)
    return score.at[slot].set(new), rank.at[slot].set(own)


class Trial(NamedTuple):
    """Levels that were just played, leading axis N, and what came of it."""

    levels: Any
    score: jax.Array  # -inf where no episode ended
    max_return: jax.Array
    edits: jax.Array  # int32
    index: jax.Array  # int32: the slot a level was replayed from, -1 for a level from elsewhere


def update_buffer(buffer: LevelBuffer, trial: Trial, temperature: float, staleness_coef: float) -> LevelBuffer:
    """Takes in the outcome of a batch of levels, one after another.

    A level that is in the buffer (replayed, or equal to one) gets its new score; its best return only grows. Any other goes into
    the next free slot, or, when the buffer is full, into the slot of the lowest replay weight if it scores at least as high.
    One that finished no episode is passed over; of a level that occurs several times in the batch the first that did counts.
    """
    capacity = buffer.score.shape[0]
    hashes = hash_levels(trial.levels)
    same = (hashes[:, None] == hashes[None]).all(-1)
    finished = trial.score > -jnp.inf
    usable = finished & ~(jnp.tril(same, -1) & finished).any(1)
    filled = jnp.arange(capacity) < buffer.size
    known = (hashes[:, None] == buffer.hashes[None]).all(-1) & filled  # (N, K)
    home = jnp.where(trial.index >= 0, trial.index, jnp.where(known.any(1), known.argmax(1), -1)).astype(jnp.int32)

    def take_in(carry, x):
        buffer, owner = carry  # owner (K,): which level of this batch now lives in a slot, -1 for none
        home, score, max_return, usable, number = x
        at_home = (home >= 0) & (owner[home] == -1)  # unless an earlier newcomer has taken the place
        full = buffer.size == capacity
        weakest = jnp.argmin(replay_weights(buffer, temperature, staleness_coef)).astype(jnp.int32)
        slot = jnp.where(at_home, home, jnp.where(full, weakest, buffer.size))
        write = usable & (at_home | (score >= buffer.score[slot]))
        new_score, new_rank = _set_score(buffer.score, buffer.rank, slot, jnp.where(write, score, buffer.score[slot]))
        best = jnp.maximum(max_return, jnp.where(at_home, buffer.max_return[slot], -jnp.inf))
        joins = write & ~at_home
        buffer = buffer._replace(
            score=new_score,
            rank=new_rank,
            age=buffer.age.at[slot].set(jnp.where(write, 0, buffer.age[slot])),
            max_return=buffer.max_return.at[slot].set(jnp.where(write, best, buffer.max_return[slot])),
            size=buffer.size + (joins & ~full),
        )
        return (buffer, owner.at[slot].set(jnp.where(joins, number, owner[slot]))), None

    # The scan carries the small arrays; levels, hashes and edits move once, at the end.
    numbers = jnp.arange(usable.shape[0], dtype=jnp.int32)
    light = buffer._replace(levels=None, hashes=None, edits=None)
    owner = jnp.full(capacity, -1, jnp.int32)
    (light, owner), _ = jax.lax.scan(take_in, (light, owner), (home, trial.score, trial.max_return, usable, numbers))

    def move_in(old, new):
        changed = (owner >= 0).reshape(-1, *[1] * (old.ndim - 1))
        return jnp.where(changed, new[jnp.maximum(owner, 0)], old)

    old = (buffer.levels, buffer.hashes, buffer.edits)
    levels, hashes, edits = jax.tree.map(move_in, old, (trial.levels, hashes, trial.edits))
    return light._replace(levels=levels, hashes=hashes, edits=edits)


def age_buffer(buffer: LevelBuffer, amount: int) -> LevelBuffer:
    """Every filled level ages by `amount` levels tried elsewhere."""
    filled = jnp.arange(buffer.score.shape[0]) < buffer.size
    return buffer._replace(age=jnp.where(filled, buffer.age + amount, 0))


# --- scores: how much an agent can still learn from a level


def episode_means(x, done) -> tuple[jax.Array, jax.Array]:
    """The mean over finished episodes of the mean over each one's steps of x (T, N) -> (N,), and the number of episodes (N,).

    Steps after an environment's last `done` are left out; 0 where no episode finished.
    """

    def step(carry, inputs):
        total, length, means, episodes = carry
        x, done = inputs
        total, length = total + x, length + 1
        means = means + jnp.where(done, total / length, 0.0)
        return (jnp.where(done, 0.0, total), jnp.where(done, 0.0, length), means, episodes + done), None

    zeros = jnp.zeros(x.shape[1], jnp.float32)
    (_, _, means, episodes), _ = jax.lax.scan(step, (zeros, zeros, zeros, zeros), (x, done))
    return means / jnp.maximum(episodes, 1), episodes


def max_episode_return(reward, done) -> jax.Array:
    """The highest return of a finished episode (N,); -inf where none finished. reward, done (T, N)."""

    def step(carry, inputs):
        total, best = carry
        reward, done = inputs
        total = total + reward
        return (jnp.where(done, 0.0, total), jnp.where(done, jnp.maximum(best, total), best)), None

    init = (jnp.zeros(reward.shape[1], jnp.float32), jnp.full(reward.shape[1], -jnp.inf, jnp.float32))
    return jax.lax.scan(step, init, (reward, done))[0][1]


def max_mc(value, done, max_return) -> jax.Array:
    """Maximum Monte Carlo regret (2110.02439, Sec. 4): the mean of (best return so far - V(s_t)); -inf if no episode finished.

    value, done (T, N); max_return (N,). It can be negative, so it is used by rank.
    """
    means, episodes = episode_means(value, done)
    return jnp.where(episodes > 0, max_return - means, -jnp.inf)


def positive_value_loss(adv, done) -> jax.Array:
    """The mean positive part of the GAE advantage (2010.03934, Table 1; 2110.02439, Sec. 4). -inf without a finished episode."""
    means, episodes = episode_means(jnp.maximum(adv, 0), done)
    return jnp.where(episodes > 0, means, -jnp.inf)
