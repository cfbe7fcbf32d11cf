"""The level buffer against a slow NumPy re-implementation that sorts and compares whole levels each time."""

from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.level_buffer import (
    Trial,
    age_buffer,
    episode_means,
    hash_levels,
    init_buffer,
    max_episode_return,
    max_mc,
    positive_value_loss,
    replay_weights,
    sample_replay,
    update_buffer,
)

CAPACITY, BATCH = 10, 6
SETTINGS = [(0.3, 0.5), (1.0, 0.0), (0.5, 1.0)]  # temperature, staleness_coef


class Level(NamedTuple):
    walls: jax.Array  # (2, 3) bool
    pos: jax.Array  # (2,) int32
    direction: jax.Array  # () int32


def make_levels(numbers) -> Level:
    """Levels that differ where their numbers (below 64 * 4 * 3) differ."""
    numbers = np.asarray(numbers)
    walls = (numbers[:, None] >> np.arange(6) & 1).astype(bool).reshape(-1, 2, 3)
    pos = np.stack([numbers // 64 % 4, -(numbers // 256)], axis=1)
    return Level(walls, pos.astype(np.int32), (numbers % 4).astype(np.int32))


def empty_buffer(capacity=CAPACITY):
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), make_levels([0]))
    return init_buffer(like, capacity)


# --- the slow one


