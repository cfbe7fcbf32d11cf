"""What H-GAP (2312.02682) is compared with: cloning of behaviour without a task, and offline reinforcement learning of each task.

make_bc       a network from what is observed to the mean action, by squared error; it knows no task
make_offline  a specialist for each task by TD3+BC (2106.06860), all of them side by side, on the same demonstrations, whose rewards
              are the task's function of what is observed after each step: what H-GAP is shown no reward of

Both act greedily, a new action every step, from the same worlds as H-GAP. A fall ends an episode with a reward of 0, in the data as
in evaluations, unless the task allows it. An episode that ends otherwise is cut: no critic learns from its last step.

Axes: K tasks, B steps of a batch, O numbers of an observation, A of an action.

Differs from TD3+BC (its own way in brackets): the target policy's noise and the squared error of cloning are in standard deviations
of the demonstrations' actions, which are small (in halves of the actions' ranges); all tasks learn from the same batches.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flashbax import make_flat_buffer

from common.nn import dense, init_dense
from common.runs.config import require
from common.runs.devices import shard_batch
from common.runs.programs import Train, if_needed, prepared
from envs.humanoid import split
from envs.humanoid_control import Tasks, begin_worlds, film, make_tasks, may_fall, play
from envs.humanoid_data import Data, draw_windows
from envs.humanoid_skills import window_starts

GAMMA, TAU, DELAY = 0.99, 0.005, 2  # discount; share of the new in targets; critics' updates for one of the actor and targets
TARGET_NOISE, TARGET_CLIP = 0.2, 0.5  # of the target policy's actions, in standard deviations of the demonstrations'


def init_mlp(key, sizes: tuple[int, ...], last: float) -> list:
    """Layers of these widths; `last`: the gain of the last one."""
    gains = [2**0.5] * (len(sizes) - 2) + [last]
    shapes = zip(jax.random.split(key, len(gains)), sizes[:-1], sizes[1:], gains, strict=True)
    return [init_dense(key, n_in, n_out, gain) for key, n_in, n_out, gain in shapes]


def mlp(layers: list, x) -> jax.Array:
    """(..., n_in) -> (..., n_out), with rectifiers between layers."""
    for layer in layers[:-1]:
        x = jax.nn.relu(dense(layer, x))
    return dense(layers[-1], x)


def control(config, env, data: Data, tasks: Tasks, policy: Callable) -> tuple[dict, jax.Array]:
    """A policy at every task, from the worlds in which H-GAP's evaluations begin -> returns and a film; steps until a fall, where
    it is not allowed. policy: standardised observations (M, O) -> actions (M, A)."""
    mean, std = data.mean[: data.num_obs], data.std[: data.num_obs]
    planner = lambda key, memory, world, obs: (policy((obs - mean) / std)[:, None], memory)
    keys = jax.random.split(jax.random.key(2), 5)
    world = begin_worlds(keys[0], env, data.worlds, len(tasks.which))
    outcome = play(keys[1], env, tasks, planner, (), world, config.eval_steps, 1)
    each = outcome.total.reshape(len(tasks.names), -1).mean(1)
    results = {f"return_{task}": x for task, x in zip(tasks.names, each, strict=True)}
    shown = jax.tree.map(lambda x: x[:: config.plan_every], outcome.worlds)
    return results | film(env, tasks, shown, config.eval_episodes), outcome.length[~may_fall(tasks)].mean().astype(jnp.float32)


# --- cloning


class Cloning(NamedTuple):
    """All of one seed's run of `bc`."""

    params: list
    opt_state: Any
    key: jax.Array


def make_bc(config, data: Data, env) -> Train:
    """Cloning as pure functions of one seed."""
    num_obs, size, tx, tasks = data.num_obs, len(data.mean), optax.adam(config.bc_lr), make_tasks(config, env)
    there = np.zeros((1, 2), np.int32) if config.dry_run else window_starts(data.left, 1)

    def init(key):
        key, key_params = jax.random.split(key)
        params = init_mlp(key_params, (num_obs, config.mlp_hidden, config.mlp_hidden, size - num_obs), 0.01)
        return Cloning(params, tx.init(params), key)

    def loss(params, x):
        """Squared error, in variances, of the actions of steps x (..., O + A)."""
        return ((mlp(params, x[..., :num_obs]) - x[..., num_obs:]) ** 2).mean()

    def update(state: Cloning, t):
        key, key_draw = jax.random.split(state.key)
        x = shard_batch(draw_windows(key_draw, data.steps, there, config.bc_batch, 1)[:, 0])
        mse, grads = jax.value_and_grad(loss)(state.params, x)
        updates, opt_state = tx.update(grads, state.opt_state)
        return Cloning(optax.apply_updates(state.params, updates), opt_state, key), {"action_mse": mse}

    def act(state: Cloning) -> dict:
        policy = lambda obs: mlp(state.params, obs) * data.std[num_obs:] + data.mean[num_obs:]
        results, length = control(config, env, data, tasks, policy)
        return results | {"imitation_length": length}

    def evaluate(state: Cloning) -> dict:
        x = draw_windows(jax.random.key(1), data.held_steps, data.held_starts, 512, config.window)
        results = {"heldout_action_mse": loss(state.params, x)}
        return results | if_needed(state.opt_state[0].count > 0, act, state)

    return Train(init, update, evaluate, config.num_updates)


