"""Causal layers against numpy, what they see of a sequence, and what is drawn from a nucleus."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import causal
from common.nn import draw_from_nucleus

WIDTH, HEADS, STEPS = 8, 2, 9


def scattered(key, like):
    """Parameters of the same shapes, none of them at a value (0, 1) that hides what it does."""
    leaves, tree = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    return tree.unflatten([x + 0.3 * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)])


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(1), (2, STEPS, WIDTH))


@pytest.fixture
def block():
    return scattered(jax.random.key(2), causal.init_attention_block(jax.random.key(0), WIDTH))


def changed(a, b):
    """Which steps differ in any way."""
    return (np.asarray(a) != np.asarray(b)).any((0, 2)).tolist()


# --- by hand


def norm_by_hand(p, x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def dense_by_hand(p, x):
    return x @ p["w"] + p["b"]


def test_norms_are_over_the_last_axis(x):
    p = scattered(jax.random.key(0), causal.init_norm(WIDTH))
    np.testing.assert_allclose(causal.layer_norm(p, 3 * x + 2), norm_by_hand(p, 3 * np.asarray(x) + 2), atol=1e-5)


def test_mish_against_numpy():
    x = np.float32([-30, -1.2, 0, 0.7, 30])
    np.testing.assert_allclose(causal.mish(x), x * np.tanh(np.log1p(np.exp(x))), atol=1e-6)


def test_attention_blocks_against_numpy(block, x):
    p, given = jax.device_get((block, x))
    q, k, v = (y.reshape(2, STEPS, HEADS, -1) for y in np.split(dense_by_hand(p["qkv"], given), 3, -1))
    out = np.zeros_like(q)
    for b, h, t in np.ndindex(2, HEADS, STEPS):
        score = k[b, : t + 1, h] @ q[b, t, h] / np.sqrt(WIDTH / HEADS)
        weight = np.exp(score - score.max())
        out[b, t, h] = weight / weight.sum() @ v[b, : t + 1, h]
    h = norm_by_hand(p["norms"][0], given + dense_by_hand(p["out"], out.reshape(given.shape)))
    up = np.asarray(jax.nn.gelu(dense_by_hand(p["up"], h)))
    expected = norm_by_hand(p["norms"][1], h + dense_by_hand(p["down"], up))
    np.testing.assert_allclose(causal.attention_block(block, x, HEADS), expected, atol=1e-4)


def test_convolutions_against_numpy(x):
    params = scattered(jax.random.key(2), causal.init_conv_block(jax.random.key(0), WIDTH))
    p, given = jax.device_get((params, x))
    h = given
    for conv, norm in zip(p["convs"], p["norms"], strict=True):
        padded = np.concatenate([np.zeros((2, 2, WIDTH)), h], 1)
        kernel = conv["w"].reshape(3, WIDTH, WIDTH)  # of the step before last, the last, this one
        h = norm_by_hand(norm, sum(padded[:, i : i + STEPS] @ kernel[i] for i in range(3)) + conv["b"])
        h = h * np.tanh(np.log1p(np.exp(h)))
    np.testing.assert_allclose(causal.conv_block(params, x), given + h, atol=1e-4)


# --- what is seen


def test_convolutions_see_four_steps_back_and_none_ahead(x):
    params = causal.init_conv_block(jax.random.key(0), WIDTH)
    run = lambda x: causal.conv_block(params, x)
    assert changed(run(x), run(x.at[:, 2].multiply(-2))) == [2 <= t <= 6 for t in range(STEPS)]


def test_attention_sees_all_before_and_none_ahead(block, x):
    run = lambda x: causal.attention_block(block, x, HEADS)
    assert changed(run(x), run(x.at[:, 4].multiply(-2))) == [t >= 4 for t in range(STEPS)]


def test_attention_step_by_step_from_a_cache_equals_the_whole(block, x):
    """And what a cache holds beyond the codes so far does not matter."""
    whole = causal.attention_block(block, x, HEADS)
    keys = values = jnp.full((2, HEADS, STEPS, WIDTH // HEADS), 7.0)
    for s in range(STEPS):
        found, keys, values = causal.attention_step(block, x[:, s], keys, values, s, HEADS)
        np.testing.assert_allclose(found, whole[:, s], atol=1e-5)


# --- dropout


def test_dropout_keeps_the_mean_and_needs_a_key():
    x = jnp.full((100, 100), 2.0)
    dropped = np.asarray(causal.drop(jax.random.key(0), x, 0.25))
    assert set(np.unique(dropped.round(4))) == {0.0, np.float32(2 / 0.75).round(4)}
    assert abs((dropped == 0).mean() - 0.25) < 0.03
    np.testing.assert_array_equal(causal.drop(None, x, 0.25), x)


def test_only_a_key_makes_a_block_drop(block, x):
    run = lambda key, rate: causal.attention_block(block, x, HEADS, key, rate)
    np.testing.assert_array_equal(run(None, 0.5), run(None, 0.0))
    np.testing.assert_array_equal(run(jax.random.key(0), 0.0), run(None, 0.0))
    one, other = run(jax.random.key(0), 0.5), run(jax.random.key(1), 0.5)
    assert (one != other).any() and (one != run(None, 0.0)).any()


# --- the nucleus

P = np.array([0.02, 0.3, 0.0, 0.25, 0.004, 0.2, 0.1, 0.076, 0.05])
LOGITS = np.float32(np.log(np.maximum(P, 1e-12))) + 5


def nucleus(p, top_p):
    """The likeliest, which together reach top_p, by sorting; their probabilities among themselves."""
    order = np.argsort(-p)
    num = 1 + np.searchsorted(np.cumsum(p[order]), top_p)
    kept = np.zeros_like(p)
    kept[order[:num]] = p[order[:num]]
    return kept / kept.sum()


def draws(logits, temperature, top_p, num=40_000):
    logits = jnp.tile(logits, (num, 1))
    return np.asarray(jax.jit(draw_from_nucleus, static_argnums=(2, 3))(jax.random.key(0), logits, temperature, top_p))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (1.0, 0.9), (1.0, 0.6), (2.0, 0.99), (0.5, 0.5), (1.0, 0.01)])
def test_codes_are_drawn_from_the_nucleus_as_often_as_they_are_likely(temperature, top_p):
    p = P ** (1 / temperature) / (P ** (1 / temperature)).sum()
    expected = nucleus(p, top_p) if top_p < 1 else p
    found = np.bincount(draws(LOGITS, temperature, top_p), minlength=len(P)) / 40_000
    assert ((found > 0) == (expected > 0)).all()  # the rarest is due some 160 times
    np.testing.assert_allclose(found, expected, atol=0.012)  # 5 standard deviations of the likeliest


def test_the_nucleus_of_many_codes_is_that_of_sorting():
    """Rows of their own: 512 codes, of whose nucleus each row draws but one that a sort keeps."""
    logits = jax.random.normal(jax.random.key(3), (2000, 512)) * 2
    p = np.asarray(jax.nn.softmax(logits))
    code = np.asarray(draw_from_nucleus(jax.random.key(4), logits, 1.0, 0.8))
    before = np.array([row[row > row[i] * (1 + 1e-3)].sum() for row, i in zip(p, code, strict=True)])
    assert before.max() < 0.8 and before.max() > 0.79  # what is likelier does not yet reach top_p; nearly all of it is drawn


def test_without_temperature_the_likeliest_is_taken():
    logits = jax.random.normal(jax.random.key(0), (50, 7))
    found = draw_from_nucleus(None, logits, 0.0, 0.3)
    np.testing.assert_array_equal(found, logits.argmax(-1))
    assert found.dtype == jnp.int32 == draw_from_nucleus(jax.random.key(0), logits, 1.0, 0.3).dtype
