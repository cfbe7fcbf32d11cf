"""Many small networks side by side, each with weights of its own: their layers, and PPO for all of them at once.

Every policy of a population plays many opponents in many environments, so thousands of tiny networks with weights of their own run
side by side. XLA's batched products of such small matrices are slow on CPU. Here the matches M (population x opponents) are the
last axis, next to each other in memory, features come before them, and a product is a sum written out term by term, which becomes a
few vector instructions: 4 to 5 times as fast. Shapes: x (E, features, M), weights (features out, features in, M).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


def to_matches(population, opponents: int):
    """A population's weights (P, ...) -> (..., M), each member's `opponents` times, side by side."""
    return jax.tree.map(lambda x: jnp.repeat(jnp.moveaxis(x, 0, -1), opponents, axis=-1), population)


def spread(weights, sizes):
    """One policy's weights for every match."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x[..., None], (*x.shape, sizes[0] * sizes[1])), weights)


# --- layers


def is_wide(w, x) -> bool:
    """Whether a product is large enough for XLA's own to be faster: many inputs a weight, or many inputs at all."""
    return w.shape[1] > 64 or (w[..., 0].size > 64 and x[..., 0, 0].size >= 8)


@jax.custom_vjp
def linear(w, x) -> jax.Array:
    """w (out, in, M), x (..., in, M) -> (..., out, M), each match with its own weights."""
    if is_wide(w, x):
        return jnp.einsum("oim,...im->...om", w, x)
    y = w[:, 0] * x[..., 0, None, :]
    for k in range(1, w.shape[1]):
        y = y + w[:, k] * x[..., k, None, :]
    return y


def _linear_forward(w, x):
    return linear(w, x), (w, x)


def _linear_backward(kept, dy):
    """The gradient, without that of every slice taken above."""
    w, x = kept
    flat_x, flat_y = (v.reshape(-1, *v.shape[-2:]) for v in (x, dy))
    wide = is_wide(w, x)
    dw = jnp.einsum("bom,bim->oim", flat_y, flat_x) if wide else (flat_y[:, :, None] * flat_x[:, None]).sum(0)
    return dw, linear(w.swapaxes(0, 1), dy)


linear.defvjp(_linear_forward, _linear_backward)


def affine(params, x) -> jax.Array:
    """`linear` with a bias."""
    return linear(params["w"], x) + params["b"]


def gru(params, h, x) -> jax.Array:
    """A gated recurrent unit (1406.1078): h (..., H, M), x (..., in, M) -> the next h. Gates ordered update, reset, candidate."""
    width = h.shape[-2]
    gates = linear(params["wx"], x) + params["b"]
    z, r = jnp.split(jax.nn.sigmoid(gates[..., : 2 * width, :] + linear(params["wh"][: 2 * width], h)), 2, axis=-2)
    candidate = jnp.tanh(gates[..., 2 * width :, :] + linear(params["wh"][2 * width :], r * h))
    return (1 - z) * h + z * candidate


def affine_shape(n_in: int, n_out: int) -> dict:
    return {"w": (n_out, n_in), "b": (n_out,)}


def gru_shape(n_in: int, hidden: int) -> dict:
    return {"wx": (3 * hidden, n_in), "wh": (3 * hidden, hidden), "b": (3 * hidden,)}


# --- actions


def pick(x, action) -> jax.Array:
    """x (..., A, M) at action (..., M) -> (..., M)."""
    return sum(jnp.where(action == a, x[..., a, :], 0.0) for a in range(x.shape[-2]))


def choose(scores) -> jax.Array:
    """The place of the highest of scores (..., A, M) -> (..., M) int32; written out, since an argmax over so few is slow."""
    best, place = scores[..., 0, :], jnp.zeros(scores[..., 0, :].shape, jnp.int32)
    for a in range(1, scores.shape[-2]):
        higher = scores[..., a, :] > best
        best, place = jnp.where(higher, scores[..., a, :], best), jnp.where(higher, a, place)
    return place


# --- learning


class Episode(NamedTuple):
    """What a learner saw of an episode, leading axes (T, E)."""

    obs: jax.Array  # (T, E, F, M)
    memory: Any  # (T, E, H, M), before each step
    action: jax.Array  # (T, E, M) int32
    log_prob: jax.Array
    value: jax.Array
    reward: jax.Array


def ppo_epochs(key, net, tx, params, opt_state, flat, config):
    """PPO (1707.06347) on shuffled single steps, for all matches M at once -> params, opt_state.

    net: params, memory, obs -> logits (..., A, M), value (..., M), memory. Every leaf of `flat`, an Episode, its advantages and its
    value targets, is (T E, ..., M). config needs num_epochs, num_minibatches (a divisor of T E), clip_eps, vf_coef, ent_coef and
    max_grad_norm.
    """

    def loss(params, batch):
        episode, adv, target = batch
        logits, value, _ = net(params, episode.memory, episode.obs)
        log_probs = jax.nn.log_softmax(logits, axis=-2)
        ratio = jnp.exp(pick(log_probs, episode.action) - episode.log_prob)
        adv = (adv - adv.mean(0)) / (adv.std(0) + 1e-8)
        gain = jnp.minimum(ratio * adv, jnp.clip(ratio, 1 - config.clip_eps, 1 + config.clip_eps) * adv)
        near = episode.value + jnp.clip(value - episode.value, -config.clip_eps, config.clip_eps)
        error = jnp.maximum((value - target) ** 2, (near - target) ** 2)
        entropy = -(jnp.exp(log_probs) * log_probs).sum(-2)
        return (-gain + config.vf_coef * error - config.ent_coef * entropy).mean(0).sum()  # matches do not touch one another

    def minibatch_step(carry, batch):
        params, opt_state = carry
        grads = jax.grad(loss)(params, batch)
        norm = jnp.sqrt(sum((g * g).sum(tuple(range(g.ndim - 1))) for g in jax.tree.leaves(grads)))  # (M,)
        scale = jnp.minimum(1.0, config.max_grad_norm / jnp.maximum(norm, 1e-9))
        updates, opt_state = tx.update(jax.tree.map(lambda g: g * scale, grads), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    def epoch(carry, key):
        order = jax.random.permutation(key, len(flat[1])).reshape(config.num_minibatches, -1)
        return jax.lax.scan(lambda carry, rows: minibatch_step(carry, jax.tree.map(lambda x: x[rows], flat)), carry, order)

    (params, opt_state), _ = jax.lax.scan(epoch, (params, opt_state), jax.random.split(key, config.num_epochs))
    return params, opt_state