def ranks_of(scores) -> np.ndarray:
    """0 for the highest, ties in order."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    ranks = np.zeros(len(scores), int)
    ranks[order] = np.arange(len(scores))
    return ranks


def weights_of(scores, ages, temperature, staleness_coef) -> np.ndarray:
    """Of filled slots only."""
    by_score = (1 / (ranks_of(scores) + 1.0)) ** (1 / temperature)
    by_score /= by_score.sum()
    total = sum(ages)
    return (1 - staleness_coef) * by_score + staleness_coef * np.array(ages) / total if total else by_score


@dataclass
class SlowBuffer:
    capacity: int
    number: list = field(default_factory=list)  # what `make_levels` makes the level from
    score: list = field(default_factory=list)
    age: list = field(default_factory=list)
    max_return: list = field(default_factory=list)
    edits: list = field(default_factory=list)

    def update(self, number, score, max_return, edits, temperature, staleness_coef):
        for i, level in enumerate(number):
            earlier = [other for other, s in zip(number[:i], score[:i], strict=True) if s > -np.inf]
            if level in earlier or score[i] == -np.inf:  # the first copy that finished an episode counts
                continue
            if level in self.number:
                slot = self.number.index(level)
                self.score[slot], self.age[slot] = score[i], 0
                self.max_return[slot] = max(self.max_return[slot], max_return[i])
                continue
            new = dict(number=level, score=score[i], age=0, max_return=max_return[i], edits=edits[i])
            if len(self.number) < self.capacity:
                for name, value in new.items():
                    getattr(self, name).append(value)
                continue
            weakest = int(np.argmin(weights_of(self.score, self.age, temperature, staleness_coef)))
            if score[i] >= self.score[weakest]:
                for name, value in new.items():
                    getattr(self, name)[weakest] = value

    def assert_equals(self, buffer):
        size, empty = len(self.number), self.capacity - len(self.number)
        assert buffer.size == size
        np.testing.assert_array_equal(buffer.score, self.score + [-np.inf] * empty)
        np.testing.assert_array_equal(buffer.rank, ranks_of(self.score + [-np.inf] * empty))
        np.testing.assert_array_equal(buffer.age, self.age + [0] * empty)
        np.testing.assert_array_equal(buffer.max_return, self.max_return + [-np.inf] * empty)
        np.testing.assert_array_equal(buffer.edits, self.edits + [0] * empty)
        levels = make_levels(self.number)
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[:size], y), buffer.levels, levels)
        np.testing.assert_array_equal(buffer.hashes[:size], hash_levels(levels))


def random_batch(rng, slow: SlowBuffer, score_kind: str):
    """Replayed slots with repeats, levels of the buffer that come from elsewhere, duplicates, new levels; in random order."""
    numbers, index = [], []
    for kind in rng.integers(0, 4, BATCH):
        if kind == 0 and slow.number:
            index.append(int(rng.integers(len(slow.number))))
            numbers.append(slow.number[index[-1]])
            continue
        index.append(-1)
        if kind == 1 and numbers:
            numbers.append(numbers[rng.integers(len(numbers))])
        elif kind == 2 and slow.number:
            numbers.append(slow.number[rng.integers(len(slow.number))])
        else:
            numbers.append(int(rng.integers(768)))
    score = rng.integers(0, 4, BATCH) / 4 if score_kind == "coarse" else rng.normal(size=BATCH)  # coarse: many ties
    score = np.where(rng.random(BATCH) < 0.15, -np.inf, score).astype(np.float32)
    return numbers, index, score, rng.normal(size=BATCH).astype(np.float32), rng.integers(0, 100, BATCH)


@pytest.mark.parametrize("score_kind", ["coarse", "fine"])
@pytest.mark.parametrize("temperature, staleness_coef", SETTINGS)
def test_update_buffer(temperature, staleness_coef, score_kind):
    settings = dict(temperature=temperature, staleness_coef=staleness_coef)
    update, age = jax.jit(partial(update_buffer, **settings)), jax.jit(age_buffer)
    seen = dict(replaced=0, rejected=0, tied=0, passed=0)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        buffer, slow = empty_buffer(), SlowBuffer(CAPACITY)
        for _ in range(15):
            numbers, index, score, max_return, edits = random_batch(rng, slow, score_kind)
            before = list(slow.number)
            trial = Trial(make_levels(numbers), score, max_return, np.int32(edits), np.int32(index))
            buffer = update(buffer, trial)
            slow.update(numbers, score.tolist(), max_return.tolist(), edits.tolist(), **settings)
            slow.assert_equals(buffer)
            if len(before) == CAPACITY:
                seen["replaced"] += before != slow.number
                seen["rejected"] += any(n not in slow.number and s > -np.inf for n, s in zip(numbers, score, strict=True))
            seen["tied"] += len(set(slow.score)) < len(slow.score)
            seen["passed"] += -np.inf in score
            amount = int(rng.integers(0, 4))  # levels tried elsewhere
            buffer, slow.age = age(buffer, amount), [a + amount for a in slow.age]
            slow.assert_equals(buffer)
    wanted = {"replaced", "passed"} | ({"tied"} if score_kind == "coarse" else {"rejected"})
    assert all(seen[name] for name in wanted), seen  # the batches have shown what they were made for


def test_a_level_evicted_earlier_in_the_batch_counts_as_new():
    """A newcomer takes the slot of a level that is replayed later in the same batch."""
    settings = dict(temperature=1.0, staleness_coef=0.0)
    update = jax.jit(partial(update_buffer, **settings))
    buffer, slow = empty_buffer(3), SlowBuffer(3)
    batches = [
        ([1, 2, 3], [-1, -1, -1], [3.0, 2.0, 1.0]),
        ([9, 3, 1], [-1, 2, 0], [1.0, 5.0, 3.0]),
        ([9, 7, 9], [-1] * 3, [9.0, 9.0, 1.0]),
    ]
    held = [[1, 2, 3], [1, 2, 3], [7, 9, 3]]  # 9 takes 3's slot, and 3 takes it back; 9 replaces 2 and 7 replaces 1
    for step, (numbers, index, score) in enumerate(batches):
        edits, max_return = [step] * 3, [-float(step)] * 3
        trial = Trial(make_levels(numbers), np.float32(score), np.float32(max_return), np.int32(edits), np.int32(index))
        buffer = update(buffer, trial)
        slow.update(numbers, score, max_return, edits, **settings)
        slow.assert_equals(buffer)
        assert slow.number == held[step]
    assert slow.edits == [2, 2, 1] and slow.max_return == [-2, -2, -1]  # 3 came back as a new level


def test_a_level_of_zeros_is_no_empty_slot():
    settings = dict(temperature=0.3, staleness_coef=0.5)
    update = jax.jit(partial(update_buffer, **settings))
    buffer, slow = empty_buffer(3), SlowBuffer(3)
    assert not any(x.any() for x in make_levels([0]))
    for numbers, score in (([0, 5], [1.0, 2.0]), ([5, 0], [0.0, 3.0])):
        edits, max_return = [7, 8], [0.5, 0.25]
        trial = Trial(make_levels(numbers), np.float32(score), np.float32(max_return), np.int32(edits), np.int32([-1, -1]))
        buffer = update(buffer, trial)
        slow.update(numbers, score, max_return, edits, **settings)
        slow.assert_equals(buffer)
    assert slow.number == [0, 5] and slow.edits == [7, 8]


def test_a_full_buffer_keeps_the_best_without_staleness():
    """Every level new, one by one and in batches: what stays are the highest scores."""
    rng = np.random.default_rng(0)
    numbers = rng.permutation(768)[: 8 * BATCH].reshape(8, BATCH)
    score = rng.permutation(8 * BATCH).reshape(8, BATCH).astype(np.float32)
    update = jax.jit(partial(update_buffer, temperature=0.3, staleness_coef=0.0))
    buffer = empty_buffer()
    for i in range(8):
        zeros, new = np.zeros(BATCH, np.int32), np.full(BATCH, -1, np.int32)
        buffer = update(buffer, Trial(make_levels(numbers[i]), score[i], score[i], zeros, new))
    np.testing.assert_array_equal(np.sort(buffer.score), np.arange(8 * BATCH - CAPACITY, 8 * BATCH))
    by_score = dict(zip(score.ravel(), numbers.ravel(), strict=True))
    expected = make_levels([by_score[s] for s in np.array(buffer.score)])
    jax.tree.map(np.testing.assert_array_equal, buffer.levels, expected)


# --- replay


def partly_filled(size=7, aged=True):
    """A buffer with ties."""
    rng = np.random.default_rng(3)
    filled = np.arange(CAPACITY) < size
    score = np.where(filled, rng.integers(0, 4, CAPACITY), -np.inf).astype(np.float32)
    age = np.where(filled, rng.integers(0, 9, CAPACITY) * aged, 0)
    rank, age = (jnp.asarray(x, jnp.int32) for x in (ranks_of(score), age))
    return empty_buffer()._replace(score=jnp.asarray(score), rank=rank, age=age, size=jnp.int32(size))


@pytest.mark.parametrize("temperature, staleness_coef", SETTINGS)
@pytest.mark.parametrize("aged", [True, False])
@pytest.mark.parametrize("size", [1, 7, 10])
def test_replay_weights(temperature, staleness_coef, aged, size):
    buffer = partly_filled(size, aged)
    assert buffer.size == size
    weights = np.array(jax.jit(partial(replay_weights, temperature=temperature, staleness_coef=staleness_coef))(buffer))
    assert abs(weights.sum() - 1) < 1e-5 and not weights[size:].any()
    expected = weights_of(buffer.score[:size].tolist(), buffer.age[:size].tolist(), temperature, staleness_coef)
    np.testing.assert_allclose(weights[:size], expected, atol=1e-6)


def assert_frequencies(drawn, weights):
    """Pearson's chi-square within five standard deviations of its mean; what has no weight is never drawn."""
    counts, weights = np.bincount(drawn, minlength=len(weights)), np.float64(weights)
    assert not counts[weights == 0].any()
    expected = (weights * len(drawn))[weights > 0]
    freedom = len(expected) - 1
    assert ((counts[weights > 0] - expected) ** 2 / expected).sum() < freedom + 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("temperature, staleness_coef", SETTINGS)