# --- offline reinforcement learning


class Specialists(NamedTuple):
    """All of one seed's run of `offline`; every array of parameters is (K, ...), critics' (K, 2, ...)."""

    params: dict  # actor, critic
    target: dict  # the same, following slowly
    opt_state: dict
    key: jax.Array


class Steps(NamedTuple):
    """A batch of steps of every task."""

    obs: jax.Array  # (B, O), standardised
    action: jax.Array  # (B, A), standardised
    after: jax.Array  # (B, O): what was observed after it, standardised
    there: jax.Array  # (B,) bool: it is a step of an episode
    reward: jax.Array  # (K, B): each task's
    over: jax.Array  # (K, B) bool: a fall ended the episode
    known: jax.Array  # (K, B) bool: what came of it is in the data


OF_TASKS = Steps(None, None, None, None, 0, 0, 0)  # the axes of tasks, for vmap


def make_buffer(config, data: Data):
    """A flashbax buffer of pairs of steps, one after the other -> buffer, its state with all of the demonstrations."""
    (num, steps), size = data.left.shape, data.steps.shape[-1]
    fits = config.offline_batch <= num * steps
    require(fits, f"--offline-batch {config.offline_batch}: must be at most {num * steps}, all steps that there are")
    buffer = make_flat_buffer(num * steps, num, config.offline_batch, add_sequences=True, add_batch_size=num)

    def fill(steps, left, fell):
        batch = {"step": steps, "left": left, "fallen": fell}
        one = {"step": jnp.zeros(size, jnp.float32), "left": jnp.int32(0), "fallen": jnp.bool_(False)}
        return buffer.add(buffer.init(one), batch)

    return buffer, prepared(config, fill, data.steps, data.left, data.fell)


def label(env, tasks: Tasks, data: Data, pair) -> Steps:
    """A buffer's pairs with every task's reward."""
    num_obs, mean, std = data.num_obs, data.mean, data.std
    obs, after = pair.first["step"][:, :num_obs], pair.second["step"][:, :num_obs]
    seen = split(after * std[:num_obs] + mean[:num_obs], env.parts)
    reward = jnp.stack([task(seen) for task in tasks.functions])
    over = pair.first["fallen"] & ~np.array(tasks.falling)[:, None]
    known = over | (pair.first["left"] > 1)
    action = pair.first["step"][:, num_obs:]
    return Steps(obs, action, after, pair.first["left"] > 0, jnp.where(over, 0.0, reward), over, known)


def mean_where(which, x) -> jax.Array:
    """The mean of x (B,) over some of them (B,) bool; 0 of none."""
    return jnp.where(which, x, 0.0).sum() / jnp.maximum(which.sum(), 1).astype(jnp.float32)


def limits_of(data: Data) -> np.ndarray:
    """The ends -1 and 1 of all actions' ranges, standardised: (2, A)."""
    return (np.float32([[-1], [1]]) - data.mean[data.num_obs :]) / data.std[data.num_obs :]


def actor(params, obs, limits) -> jax.Array:
    """(B, O) -> standardised actions (B, A) within limits (2, A)."""
    return limits.mean(0) + (limits[1] - limits[0]) / 2 * jnp.tanh(mlp(params, obs))


def critics(params, obs, action) -> jax.Array:
    """(B, O), (B, A) -> both critics' values (2, B)."""
    x = jnp.concatenate([obs, action], axis=-1)
    return jax.vmap(lambda params: mlp(params, x)[..., 0])(params)


def goals(target, steps: Steps, noise, limits) -> jax.Array:
    """What critics are to say of one task's steps (B,): r + gamma min Q'(s', clip(pi'(s') + noise)); noise (B, A)."""
    action = jnp.clip(actor(target["actor"], steps.after, limits) + noise, *limits)
    return steps.reward + GAMMA * jnp.where(steps.over, 0.0, critics(target["critic"], steps.after, action).min(0))


