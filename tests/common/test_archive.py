"""The archive against a slow one in numpy, with ties and duplicates, under jit and vmap."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.archive import (
    Archive,
    coverage,
    cvt_centroids,
    filled,
    grid_cell,
    grid_centroids,
    init_archive,
    insert,
    max_fitness,
    nearest,
    qd_score,
    sample_filled,
)

CELLS, BATCH = 7, 24


def slow_insert(holders, fitness, descriptor, cell):
    """holders: cell -> (id, fitness). One candidate after another; ids count candidates."""
    for cell_number in set(cell.tolist()):
        best = None
        for i in np.flatnonzero(cell == cell_number):
            sound = np.isfinite(fitness[i]) and np.isfinite(descriptor[i]).all()
            if sound and (best is None or fitness[i] > fitness[best]):
                best = i
        if best is not None and (cell_number not in holders or fitness[best] > holders[cell_number][1]):
            holders[cell_number] = (best, fitness[best])
    return holders


def batch_of(rng, batch):
    """Few distinct fitnesses and cells, so that ties abound; the genotype and descriptor tell who it is."""
    fitness = rng.integers(0, 3, BATCH).astype(np.float32)
    fitness[rng.random(BATCH) < 0.1] = rng.choice([np.nan, np.inf, -np.inf])
    identity = np.arange(BATCH, dtype=np.float32) + 100 * batch
    descriptor = np.stack([identity, identity], axis=1)
    descriptor[rng.random(BATCH) < 0.05, 1] = np.nan
    genotype = {"a": identity, "b": np.tile(identity[:, None, None], (1, 2, 3))}
    return genotype, fitness, descriptor, rng.integers(0, CELLS, BATCH)


def check_against_slow(archive, holders, ids):
    for cell in range(CELLS):
        if cell not in holders:
            assert archive.fitness[cell] == -np.inf
            continue
        identity, fitness = ids[cell], holders[cell][1]
        assert archive.fitness[cell] == fitness
        whole = [archive.genotype["a"][cell], archive.genotype["b"][cell], archive.descriptor[cell]]
        assert all((x == identity).all() for x in whole), "two individuals are mixed"


def test_insertion_is_that_of_a_slow_loop():
    """Six seeds under vmap, four batches each."""
    seeds, like = 6, {"a": jax.ShapeDtypeStruct((), jnp.float32), "b": jax.ShapeDtypeStruct((2, 3), jnp.float32)}
    archive = jax.tree.map(lambda x: jnp.stack([x] * seeds), init_archive(like, CELLS, 2))
    holders, ids = [{} for _ in range(seeds)], [{} for _ in range(seeds)]
    rngs = [np.random.default_rng(seed) for seed in range(seeds)]
    add = jax.jit(jax.vmap(insert))
    for batch in range(4):
        offers = [batch_of(rng, batch) for rng in rngs]
        archive, taken = add(archive, *jax.tree.map(lambda *x: np.stack(x), *offers))
        for k, (_, fitness, descriptor, cell) in enumerate(offers):
            before = dict(holders[k])
            slow_insert(holders[k], fitness, descriptor, cell)
            changed = [c for c in holders[k] if holders[k][c] is not before.get(c)]
            ids[k] |= {c: holders[k][c][0] + 100 * batch for c in changed}
            assert set(np.flatnonzero(taken[k])) == {holders[k][c][0] for c in changed}
            check_against_slow(jax.tree.map(lambda x, k=k: np.asarray(x[k]), archive), holders[k], ids[k])


def test_equal_fitness_does_not_replace_and_the_first_of_a_tie_enters():
    archive = init_archive(jax.ShapeDtypeStruct((), jnp.int32), 2, 1)
    one = lambda x, n: jnp.full((n, 1), x, jnp.float32)
    archive, taken = insert(archive, jnp.array([10, 11, 12]), jnp.array([1.0, 2.0, 2.0]), one(0, 3), jnp.array([1, 1, 1]))
    assert archive.genotype[1] == 11 and taken.tolist() == [False, True, False]
    archive, taken = insert(archive, jnp.array([20]), jnp.array([2.0]), one(1, 1), jnp.array([1]))
    assert archive.genotype[1] == 11 and not taken.any() and archive.descriptor[1] == 0


def test_selection_is_uniform_over_filled_cells():
    fitness = jnp.array([-jnp.inf, 1.0, -jnp.inf, -5.0, 0.0, -jnp.inf])
    archive = Archive(jnp.zeros(6), fitness, jnp.zeros((6, 1)))
    drawn = np.asarray(jax.jit(partial(sample_filled, shape=(3, 2000)))(jax.random.key(0), archive))
    counts = np.bincount(drawn.reshape(-1), minlength=6)
    assert counts[[0, 2, 5]].sum() == 0 and drawn.shape == (3, 2000)
    assert np.abs(counts[[1, 3, 4]] - 2000).max() < 5 * np.sqrt(6000 * 2 / 9)
    empty = archive._replace(fitness=jnp.full(6, -jnp.inf))
    assert (sample_filled(jax.random.key(0), empty, (5,)) == 0).all()
    last = archive._replace(fitness=fitness.at[:].set(-jnp.inf).at[5].set(0.0))
    assert (sample_filled(jax.random.key(0), last, (50,)) == 5).all()


def test_metrics_by_hand():
    archive = Archive(jnp.zeros(4), jnp.array([1.0, -jnp.inf, -2.0, 4.0]), jnp.zeros((4, 1)))
    assert qd_score(archive) == 3 and qd_score(archive, 10.0) == 33
    assert coverage(archive) == 0.75 and max_fitness(archive) == 4
    assert filled(archive).tolist() == [True, False, True, True]


def test_grid_cells():
    shape = (3, 4)
    descriptor = jnp.array([[0.0, 0.0], [0.34, 0.26], [1.0, 1.0], [0.99, 0.0], [-5.0, 9.0], [jnp.nan, 0.5]])
    assert grid_cell(descriptor, shape).tolist() == [0, 5, 11, 8, 3, 2]
    centroids = grid_centroids(shape)
    assert centroids.shape == (12, 2) and (grid_cell(centroids, shape) == jnp.arange(12)).all()
    np.testing.assert_allclose(centroids[5], [0.5, 0.375])
    assert grid_cell(jnp.array([[-1.0], [2.9]]), (2,), low=-1.0, high=3.0).tolist() == [0, 1]


@pytest.mark.parametrize("chunk", [1000, 16])
def test_nearest_centroid(chunk):
    rng = np.random.default_rng(0)
    points, centroids = rng.random((50, 4), np.float32), rng.random((9, 4), np.float32)
    centroids[5] = centroids[2]  # a tie: the first counts
    slow = ((points[:, None] - centroids[None]) ** 2).sum(-1).argmin(1)
    found = jax.jit(partial(nearest, chunk=chunk))(points, centroids)
    np.testing.assert_array_equal(found, slow)
    assert found.dtype == jnp.int32 and 5 not in found


def test_cvt_regions_are_even():
    """In one dimension the tessellation is known: N equal intervals. In two: Lloyd's fixed point, and regions of like size."""
    line = jnp.sort(jax.jit(lambda key: cvt_centroids(key, 4, 1, 4000, 60))(jax.random.key(0))[:, 0])
    np.testing.assert_allclose(line, [0.125, 0.375, 0.625, 0.875], atol=0.02)
    centroids = jax.jit(lambda key: cvt_centroids(key, 16, 2, 4000, 60))(jax.random.key(1))
    fresh = np.random.default_rng(0).random((20000, 2), np.float32)
    cell = np.asarray(nearest(fresh, centroids))
    share = np.bincount(cell, minlength=16) / len(cell)
    assert share.min() > 0.04 and share.max() < 0.09  # even: 0.0625
    means = np.stack([fresh[cell == i].mean(0) for i in range(16)])
    assert np.abs(means - centroids).max() < 0.03
    assert ((centroids > 0) & (centroids < 1)).all()
