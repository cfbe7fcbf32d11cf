"""The layers of many small networks side by side, against plain products and the equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.lanes import choose, gru, linear


@pytest.mark.parametrize(("batch", "n_in", "n_out"), [((2,), 5, 3), ((7, 3), 16, 48), ((2,), 70, 4), ((40,), 5, 3)])
def test_linear_and_its_gradient(batch, n_in, n_out):
    """Every way of computing it, small or wide, is the plain product match by match, and so are the gradients."""
    rng = np.random.default_rng(0)
    w, x, y = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((n_out, n_in, 6), (*batch, n_in, 6), (*batch, n_out, 6)))
    plain = lambda w, x: jnp.einsum("oim,...im->...om", w, x)
    out, grads = jax.jit(lambda w, x: (linear(w, x), jax.grad(lambda w, x: (linear(w, x) * y).sum(), (0, 1))(w, x)))(w, x)
    np.testing.assert_allclose(out, np.einsum("oim,...im->...om", w, x), rtol=1e-4, atol=1e-4)
    theirs = jax.jit(jax.grad(lambda w, x: (plain(w, x) * y).sum(), (0, 1)))(w, x)
    for a, b in zip(grads, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_gru():
    """Against the unit's equations in numpy, one match at a time."""
    rng = np.random.default_rng(1)
    params = {"wx": rng.normal(size=(12, 3, 2)), "wh": rng.normal(size=(12, 4, 2)), "b": rng.normal(size=(12, 2))}
    h, x = rng.normal(size=(5, 4, 2)), rng.normal(size=(5, 3, 2))
    ours = np.array(jax.jit(gru)(jax.tree.map(np.float32, params), np.float32(h), np.float32(x)))
    sigmoid = lambda v: 1 / (1 + np.exp(-v))
    for e in range(5):
        for m in range(2):
            wx, wh, b = (params[name][..., m] for name in ("wx", "wh", "b"))
            z = sigmoid(wx[:4] @ x[e, :, m] + wh[:4] @ h[e, :, m] + b[:4])
            r = sigmoid(wx[4:8] @ x[e, :, m] + wh[4:8] @ h[e, :, m] + b[4:8])
            n = np.tanh(wx[8:] @ x[e, :, m] + wh[8:] @ (r * h[e, :, m]) + b[8:])
            np.testing.assert_allclose(ours[e, :, m], (1 - z) * h[e, :, m] + z * n, rtol=1e-4, atol=1e-5)


def test_choose():
    scores = jnp.asarray(np.random.default_rng(3).normal(size=(6, 5, 7)))
    np.testing.assert_array_equal(choose(scores), np.argmax(scores, axis=1))