def critic_loss(params, target, steps: Steps, noise, limits) -> jax.Array:
    """The sum of both critics' squared errors, of one task."""
    error = critics(params, steps.obs, steps.action) - goals(target, steps, noise, limits)
    return mean_where(steps.known, (error**2).sum(0))


def actor_loss(params, critic, steps: Steps, limits, alpha: float):
    """-lambda Q(s, pi(s)) + (pi(s) - a)^2 of one task, lambda = alpha / mean |Q| (equations 3, 5 of TD3+BC) -> loss, metrics."""
    action = actor(params, steps.obs, limits)
    q = critics(critic, steps.obs, action)[0]
    scale = alpha / jnp.maximum(mean_where(steps.there, jnp.abs(jax.lax.stop_gradient(q))), 1e-6)
    value, cloning = mean_where(steps.there, q), mean_where(steps.there, ((action - steps.action) ** 2).mean(-1))
    return -scale * value + cloning, {"q": value, "action_mse": cloning}


def init_specialist(key, num_obs: int, num_actions: int, hidden: int) -> dict:
    """An actor and two critics."""
    keys = jax.random.split(key, 3)
    critic = jax.vmap(lambda key: init_mlp(key, (num_obs + num_actions, hidden, hidden, 1), 1.0))(keys[1:])
    return {"actor": init_mlp(keys[0], (num_obs, hidden, hidden, num_actions), 0.01), "critic": critic}


def descend(tx, name: str, state: Specialists, grads) -> Specialists:
    """The actors or the critics after a step."""
    updates, opt_state = tx.update(grads, state.opt_state[name])
    params = state.params | {name: optax.apply_updates(state.params[name], updates)}
    return state._replace(params=params, opt_state=state.opt_state | {name: opt_state})


def improve(tx, limits, alpha: float, state: Specialists, steps: Steps) -> tuple[Specialists, dict]:
    """The actors' step, and that of all targets."""
    loss = jax.vmap(jax.grad(actor_loss, has_aux=True), in_axes=(0, 0, OF_TASKS, None, None))
    grads, metrics = loss(state.params["actor"], state.params["critic"], steps, limits, alpha)
    state = descend(tx, "actor", state, grads)
    target = jax.tree.map(lambda old, new: (1 - TAU) * old + TAU * new, state.target, state.params)
    return state._replace(target=target), jax.tree.map(jnp.mean, metrics)


def make_offline(config, data: Data, env) -> Train:
    """TD3+BC of each of the tasks as pure functions of one seed."""
    num_obs, num_actions, tasks = data.num_obs, len(data.mean) - data.num_obs, make_tasks(config, env)
    num, tx, (buffer, filled) = len(tasks.names), optax.adam(config.offline_lr), make_buffer(config, data)
    limits, mean, std = limits_of(data), data.mean[num_obs:], data.std[num_obs:]

    def init(key):
        key, key_params = jax.random.split(key)
        one = lambda key: init_specialist(key, num_obs, num_actions, config.mlp_hidden)
        params = jax.vmap(one)(jax.random.split(key_params, num))
        target = jax.tree.map(jnp.copy, params)  # donated buffers are not shared
        return Specialists(params, target, {name: tx.init(x) for name, x in params.items()}, key)

    def update(state: Specialists, t):
        key, key_draw, key_noise = jax.random.split(state.key, 3)
        pair = buffer.sample(jax.tree.map(jnp.asarray, filled), key_draw).experience
        steps = label(env, tasks, data, shard_batch(pair))
        noise = TARGET_NOISE * jax.random.normal(key_noise, (num, *steps.action.shape), jnp.float32)
        noise = jnp.clip(noise, -TARGET_CLIP, TARGET_CLIP)
        loss = jax.vmap(jax.value_and_grad(critic_loss), in_axes=(0, 0, OF_TASKS, 0, None))
        losses, grads = loss(state.params["critic"], state.target, steps, noise, limits)
        state = descend(tx, "critic", state._replace(key=key), grads)
        wait = lambda state, steps: (state, dict.fromkeys(("q", "action_mse"), jnp.float32(jnp.nan)))
        state, metrics = jax.lax.cond(t % DELAY == 0, partial(improve, tx, limits, config.offline_alpha), wait, state, steps)
        return state, {"critic_loss": losses.mean()} | metrics

    def act(state: Specialists) -> dict:
        each = jax.vmap(partial(actor, limits=limits))
        policy = lambda obs: each(state.params["actor"], obs.reshape(num, -1, num_obs)).reshape(len(obs), -1) * std + mean
        results, length = control(config, env, data, tasks, policy)
        return results | {"length": length}

    def evaluate(state: Specialists) -> dict:
        return if_needed(state.opt_state["actor"][0].count > 0, act, state)

    return Train(init, update, evaluate, config.num_updates)
