"""Causal layers over a short sequence, as H-GAP and TAP have them: convolutions, and attention with the norms after it.

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
    """x tanh(softplus(x)) (1908.08681), by one exponential."""
    e = jnp.exp(jnp.minimum(x, 20))
    return x * (e * (e + 2)) / (e * (e + 2) + 2)


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


def attention_step(p, x, keys, values, s, heads: int):
    """`attention_block` for place s alone, x (B, d), with the keys and values (B, heads, S, c) of the places before it in a cache
    -> x, keys, values."""
    q, k, v = heads_of(p, x, heads)
    q = q * q.shape[-1] ** -0.5
    score = jnp.concatenate([jnp.einsum("bhc,bhsc->bhs", q, keys), (q * k).sum(-1, keepdims=True)], axis=-1)
    before = jnp.append(jnp.arange(keys.shape[2]) < s, True)
    weight = jax.nn.softmax(jnp.where(before, score, -1e9), axis=-1)
    y = jnp.einsum("bhs,bhsc->bhc", weight[..., :-1], values) + weight[..., -1:] * v
    return after_attention(p, x, y.reshape(x.shape)), keys.at[:, :, s].set(k), values.at[:, :, s].set(v)
