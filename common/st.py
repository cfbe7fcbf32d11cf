"""Spatio-temporal transformers over frames cut into patches (Genie, 2402.15391, section 2 and figure 4).

A block is attention in space, causal attention in time and ONE feed-forward layer after both. Positions are rotary, in time and in
space, and in space learned too; norms come first. One frame at a time with a cache gives what the whole sequence would.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common.nn import dense, init_dense

Kind = Literal["st_vivit", "vit", "c_vivit"]
UNROLL = 4  # blocks in one step of the loop over them: XLA on CPU is slow at the gradient of a loop over single blocks


class Spec(NamedTuple):
    """What is static of a stack of blocks."""

    heads: int
    window: int  # frames that attention in time spans, the newest included
    kind: Kind = "st_vivit"
    qk_norm: bool = False
    dtype: str = "float32"


class Cache(NamedTuple):
    """Keys and values of the frames before, for L blocks, in the S = window - 1 places of a ring: frame t is at t % S."""

    k: jax.Array  # (L, B, N, heads, S, c): as attention reads it
    v: jax.Array  # (L, B, N, heads, S, c)
    t: jax.Array  # () int32: frames seen


def init_block(key, width: int, ffn: int, heads: int, kind: Kind) -> dict:
    """One block: attention in space, attention in time, ONE feed-forward layer after both."""
    keys, params = jax.random.split(key, 6), {}
    kept = {"st_vivit": ("space", "time"), "vit": ("space",), "c_vivit": ("time",)}[kind]
    for name, key_qkv, key_out in zip(kept, keys[:2], keys[2:4], strict=False):
        scale = jnp.ones((2, width // heads), jnp.float32)  # of queries and keys, where they are normalised
        qkv, out = init_dense(key_qkv, width, 3 * width, 1.0), init_dense(key_out, width, width, 0.5)
        params[name] = {"norm": jnp.ones(width, jnp.float32), "qkv": qkv, "out": out, "qk_scale": scale}
    up, down = init_dense(keys[4], width, ffn * width), init_dense(keys[5], ffn * width, width, 0.5)
    return params | {"ffn": {"norm": jnp.ones(width, jnp.float32), "up": up, "down": down}}


def init_st(key, n_in: int, n_out: int, grid: tuple[int, int], width: int, blocks: int, config, kind: Kind = "st_vivit") -> dict:
    """Input layer, positions in space (rows, columns, width), blocks (stacked), output layer. `config` has `heads` and `ffn`, a
    layer's hidden widths."""
    key_in, key_space, key_blocks, key_out = jax.random.split(key, 4)
    one = lambda key: init_block(key, width, config.ffn, config.heads, kind)
    return {
        "in": init_dense(key_in, n_in, width, 1.0),
        "space": 0.1 * jax.random.normal(key_space, (*grid, width), jnp.float32),
        "blocks": jax.vmap(one)(jax.random.split(key_blocks, blocks)),
        "norm": jnp.ones(width, jnp.float32),
        "out": init_dense(key_out, width, n_out, 1.0),
    }


def rms_norm(scale, x) -> jax.Array:
    """x / rms(x) * scale over the last axis."""
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale


