"""Layers against plain references: orthogonality, lax.conv, and an LSTM differentiated by JAX itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.nn import conv, dense, init_conv, init_dense, init_lstm, lstm, orthogonal

T, N, N_IN, HIDDEN = 7, 3, 4, 5


@pytest.mark.parametrize("shape, gain", [((12, 5), 1.0), ((5, 12), 0.3), ((8, 8), 2.0), ((1, 6), 1.0), ((6, 1), 1.0)])
def test_orthogonal(shape, gain):
    w = jax.jit(lambda key: orthogonal(key, shape, gain))(jax.random.key(1))
    assert w.shape == shape and w.dtype == jnp.float32
    w = np.float64(w)
    gram = w.T @ w if shape[0] >= shape[1] else w @ w.T
    np.testing.assert_allclose(gram, gain**2 * np.eye(min(shape)), atol=1e-6)


def test_orthogonal_under_vmap():
    draw = lambda key: orthogonal(key, (32, 64), 2.0)
    keys = jax.random.split(jax.random.key(2), 3)
    w = np.array(jax.jit(jax.vmap(draw))(keys))
    np.testing.assert_allclose(w @ w.transpose(0, 2, 1), 4 * np.tile(np.eye(32), (3, 1, 1)), atol=1e-5)
    single = jax.jit(draw)
    for i in range(3):
        np.testing.assert_allclose(w[i], single(keys[i]), atol=1e-5)
        assert all(np.abs(w[i] - w[j]).max() > 0.1 for j in range(i))


def test_orthogonal_is_not_biased():
    """Over many draws every entry has mean 0 and variance 1 / n: a fixed sign, as of a plain QR, would show on the diagonal."""
    w = jax.jit(jax.vmap(lambda key: orthogonal(key, (3, 3))))(jax.random.split(jax.random.key(3), 4000))
    np.testing.assert_allclose(np.mean(w, 0), 0, atol=5 * np.sqrt(1 / 3 / 4000))
    np.testing.assert_allclose(np.mean(np.square(w), 0), 1 / 3, atol=0.03)


def test_dense():
    params = jax.jit(lambda key: init_dense(key, 4, 6, gain=3.0))(jax.random.key(0))
    w = np.array(params["w"])
    np.testing.assert_allclose(w @ w.T, 9 * np.eye(4), atol=1e-5)
    assert params["b"].shape == (6,) and not np.any(params["b"])
    x, b = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32), np.arange(6, dtype=np.float32)
    np.testing.assert_allclose(dense({"w": w, "b": b}, x), np.einsum("abi,ij->abj", x, w) + b, atol=1e-5)


def test_init_conv():
    params = jax.jit(lambda key: init_conv(key, 3, 2, 30))(jax.random.key(0))
    np.testing.assert_allclose(params["w"] @ params["w"].T, 2 * np.eye(18), atol=1e-5)


@pytest.mark.parametrize("height, width, size, stride", [(8, 7, 3, 1), (8, 7, 3, 2), (6, 9, 2, 2), (4, 4, 4, 1)])
def test_conv_equals_lax(height, width, size, stride):
    rng = np.random.default_rng(size)
    params = {"w": rng.normal(size=(size * size * 3, 6)).astype(np.float32), "b": np.arange(6, dtype=np.float32)}
    x = rng.normal(size=(2, 4, height, width, 3)).astype(np.float32)

    @jax.jit
    def both(params, x):
        kernel, flat = params["w"].reshape(size, size, 3, 6), x.reshape(8, height, width, 3)
        numbers = ("NHWC", "HWIO", "NHWC")
        out = jax.lax.conv_general_dilated(flat, kernel, (stride, stride), "VALID", dimension_numbers=numbers) + params["b"]
        return conv(params, x, size, stride), out.reshape(2, 4, *out.shape[1:])

    ours, expected = both(params, x)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


# --- the LSTM


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def numpy_lstm(params, x, reset, carry):
    """A loop over steps and environments."""
    w, b = np.float64(params["w"]), np.float64(params["b"])
    h, c = (np.float64(x).copy() for x in carry)
    outputs = np.zeros((*reset.shape, h.shape[-1]))
    for t in range(reset.shape[0]):
        for n in range(reset.shape[1]):
            if reset[t, n]:
                h[n], c[n] = 0, 0
            i, f, g, o = np.split(w @ np.concatenate([x[t, n], h[n]]) + b, 4)
            c[n] = sigmoid(f) * c[n] + sigmoid(i) * np.tanh(g)
            h[n] = sigmoid(o) * np.tanh(c[n])
            outputs[t, n] = h[n]
    return outputs, (h, c)


def scanned_lstm(params, x, reset, carry):
    """The same with lax.scan, for JAX's own derivative."""

    def step(carry, inputs):
        x, reset = inputs
        h, c = (jnp.where(reset[:, None], 0.0, s) for s in carry)
        i, f, g, o = jnp.split(jnp.concatenate([x, h], axis=-1) @ params["w"].T + params["b"], 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    carry, outputs = jax.lax.scan(step, carry, (x, reset))
    return outputs, carry


def lstm_case(seed):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    params = {"w": normal(4 * HIDDEN, N_IN + HIDDEN) / 2, "b": normal(4 * HIDDEN)}
    x, carry, reset = normal(T, N, N_IN), (normal(N, HIDDEN), normal(N, HIDDEN)), rng.random((T, N)) < 0.3
    reset[0] = [True, False, False]
    return params, x, reset, carry


def assert_trees_close(tree, expected, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=1e-4), tree, expected)


