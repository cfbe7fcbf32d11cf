"""Neural network layers as plain functions over nested dicts of arrays.

`init_x(key, ...)` makes the parameters of a layer, `x(params, inputs)` applies it. Everything here is safe inside
`jit(vmap(...))` over seeds and inside `lax.scan` on CPU: convolutions are matrix products (a vmapped `lax.conv` becomes a
slow grouped convolution), and orthogonal matrices come from Gram-Schmidt (batched LAPACK calls can deadlock XLA's CPU pool).
"""

import jax
import jax.numpy as jnp


def orthogonal(key: jax.Array, shape: tuple[int, int], gain: float = 1.0) -> jax.Array:
    """A random (rows, cols) matrix with orthonormal columns (or rows, where there are fewer of them), times `gain`.

    Gram-Schmidt with re-orthogonalisation, row by row; no LAPACK. The orthogonal initialisation of Saxe et al. (1312.6120).
    """
    few, many = sorted(shape)
    q = jax.random.normal(key, (few, many), jnp.float32)

    def orthonormalise(i, q):
        before = (jnp.arange(few) < i).astype(q.dtype)
        v = q[i]
        v = v - ((q @ v) * before) @ q
        v = v - ((q @ v) * before) @ q  # once more: a single pass loses orthogonality to rounding
        return q.at[i].set(v / jnp.linalg.norm(v))

    q = jax.lax.fori_loop(0, few, orthonormalise, q)
    return gain * (q if shape[0] == few else q.T)


def init_dense(key: jax.Array, n_in: int, n_out: int, gain: float = 2**0.5) -> dict:
    """Parameters of an affine layer: orthogonal `w` (n_in, n_out), zero `b` (n_out,)."""
    return {"w": orthogonal(key, (n_in, n_out), gain), "b": jnp.zeros(n_out, jnp.float32)}


def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """(..., n_in), (n_in, n_out) -> (..., n_out). As one matrix: XLA on CPU is slow at the gradient of w over several axes."""
    return (x.reshape(-1, x.shape[-1]) @ w).reshape(*x.shape[:-1], w.shape[-1]) if x.ndim > 2 else x @ w


def dense(params: dict, x: jax.Array) -> jax.Array:
    """(..., n_in) -> (..., n_out)."""
    return matmul(x, params["w"]) + params["b"]


def init_conv(key: jax.Array, size: int, n_in: int, n_out: int, gain: float = 2**0.5) -> dict:
    """Parameters of a size x size convolution: `w` (size * size * n_in, n_out), rows ordered (y, x, channel)."""
    return init_dense(key, size * size * n_in, n_out, gain)


def conv(params: dict, x: jax.Array, size: int, stride: int = 1) -> jax.Array:
    """A convolution without padding as one matrix product (im2col): (..., H, W, C) -> (..., H', W', n_out)."""
    height = (x.shape[-3] - size) // stride + 1
    width = (x.shape[-2] - size) // stride + 1
    patches = [
        x[..., i : i + stride * (height - 1) + 1 : stride, j : j + stride * (width - 1) + 1 : stride, :]
        for i in range(size)
        for j in range(size)
    ]
    return dense(params, jnp.concatenate(patches, axis=-1))


def init_lstm(key: jax.Array, n_in: int, hidden: int) -> dict:
    """Parameters of an LSTM: `w` (4 hidden, n_in + hidden) and `b` (4 hidden,), gates ordered input, forget, cell, output.

    Every gate's two blocks, input and recurrent, are orthogonal.
    """
    keys = jax.random.split(key, (2, 4))
    wx, wh = (jax.vmap(lambda k, n=n: orthogonal(k, (hidden, n)))(keys[i]) for i, n in enumerate((n_in, hidden)))
    return {"w": jnp.concatenate([wx, wh], axis=-1).reshape(4 * hidden, n_in + hidden), "b": jnp.zeros(4 * hidden, jnp.float32)}


def lstm(params: dict, x: jax.Array, reset: jax.Array, carry: tuple[jax.Array, jax.Array]):
    """Runs an LSTM over time, zeroing the state before every step at which `reset` is set.

    x (T, N, n_in), reset (T, N) bool, carry (h, c) each (N, hidden) -> outputs (T, N, hidden), the last (h, c).

    Inside, the inputs' part of the gates is one product over all steps, before the scan. In the scan features come first,
    (features, N): a weight matrix times a thin matrix of N columns runs 1.5 times as fast on CPU as its transpose. The backward
    pass sums the recurrent weights' gradient in one product over all steps, not in T small ones.
    """
    n_in = x.shape[-1]
    keep = 1.0 - reset.astype(x.dtype)
    zx = jnp.einsum("ki,tni->tkn", params["w"][:, :n_in], x) + params["b"][:, None]
    (h, c), outputs = _lstm_scan(params["w"][:, n_in:], zx, keep, jax.tree.map(jnp.transpose, carry))
    return outputs.swapaxes(1, 2), (h.T, c.T)


def _lstm_step(w, carry, zx, keep):
    """w (4 hidden, hidden), carry 2 x (hidden, N), zx (4 hidden, N), keep (N,) -> carry, gates (4 hidden, N)."""
    h, c = carry[0] * keep, carry[1] * keep
    i, f, g, o = jnp.split(zx + w @ h, 4)
    i, f, g, o = jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)
    c = f * c + i * g
    return (o * jnp.tanh(c), c), jnp.concatenate([i, f, g, o])


@jax.custom_vjp
def _lstm_scan(w, zx, keep, carry):
    """w (4 hidden, hidden), zx (T, 4 hidden, N), keep (T, N), carry 2 x (hidden, N) -> carry, h (T, hidden, N)."""

    def step(carry, inputs):
        carry, _ = _lstm_step(w, carry, *inputs)
        return carry, carry[0]

    return jax.lax.scan(step, carry, (zx, keep))


def _lstm_forward(w, zx, keep, carry):
    def step(carry, inputs):
        new, gates = _lstm_step(w, carry, *inputs)
        return new, (carry[1], new, gates)

    last, (c_before, (h, c), gates) = jax.lax.scan(step, carry, (zx, keep))
    h_before = jnp.concatenate([carry[0][None], h[:-1]])
    return (last, h), (w, keep, h_before, c_before, c, gates)


def _lstm_backward(residuals, cotangents):
    w, keep, h_before, c_before, c, gates = residuals
    carry, dh_out = cotangents

    def step(carry, inputs):
        dh, dc = carry
        dh_out, gates, c_before, c, keep = inputs
        i, f, g, o = jnp.split(gates, 4)
        tanh_c = jnp.tanh(c)
        dh = dh + dh_out
        dc = dc + dh * o * (1 - tanh_c**2)
        dz = [dc * g * i * (1 - i), dc * c_before * keep * f * (1 - f), dc * i * (1 - g**2), dh * tanh_c * o * (1 - o)]
        dz = jnp.concatenate(dz)
        return ((w.T @ dz) * keep, dc * f * keep), dz

    carry, dz = jax.lax.scan(step, carry, (dh_out, gates, c_before, c, keep), reverse=True)  # dz (T, 4 hidden, N)
    dw = jnp.einsum("tkn,thn->kh", dz, h_before * keep[:, None])
    return dw, dz, jnp.zeros_like(keep), carry


_lstm_scan.defvjp(_lstm_forward, _lstm_backward)


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