def test_sample_replay_frequencies(temperature, staleness_coef):
    buffer = partly_filled()
    settings = dict(temperature=temperature, staleness_coef=staleness_coef)
    keys = jax.random.split(jax.random.key(0), 20_000)
    indices, after = jax.jit(jax.vmap(partial(sample_replay, buffer=buffer, num=2, **settings)))(keys)
    first, second = np.array(indices).T
    weights = np.array(replay_weights(buffer, **settings))
    assert_frequencies(first, weights)
    # the second draw sees the ages that the first one left
    likely = int(np.argmax(weights))
    ages = np.array(buffer.age) + (np.arange(CAPACITY) < 7)
    ages[likely] = 0
    again = replay_weights(buffer._replace(age=jnp.asarray(ages)), **settings)
    assert_frequencies(second[first == likely], again)


def test_sample_replay_ages():
    buffer = partly_filled()
    sample = partial(sample_replay, num=5, temperature=0.3, staleness_coef=0.5)
    indices, after = jax.jit(sample)(jax.random.key(4), buffer)
    assert indices.shape == (5,) and (indices < 7).all()
    ages = np.array(buffer.age)
    for index in np.array(indices):
        ages[:7] += 1
        ages[index] = 0
    np.testing.assert_array_equal(after.age, ages)
    jax.tree.map(np.testing.assert_array_equal, after._replace(age=0), buffer._replace(age=0))