def rotary(x, *places) -> jax.Array:
    """Rotary positions (2104.09864), one or several coordinates, each its share of the channels: x (..., heads, c), places that
    broadcast to (...); products of queries and keys know only differences."""
    each = x.shape[-1] // (2 * len(places))
    angle = jnp.concatenate([place[..., None] * 100.0 ** (-jnp.arange(each, dtype=jnp.int32) / each) for place in places], axis=-1)
    cos, sin = (f(angle)[..., None, :].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def places_of(grid: tuple[int, int], num: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each of `num` tokens, those of a grid and then others, which are at its first place: 2 x (num,)."""
    row, column = np.divmod(np.arange(num), grid[1])
    return tuple(np.where(np.arange(num) < grid[0] * grid[1], x, 0) for x in (row, column))


def positions(params) -> jax.Array:
    """The learned positions in space (N, width), row by row."""
    return params["space"].reshape(-1, params["space"].shape[-1])


def project(p, x, spec: Spec, *places):
    """Queries, keys and values (B, T, N, heads, c) of x (B, T, N, d), which is at these places."""
    q, k, v = jnp.split(dense(p["qkv"], rms_norm(p["norm"], x)), 3, axis=-1)
    q, k, v = (y.reshape(*x.shape[:-1], spec.heads, -1) for y in (q, k, v))
    if spec.qk_norm:
        q, k = rms_norm(p["qk_scale"][0], q), rms_norm(p["qk_scale"][1], k)
    return rotary(q, *places), rotary(k, *places), v


def attend(q, k, v, mask=None) -> jax.Array:
    """softmax(q k' / sqrt(c)) v: (..., Q, heads, c), 2 x (..., K, heads, c), mask (Q, K) -> (..., Q, heads * c)."""
    score = jnp.einsum("...qhc,...khc->...hqk", q * q.shape[-1] ** -0.5, k)
    score = score if mask is None else jnp.where(mask, score, -1e9)
    y = jnp.einsum("...hqk,...khc->...qhc", jax.nn.softmax(score, axis=-1), v)
    return y.reshape(*y.shape[:-2], -1)


def attend_time(q, k, v, mask, kind: Kind) -> jax.Array:
    """Attention to frames, position by position, or (c_vivit) of all tokens to all: (B, T, N, heads, c) -> (B, T, N, d)."""
    batch, length, num, *_ = q.shape
    if kind == "c_vivit":
        q, k, v = (x.reshape(batch, -1, *x.shape[3:]) for x in (q, k, v))
        return attend(q, k, v, mask.repeat(num, 0).repeat(num, 1)).reshape(batch, length, num, -1)
    return attend(*(x.swapaxes(1, 2) for x in (q, k, v)), mask).swapaxes(1, 2)


def attend_past(q, k, v, past, mask, kind: Kind) -> jax.Array:
    """What attend_time gives for one frame (B, 1, N, heads, c), from it and the keys and values in a cache, mask (1, S + 1)."""
    if kind == "c_vivit":
        k, v = (jnp.concatenate([jnp.moveaxis(old, 3, 1), new], axis=1) for old, new in zip(past, (k, v), strict=True))
        return attend_time(q, k, v, mask, kind)
    q, k, v = q[:, 0] * q.shape[-1] ** -0.5, k[:, 0], v[:, 0]
    score = jnp.concatenate([jnp.einsum("bnhc,bnhsc->bnhs", q, past[0]), (q * k).sum(-1, keepdims=True)], axis=-1)
    weight = jax.nn.softmax(jnp.where(mask, score, -1e9), axis=-1)
    y = jnp.einsum("bnhs,bnhsc->bnhc", weight[..., :-1], past[1]) + weight[..., -1:] * v
    return y.reshape(y.shape[0], 1, y.shape[1], -1)


def block(p, x, spec: Spec, grid: tuple[int, int], mask, time, past):
    """x (B, T, N, d), the grid's tokens first; past: none, or keys and values (B, N, heads, S, c) of frames before.

    -> x, the new keys and values, () for vit.
    """
    k = v = ()
    if "space" in p:
        places = places_of(grid, x.shape[2])
        x = x + dense(p["space"]["out"], attend(*project(p["space"], x, spec, *places)))
    if "time" in p:
        q, k, v = project(p["time"], x, spec, time[:, None])
        y = attend_time(q, k, v, mask, spec.kind) if past is None else attend_past(q, k, v, past, mask, spec.kind)
        x = x + dense(p["time"]["out"], y)
    hidden = jax.nn.gelu(dense(p["ffn"]["up"], rms_norm(p["ffn"]["norm"], x)))
    return x + dense(p["ffn"]["down"], hidden), (k, v)


def st_blocks(params, x, spec: Spec, cache: Cache | None = None):
    """x (B, T, N, d) -> the same after all blocks, and the cache with this frame in it. With a cache T is 1.

    A frame sees itself and the window - 1 frames before it, in every block; so keys and values of past frames never change, and
    the cached step gives what the whole sequence would.
    """
    dtype, grid = jnp.dtype(spec.dtype), params["space"].shape[:2]
    blocks, x = jax.tree.map(lambda y: y.astype(dtype), (params["blocks"], x))
    if cache is None:
        time = jnp.arange(x.shape[1])
        ago = time[:, None] - time
        mask = (ago >= 0) & (ago < spec.window)
        x, _ = jax.lax.scan(lambda x, p: (block(p, x, spec, grid, mask, time, None)[0], None), x, blocks, unroll=UNROLL)
        return x.astype(jnp.float32), None
    slots = spec.window - 1
    mask = jnp.append(jnp.arange(slots) < cache.t, True)[None]
    step = lambda x, inputs: block(inputs[0], x, spec, grid, mask, cache.t[None], inputs[1:])
    x, new = jax.lax.scan(step, x, (blocks, cache.k, cache.v))
    k, v = jax.tree.map(lambda old, now: old.at[..., cache.t % slots, :].set(now[:, :, 0]), (cache.k, cache.v), new)
    return x.astype(jnp.float32), Cache(k, v, cache.t + 1)


def init_cache(params, spec: Spec, batch: int, num_tokens: int) -> Cache:
    """A cache before the first frame; nothing in it for `vit`."""
    blocks, width = params["blocks"]["ffn"]["norm"].shape
    shape = (blocks, batch, num_tokens, spec.heads, spec.window - 1, width // spec.heads)
    empty = () if spec.kind == "vit" else jnp.zeros(shape, spec.dtype)
    return Cache(empty, empty, jnp.int32(0))


def st(params, x, spec: Spec, extra=0.0, cache: Cache | None = None, placed: bool = True):
    """Input layer, plus learned positions (unless not `placed`) and `extra`, blocks, output layer.

    (B, T, N, n_in) -> (B, T, N, n_out), cache.
    """
    places = positions(params) if placed else 0.0
    x, cache = st_blocks(params, dense(params["in"], x) + places + extra, spec, cache)
    return dense(params["out"], rms_norm(params["norm"], x)), cache


# --- patches


def grid_of(shape: tuple[int, int], patch: int) -> tuple[int, int]:
    """Rows and columns of patches."""
    return shape[0] // patch, shape[1] // patch


def patchify(frames, size: int) -> jax.Array:
    """(B, T, H, W, 3) uint8 -> (B, T, N, size * size * 3) in [0, 1], patches row by row."""
    b, t, h, w, c = frames.shape
    x = frames.reshape(b, t, h // size, size, w // size, size, c).swapaxes(3, 4)
    return x.reshape(b, t, -1, size * size * c).astype(jnp.float32) / 255


def unpatchify(x, size: int, shape: tuple[int, int]) -> jax.Array:
    """(B, T, N, size * size * 3) -> (B, T, H, W, 3)."""
    b, t, h, w = *x.shape[:2], shape[0] // size, shape[1] // size
    return x.reshape(b, t, h, w, size, size, 3).swapaxes(3, 4).reshape(b, t, *shape, 3)
