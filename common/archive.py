"""The archive of MAP-Elites (1504.04909): one elite a cell, cells of a grid or of a centroidal Voronoi tessellation (1610.05729).

Cells are numbers in [0, N); which cell a descriptor belongs to is asked first (`grid_cell`, `nearest`), so that an archive need not
know its cells' shape. Everything is a pure function with fixed shapes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Archive(NamedTuple):
    """N cells; an empty one has fitness -inf."""

    genotype: Any  # a pytree, leading axis N
    fitness: jax.Array  # (N,)
    descriptor: jax.Array  # (N, D)


def init_archive(genotype, num_cells: int, num_descriptors: int) -> Archive:
    """An empty archive for individuals like `genotype` (a pytree of arrays or shapes, no batch axis)."""
    return Archive(
        genotype=jax.tree.map(lambda x: jnp.zeros((num_cells, *x.shape), x.dtype), genotype),
        fitness=jnp.full(num_cells, -jnp.inf, jnp.float32),
        descriptor=jnp.zeros((num_cells, num_descriptors), jnp.float32),
    )


def filled(archive: Archive) -> jax.Array:
    """Which cells hold an elite, (N,) bool."""
    return archive.fitness > -jnp.inf


# --- cells


def grid_cell(descriptor, shape: tuple[int, ...], low=0.0, high=1.0) -> jax.Array:
    """The cell of each descriptor (..., D) in a grid with shape[i] intervals of [low, high] in dimension i -> (...) int32.

    What lies outside belongs to the nearest cell at the edge. The last dimension counts fastest.
    """
    cell = 0
    for i, size in enumerate(shape):
        place = (descriptor[..., i] - low) / (high - low) * size
        cell = cell * size + jnp.clip(jnp.floor(jnp.nan_to_num(place)), 0, size - 1).astype(jnp.int32)
    return cell


def grid_centroids(shape: tuple[int, ...], low=0.0, high=1.0) -> jax.Array:
    """The middles of a grid's cells, (N, D), in the order of `grid_cell`."""
    axes = [low + (jnp.arange(size, dtype=jnp.float32) + 0.5) / size * (high - low) for size in shape]
    return jnp.stack([x.reshape(-1) for x in jnp.meshgrid(*axes, indexing="ij")], axis=-1)


def nearest(descriptor, centroids, chunk: int = 2048) -> jax.Array:
    """The nearest centroid (N, D) of each descriptor (B, D), the first of equally near ones -> (B,) int32.

    Distances are held for `chunk` descriptors at a time, (chunk, N), and summed dimension by dimension.
    """

    def of_chunk(descriptor):
        return sum((descriptor[:, None, i] - centroids[:, i]) ** 2 for i in range(centroids.shape[1])).argmin(1).astype(jnp.int32)

    num = descriptor.shape[0]
    if num <= chunk:
        return of_chunk(descriptor)
    padded = jnp.pad(descriptor, ((0, -num % chunk), (0, 0))).reshape(-1, chunk, descriptor.shape[1])
    return jax.lax.map(of_chunk, padded).reshape(-1)[:num]


def cvt_centroids(key, num_cells: int, num_descriptors: int, num_samples: int = 50_000, num_iterations: int = 20) -> jax.Array:
    """Centroids of `num_cells` equal regions of the unit cube (1610.05729, Algorithm 1): k-means of uniform samples -> (N, D).

    Lloyd's iterations begin at the first samples; a centroid that no sample is nearest to stays where it is.
    """
    samples = jax.random.uniform(key, (num_samples, num_descriptors), jnp.float32)

    def iterate(_, centroids):
        cell = nearest(samples, centroids)
        count = jnp.zeros(num_cells, jnp.float32).at[cell].add(1.0)
        total = jnp.zeros_like(centroids).at[cell].add(samples)
        return jnp.where(count[:, None] > 0, total / jnp.maximum(count, 1)[:, None], centroids)

    return jax.lax.fori_loop(0, num_iterations, iterate, samples[:num_cells])


# --- insertion and selection


def insert(archive: Archive, genotype, fitness, descriptor, cell) -> tuple[Archive, jax.Array]:
    """Offers a batch: genotype (B, ...), fitness (B,), descriptor (B, D), cell (B,) -> the archive, which were taken (B,) bool.

    Of several candidates for a cell the fittest counts, the first of equally fit ones; it replaces the holder only if it is
    fitter. So at most one individual is written to a cell, whole: parts of two never mix. What is not finite is not taken.
    """
    num_cells, order = archive.fitness.shape[0], jnp.arange(fitness.shape[0], dtype=jnp.int32)
    finite = jnp.isfinite(fitness) & jnp.isfinite(descriptor).all(-1)
    fitness = jnp.where(finite, fitness, -jnp.inf)
    best = jnp.full(num_cells, -jnp.inf, jnp.float32).at[cell].max(fitness)
    first = jnp.full(num_cells, order.size, jnp.int32).at[cell].min(jnp.where(fitness == best[cell], order, order.size))
    taken = (first[cell] == order) & (fitness > archive.fitness[cell])
    target = jnp.where(taken, cell, num_cells)  # past the end: not written
    new = Archive(genotype, fitness, descriptor)
    return jax.tree.map(lambda old, x: old.at[target].set(x, mode="drop"), archive, new), taken


def sample_filled(key, archive: Archive, shape: tuple[int, ...]) -> jax.Array:
    """Cells drawn uniformly, with replacement, from those that hold an elite, int32; 0 if none does."""
    number = jnp.cumsum(filled(archive), dtype=jnp.int32)  # the k-th filled cell is the first with number k
    drawn = jax.random.randint(key, shape, 0, jnp.maximum(number[-1], 1), jnp.int32) + 1
    return jnp.minimum(jnp.searchsorted(number, drawn), number.shape[0] - 1).astype(jnp.int32) * (number[-1] > 0)


def improvement_rank(fitness, held) -> jax.Array:
    """The place (B,) of each child: those that fill an empty cell first, by fitness; then by fitness - the holder's (held).

    What an emitter of CMA-ME learns from (1912.02400, Sec. 4).
    """
    gain = jnp.where(held > -jnp.inf, fitness - held, fitness)
    order = jnp.lexsort((-gain, held > -jnp.inf))
    return jnp.zeros(len(order), jnp.float32).at[order].set(jnp.arange(len(order), dtype=jnp.float32))


# --- metrics


def qd_score(archive: Archive, offset: float = 0.0) -> jax.Array:
    """The sum over elites of fitness + offset. With an offset of at least -(the lowest fitness) no elite lowers the score."""
    return jnp.where(filled(archive), archive.fitness + offset, 0.0).sum()


def coverage(archive: Archive) -> jax.Array:
    """The share of cells that hold an elite."""
    return filled(archive).mean()


def max_fitness(archive: Archive) -> jax.Array:
    """The fitness of the fittest elite; -inf in an empty archive."""
    return archive.fitness.max()
