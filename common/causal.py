"""Causal layers over a short sequence, as H-GAP and TAP have them: convolutions, and attention with the norms after it; sampling.

`init_x(key, ...)` makes the parameters of a layer, `x(params, inputs)` applies it; sequences are (B, T, d).
"""

import jax
import jax.numpy as jnp
import numpy as np

from common.nn import dense, init_dense


def layer_norm(p, x) -> jax.Array:
    """Over the last axis."""
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def init_norm(width: int) -> dict:
    return {"scale": jnp.ones(width, jnp.float32), "bias": jnp.zeros(width, jnp.float32)}


def mish(x) -> jax.Array:
    """x tanh(softplus(x)) (1908.08681)."""
    return x * jnp.tanh(jax.nn.softplus(x))


def drop(key, x, rate: float) -> jax.Array:
    """Dropout; none without a key."""
    if key is None or not rate:
        return x
    return jnp.where(jax.random.uniform(key, x.shape, jnp.float32) < rate, 0, x / (1 - rate))


def init_conv_block(key, width: int) -> dict:
    """Two causal convolutions over 3 steps, each with its norm."""
    keys = jax.random.split(key)
    return {"convs": [init_dense(k, 3 * width, width) for k in keys], "norms": [init_norm(width), init_norm(width)]}


def conv_block(p, x) -> jax.Array:
    """x (B, T, d) plus two times convolution, norm, Mish; a step sees itself and those before."""
    h = x
    for conv, norm in zip(p["convs"], p["norms"], strict=True):
        past = jnp.pad(h, ((0, 0), (2, 0), (0, 0)))
        h = mish(layer_norm(norm, dense(conv, jnp.concatenate([past[:, :-2], past[:, 1:-1], h], axis=-1))))
    return x + h


def init_attention_block(key, width: int) -> dict:
    """Attention and a feed-forward layer of 4 times the width, norms after each."""
    keys, norms = jax.random.split(key, 4), [init_norm(width), init_norm(width)]
    qkv, out = init_dense(keys[0], width, 3 * width, 1.0), init_dense(keys[1], width, width, 0.5)
    up, down = init_dense(keys[2], width, 4 * width), init_dense(keys[3], 4 * width, width, 0.5)
    return {"qkv": qkv, "out": out, "up": up, "down": down, "norms": norms}


def heads_of(p, x, heads: int):
    """x (..., d) -> queries, keys, values (..., heads, d / heads)."""
    return (y.reshape(*x.shape[:-1], heads, -1) for y in jnp.split(dense(p["qkv"], x), 3, axis=-1))


def after_attention(p, x, y, keys=(None, None), rate: float = 0.0) -> jax.Array:
    """What follows attention's output y (..., d): x + y, norm, feed-forward, norm."""
    x = layer_norm(p["norms"][0], x + drop(keys[0], dense(p["out"], y), rate))
    h = dense(p["down"], jax.nn.gelu(dense(p["up"], x)))
    return layer_norm(p["norms"][1], x + drop(keys[1], h, rate))


def attention_block(p, x, heads: int, key=None, rate: float = 0.0) -> jax.Array:
    """x (B, T, d): causal attention and feed-forward, post-norm."""
    keys = (None,) * 3 if key is None else jax.random.split(key, 3)
    q, k, v = heads_of(p, x, heads)
    score = jnp.einsum("bqhc,bkhc->bhqk", q * q.shape[-1] ** -0.5, k)
    score = jnp.where(np.tri(x.shape[1], dtype=bool), score, -1e9)
    weight = drop(keys[0], jax.nn.softmax(score, axis=-1), rate)
    return after_attention(p, x, jnp.einsum("bhqk,bkhc->bqhc", weight, v).reshape(x.shape), keys[1:], rate)


def attend_cached(q, k, v, keys, values, s) -> jax.Array:
    """Attention of code s (B, heads, c) to itself and to the codes before it in the cache: (B, d)."""
    q = q * q.shape[-1] ** -0.5
    score = jnp.concatenate([jnp.einsum("bhc,bhsc->bhs", q, keys), (q * k).sum(-1, keepdims=True)], axis=-1)
    before = jnp.append(jnp.arange(keys.shape[2]) < s, True)
    weight = jax.nn.softmax(jnp.where(before, score, -1e9), axis=-1)
    return (jnp.einsum("bhs,bhsc->bhc", weight[..., :-1], values) + weight[..., -1:] * v).reshape(len(q), -1)


def draw_from_nucleus(key, logits, temperature: float, top_p: float) -> jax.Array:
    """One of K from the nucleus (1904.09751) of softmax(logits / temperature), (B, K) -> (B,); temperature 0: the likeliest.

    The nucleus is found by halving: the highest level that the codes above it reach top_p. Sorting takes ten times as long.
    """
    if not temperature:
        return logits.argmax(-1).astype(jnp.int32)
    logits = logits / temperature
    p = jnp.exp(logits - logits.max(-1, keepdims=True))
    whole = p.sum(-1, keepdims=True)
    level = jnp.zeros_like(whole)
    if top_p < 1:
        low, high = level, jnp.ones_like(whole)
        for _ in range(14):
            middle = (low + high) / 2
            enough = jnp.where(p >= middle**3, p, 0).sum(-1, keepdims=True) >= top_p * whole
            low, high = jnp.where(enough, middle, low), jnp.where(enough, high, middle)
        level = low**3
    below = jnp.cumsum(jnp.where(p >= level, p, 0), axis=-1)
    u = jax.random.uniform(key, (len(p), 1), jnp.float32)
    return jnp.minimum((below <= u * below[:, -1:]).sum(-1, dtype=jnp.int32), p.shape[-1] - 1)