def test_age_buffer():
    buffer = partly_filled()
    np.testing.assert_array_equal(age_buffer(buffer, 3).age, np.where(np.arange(CAPACITY) < 7, buffer.age + 3, 0))


# --- equality of levels


def test_hash_tells_all_levels_apart():
    hashes = np.array(jax.jit(hash_levels)(make_levels(np.arange(768))))
    assert hashes.shape == (768, 2) and len(np.unique(hashes, axis=0)) == 768
    np.testing.assert_array_equal(hashes[5:6], jax.jit(hash_levels)(make_levels([5])))


def test_hash_differs_when_one_entry_differs():
    levels, names = [make_levels([13])], ["unchanged"]
    for name in Level._fields:
        leaf = getattr(levels[0], name)
        for place in np.ndindex(leaf.shape):
            changed = leaf.copy()
            changed[place] = ~changed[place] if leaf.dtype == bool else changed[place] + 1
            levels.append(levels[0]._replace(**{name: changed}))
            names.append((name, place))
    base, *others = np.array(jax.jit(hash_levels)(jax.tree.map(lambda *x: np.concatenate(x), *levels)))
    assert len(others) == 6 + 2 + 1
    for name, other in zip(names[1:], others, strict=True):
        assert (other != base).all(), name


def test_hash_differs_when_entries_change_places():
    """All 13 x 13 maps with one or two walls."""
    cells = np.eye(169, dtype=bool)
    hashes = np.array(jax.jit(hash_levels)((cells[:, None] | cells[None]).reshape(-1, 169)))
    assert len(np.unique(hashes, axis=0)) == 169 * 168 // 2 + 169


def test_hash_of_fractions():
    """A level may hold real numbers; those that differ by less than one are different levels."""
    values = np.float32([[0.25], [0.5], [0.75], [-0.25]])
    assert len(np.unique(np.array(hash_levels((values,))), axis=0)) == 4


# --- scores


def episodes_of(done):
    """The (start, end) of every finished episode of one environment."""
    ends = np.flatnonzero(done) + 1
    return [(0 if i == 0 else ends[i - 1], end) for i, end in enumerate(ends)]


@jax.jit
def all_scores(reward, value, adv, done, best):
    means = episode_means(value, done)
    return means, max_episode_return(reward, done), max_mc(value, done, best), positive_value_loss(adv, done)


@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_loops(seed):
    rng = np.random.default_rng(seed)
    steps, num = 20, 12
    done = rng.random((steps, num)) < 0.15
    done[:, 0] = False  # nothing finished
    done[-1, 1] = True  # finished to the last step
    done[:, 2] = True  # episodes of one step
    reward, value, adv = rng.normal(size=(3, steps, num)).astype(np.float32)
    best = rng.normal(size=num).astype(np.float32)

    (means, counts), returns, mc, pvl = jax.tree.map(np.array, all_scores(reward, value, adv, done, best))
    for n in range(num):
        episodes = episodes_of(done[:, n])
        assert counts[n] == len(episodes)
        if not episodes:
            assert means[n] == 0 and returns[n] == mc[n] == pvl[n] == -np.inf
            continue
        np.testing.assert_allclose(means[n], np.mean([value[a:b, n].mean() for a, b in episodes]), atol=1e-5)
        np.testing.assert_allclose(returns[n], max(reward[a:b, n].sum() for a, b in episodes), atol=1e-5)
        np.testing.assert_allclose(mc[n], np.mean([(best[n] - value[a:b, n]).mean() for a, b in episodes]), atol=1e-5)
        positive = [np.maximum(adv[a:b, n], 0).mean() for a, b in episodes]
        np.testing.assert_allclose(pvl[n], np.mean(positive), atol=1e-5)
