"""Proximal policy optimisation (Schulman et al., 1707.06347) and generalised advantage estimation (1506.02438).

Axes: (time, env, ...), written T and N. A policy is a function
`policy(params, obs, reset, hstate) -> (logits (T, N, A), value (T, N), hstate)`; `reset` (T, N) tells a recurrent policy where an
episode begins, and a policy without memory ignores it and passes `hstate` through.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax


class Transition(NamedTuple):
    """One step of N environments, or T of them stacked: every field has leading axes (T, N)."""

    obs: Any
    reset: jax.Array  # bool: this step is the first of its episode
    action: jax.Array
    log_prob: jax.Array
    value: jax.Array
    reward: jax.Array
    done: jax.Array  # bool: the episode ended with this step


class Batch(NamedTuple):
    """What an update learns from: T steps of N environments and the recurrent state they began with."""

    traj: Transition  # (T, N, ...)
    adv: jax.Array  # (T, N)
    target: jax.Array  # (T, N)
    hstate: Any  # (N, ...)


def gae(reward, value, done, last_value, gamma: float, gae_lambda: float):
    """Advantages and value targets, both (T, N). 1506.02438, Eq. 16; `done` steps do not bootstrap.

    reward, value, done: (T, N); last_value (N,): the value of the observation after the last step.
    """
    chex.assert_equal_shape([reward, value, done])

    def step(carry, x):
        adv_next, value_next = carry
        reward, value, going_on = x
        delta = reward + gamma * value_next * going_on - value
        adv = delta + gamma * gae_lambda * going_on * adv_next
        return (adv, value), adv

    init = (jnp.zeros_like(last_value), last_value)
    _, adv = jax.lax.scan(step, init, (reward, value, 1.0 - done), reverse=True)
    return adv, adv + value


def ppo_loss(logits, value, batch: Batch, clip_eps: float, vf_coef: float, ent_coef: float):
    """The clipped surrogate with a clipped value loss and an entropy bonus (1707.06347, Eq. 7 and 9).

    logits (T, N, A), value (T, N) under the new parameters -> scalar loss, dict of scalar diagnostics.
    Advantages are normalised over the batch given.
    """
    traj = batch.traj
    log_probs = jax.nn.log_softmax(logits)
    log_prob = jnp.take_along_axis(log_probs, traj.action[..., None], axis=-1)[..., 0]
    log_ratio = log_prob - traj.log_prob
    ratio = jnp.exp(log_ratio)
    adv = (batch.adv - batch.adv.mean()) / (batch.adv.std() + 1e-5)
    policy_loss = -jnp.minimum(ratio * adv, jnp.clip(ratio, 1 - clip_eps, 1 + clip_eps) * adv).mean()
    value_clipped = traj.value + jnp.clip(value - traj.value, -clip_eps, clip_eps)
    value_error = jnp.maximum((value - batch.target) ** 2, (value_clipped - batch.target) ** 2)
    value_loss = 0.5 * value_error.mean()
    entropy = -(jnp.exp(log_probs) * log_probs).sum(-1).mean()
    loss = policy_loss + vf_coef * value_loss - ent_coef * entropy
    return loss, {
        "loss": loss,
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": entropy,
        "approx_kl": ((ratio - 1) - log_ratio).mean(),
        "clip_fraction": (jnp.abs(ratio - 1) > clip_eps).mean(),
    }


def ppo_update(key, policy: Callable, tx: optax.GradientTransformation, params, opt_state, batch: Batch, config):
    """`config.num_epochs` passes over the batch in `config.num_minibatches` groups of whole environments.

    config needs num_epochs, num_minibatches (a divisor of N), clip_eps, vf_coef, ent_coef.
    Returns params, opt_state, and the mean diagnostics of all gradient steps.
    """

    def loss_fn(params, batch):
        logits, value, _ = policy(params, batch.traj.obs, batch.traj.reset, batch.hstate)
        return ppo_loss(logits, value, batch, config.clip_eps, config.vf_coef, config.ent_coef)

    def minibatch_step(carry, batch):
        params, opt_state = carry
        (_, info), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        info["grad_norm"] = optax.global_norm(grads)
        return (optax.apply_updates(params, updates), opt_state), info

    def epoch(carry, key):
        if config.num_minibatches == 1:
            return minibatch_step(carry, batch)
        carry, info = jax.lax.scan(minibatch_step, carry, minibatches(key, batch, config.num_minibatches))
        return carry, jax.tree.map(jnp.mean, info)

    keys = jax.random.split(key, config.num_epochs)
    (params, opt_state), info = jax.lax.scan(epoch, (params, opt_state), keys)
    return params, opt_state, jax.tree.map(jnp.mean, info)


def minibatches(key, batch: Batch, num_minibatches: int) -> Batch:
    """Shuffles the environments into groups: the result has a leading axis (num_minibatches, ...)."""
    num_envs = batch.adv.shape[1]
    groups = jax.random.permutation(key, num_envs).reshape(num_minibatches, -1)
    steps, hstate = (batch.traj, batch.adv, batch.target), batch.hstate
    take_env = jax.tree.map(lambda x: jnp.moveaxis(jnp.take(x, groups, axis=1), 1, 0), steps)
    return Batch(*take_env, jax.tree.map(lambda x: jnp.take(x, groups, axis=0), hstate))


def rollout(key, policy: Callable, params, reset: Callable, step: Callable, hstate, num_steps: int):
    """Plays `num_steps` steps of N environments -> Transition (T, N, ...), the value of what comes next (N,), the last env_state.

    reset() -> (obs, env_state); step(key, env_state, action (N,)) -> (obs, env_state, reward (N,), done (N,)), which also
    begins the next episode where one is done. `hstate` (N, ...) is the recurrent state to begin with.
    """
    key_act, key_env = jax.random.split(key)
    obs, env_state = reset()
    num_envs = jax.tree.leaves(obs)[0].shape[0]

    def act(obs, first, hstate):
        obs, first = jax.tree.map(lambda x: x[None], (obs, first))
        logits, value, hstate = policy(params, obs, first, hstate)
        return logits[0], value[0], hstate

    num_actions = jax.eval_shape(act, obs, jnp.zeros(num_envs, bool), hstate)[0].shape[-1]
    noise = jax.random.gumbel(key_act, (num_steps, num_envs, num_actions), jnp.float32)  # one big draw is cheaper than T small ones

    def play(carry, inputs):
        obs, env_state, first, hstate = carry
        noise, key = inputs
        logits, value, hstate = act(obs, first, hstate)
        action = jnp.argmax(logits + noise, axis=-1).astype(jnp.int32)
        log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), action[:, None], axis=-1)[:, 0]
        next_obs, env_state, reward, done = step(key, env_state, action)
        transition = Transition(obs, first, action, log_prob, value, reward, done)
        return (next_obs, env_state, done, hstate), transition

    carry = (obs, env_state, jnp.ones(num_envs, bool), hstate)
    (obs, env_state, first, hstate), traj = jax.lax.scan(play, carry, (noise, jax.random.split(key_env, num_steps)))
    return traj, act(obs, first, hstate)[1], env_state


class Episodes(NamedTuple):
    """One finished episode of each of N environments."""

    total_reward: jax.Array  # (N,)
    length: jax.Array  # (N,) int32
    record: Any  # (max_steps, ...): what `record` gave after every step, its last value repeated once all had ended


def play_episodes(key, policy: Callable, params, reset, step, hstate, max_steps: int, record=lambda env_state: ()) -> Episodes:
    """Plays one episode of each of N environments with sampled actions, until the last has ended or `max_steps` have passed.

    `reset` and `step` as for `rollout`, but `step` need not begin a new episode: an environment stays where its own ended.
    """
    key_env, key_act = jax.random.split(key)
    obs, env_state = reset()
    num_envs = jax.tree.leaves(obs)[0].shape[0]
    like = jax.eval_shape(record, env_state)
    trace = jax.tree.map(lambda x: jnp.zeros((max_steps, *x.shape), x.dtype), like)

    def going_on(carry):
        t, live = carry[0], carry[1]
        return (t < max_steps) & live.any()

    def play(carry):
        t, live, obs, env_state, hstate, total, length, trace = carry
        first = jnp.full((1, num_envs), t == 0)
        logits, _, hstate = policy(params, jax.tree.map(lambda x: x[None], obs), first, hstate)
        action = jax.random.categorical(jax.random.fold_in(key_act, t), logits[0]).astype(jnp.int32)
        obs, moved, reward, done = step(jax.random.fold_in(key_env, t), env_state, action)
        env_state = jax.tree.map(lambda x, y: jnp.where(live.reshape(-1, *[1] * (x.ndim - 1)), x, y), moved, env_state)
        trace = jax.tree.map(lambda all, x: all.at[t].set(x), trace, record(env_state))
        return t + 1, live & ~done, obs, env_state, hstate, total + jnp.where(live, reward, 0), length + live, trace

    zeros = jnp.zeros(num_envs, jnp.float32)
    carry = (jnp.int32(0), jnp.ones(num_envs, bool), obs, env_state, hstate, zeros, zeros.astype(jnp.int32), trace)
    steps, *_, total, length, trace = jax.lax.while_loop(going_on, play, carry)
    played = jnp.minimum(jnp.arange(max_steps), steps - 1)
    return Episodes(total, length, jax.tree.map(lambda x: x[played], trace))
