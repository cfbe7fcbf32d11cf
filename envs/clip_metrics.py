"""Measures of clips and of codes for what happens in them, whatever the model that made them. Frames are in [0, 1]."""

import jax
import jax.numpy as jnp
import numpy as np

NUM_FEATURES = 16


def to_uint8(x) -> jax.Array:
    """[0, 1] -> 0 .. 255."""
    return (255 * jnp.clip(x, 0, 1) + 0.5).astype(jnp.uint8)


def psnr(x, y) -> jax.Array:
    """Peak signal to noise ratio in dB, 50 at most: (..., H, W, 3) -> (...)."""
    return -10 * jnp.log10(jnp.maximum(((x - jnp.clip(y, 0, 1)) ** 2).mean((-3, -2, -1)), 1e-5))


def perplexity(index, num: int) -> jax.Array:
    """exp of the entropy of the codes' frequencies."""
    share = jax.nn.one_hot(index.reshape(-1), num, dtype=jnp.float32).mean(0)
    return jnp.exp(-(share * jnp.log(share + 1e-9)).sum())


def information(table) -> jax.Array:
    """Mutual information over the columns' entropy, of a table of counts: 0 for independent, 1 where rows tell columns."""
    p = table / table.sum()
    entropy = lambda q: -(q * jnp.log(q + 1e-12)).sum()
    rows, columns = entropy(p.sum(1)), entropy(p.sum(0))
    return jnp.where(columns > 1e-3, (rows + columns - entropy(p)) / jnp.maximum(columns, 1e-3), 0.0)


def random_features(frames) -> jax.Array:
    """Clips (B, T, H, W, 3) -> (B, NUM_FEATURES): a fixed random layer on squares of frames and of their changes, averaged."""
    b, t, *_ = frames.shape
    small = jax.image.resize(frames, (b, t, 16, 16, 3), "linear")
    seen = jnp.concatenate([small[:, 1:], 8 * jnp.diff(small, axis=1)], axis=-1)  # (B, T - 1, 16, 16, 6)
    squares = seen.reshape(b, t - 1, 4, 4, 4, 4, 6).swapaxes(3, 4).reshape(b, -1, 96)
    layer = np.random.default_rng(0).normal(size=(96, NUM_FEATURES)).astype(np.float32) / np.float32(np.sqrt(96))
    return jax.nn.relu((squares - squares.mean(-1, keepdims=True)) @ layer).mean(1)


def frechet(x, y) -> jax.Array:
    """Frechet distance of Gaussians fitted to features (B, F) of two sets: |m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)).

    The root is Newton and Schulz's, 30 steps of products only: LAPACK under vmap can hang on few cores.
    """
    center = lambda z: z - z.mean(0)
    s, s2 = (center(z).T @ center(z) / (len(z) - 1) + 1e-6 * jnp.eye(z.shape[1], dtype=jnp.float32) for z in (x, y))
    a, eye = s @ s2, jnp.eye(s.shape[0], dtype=jnp.float32)
    scale = jnp.linalg.norm(a)

    def improve(carry, _):
        root, inverse = carry
        half = 1.5 * eye - 0.5 * inverse @ root
        return (root @ half, half @ inverse), None

    (root, _), _ = jax.lax.scan(improve, (a / scale, eye), None, length=30)
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + jnp.trace(s + s2) - 2 * jnp.sqrt(scale) * jnp.trace(root)