def test_init_lstm():
    params = jax.jit(lambda key: init_lstm(key, N_IN, HIDDEN))(jax.random.key(0))
    assert not np.any(params["b"]) and params["w"].shape == (4 * HIDDEN, N_IN + HIDDEN)
    gates = np.split(np.array(params["w"]), 4)
    for k, gate in enumerate(gates):
        np.testing.assert_allclose(gate[:, :N_IN].T @ gate[:, :N_IN], np.eye(N_IN), atol=1e-5)
        np.testing.assert_allclose(gate[:, N_IN:].T @ gate[:, N_IN:], np.eye(HIDDEN), atol=1e-5)
        assert all(np.abs(gate - other).max() > 0.1 for other in gates[:k])


run_lstm = jax.jit(lstm)


@pytest.mark.parametrize("seed", range(4))
def test_lstm_equals_numpy(seed):
    params, x, reset, carry = lstm_case(seed)
    assert_trees_close(run_lstm(params, x, reset, carry), numpy_lstm(params, x, reset, carry), 1e-5)


def gradients(function):
    """(case, weights) -> the gradients by params, x and carry of a weighted sum of all outputs."""

    def loss(params, x, carry, reset, weights):
        return sum(jax.tree.leaves(jax.tree.map(lambda y, w: (y * w).sum(), function(params, x, reset, carry), weights)))

    return jax.grad(loss, argnums=(0, 1, 2))


our_gradients, their_gradients = jax.jit(gradients(lstm)), jax.jit(gradients(scanned_lstm))


def gradient_case(seed):
    params, x, reset, carry = lstm_case(seed)
    weights = lstm_case(seed + 100)
    outputs = np.random.default_rng(seed).normal(size=(T, N, HIDDEN)).astype(np.float32)
    return params, x, carry, reset, (outputs, weights[3])


@pytest.mark.parametrize("seed", range(4))
def test_lstm_gradients_equal_autodiff(seed):
    case = gradient_case(seed)
    expected = their_gradients(*case)
    assert_trees_close(our_gradients(*case), expected, 1e-4)
    assert all(np.abs(g).max() > 1e-2 for g in jax.tree.leaves(expected))


def test_lstm_gradients_under_vmap():
    """Over seeds, as training runs it: the same as one seed after another."""
    cases = [gradient_case(seed) for seed in range(3)]
    batched = jax.jit(jax.vmap(gradients(lstm)))(*jax.tree.map(lambda *x: np.stack(x), *cases))
    for i, case in enumerate(cases):
        assert_trees_close(jax.tree.map(lambda x, i=i: x[i], batched), their_gradients(*case), 1e-4)


@pytest.mark.parametrize("split", [1, 4])
def test_lstm_in_two_calls(split):
    params, x, reset, carry = lstm_case(5)
    reset[[1, 4]] = False  # nothing is forgotten where the calls meet
    expected = run_lstm(params, x, reset, carry)
    first, middle = run_lstm(params, x[:split], reset[:split], carry)
    second, last = run_lstm(params, x[split:], reset[split:], middle)
    assert_trees_close((np.concatenate([first, second]), last), expected, 1e-6)


def test_lstm_reset_forgets_everything():
    params, x, reset, carry = lstm_case(6)
    reset[3] = True
    other = x.copy()
    other[:3] += 1
    outputs, _ = run_lstm(params, x, reset, carry)
    changed, _ = run_lstm(params, other, reset, jax.tree.map(lambda s: s + 1, carry))
    np.testing.assert_array_equal(changed[3:], outputs[3:])
    assert np.abs(changed[:3] - outputs[:3]).max() > 1e-3
