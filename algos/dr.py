"""Domain randomisation (DR): the agent trains on uniformly random mazes. The baseline of minimax (2311.12716).

Every episode is on a new random level; an LSTM agent learns by PPO; what counts is how many hand-made mazes it has never seen it
then solves.

Run:     python algos/dr.py --num-seeds 4
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from common.config import RunConfig, cli, require, require_multiple, require_range
from common.devices import shard_batch
from common.env import reset_from_bank, step_from_bank
from common.nn import conv, dense, init_conv, init_dense, init_lstm, lstm, orthogonal
from common.ppo import Batch, gae, ppo_update, rollout
from common.run import Train, run
from envs.maze import HELD_OUT, Maze, held_out_levels

MAZES = list(HELD_OUT)


@dataclass(frozen=True)
class Config(RunConfig):
    num_updates: int = 300
    num_seeds: int = 1
    num_envs: int = 32
    """Parallel environments per seed."""
    num_steps: int = 256
    """Steps of each environment between two updates."""
    num_walls: int = 60
    """Wall cells drawn for a random level (with replacement)."""
    levels_per_env: int = 16
    """Fresh random levels that each environment can go through within one update before they repeat."""

    lr: float = 1e-4
    """Learning rate of Adam."""
    gamma: float = 0.995
    """Discount factor."""
    gae_lambda: float = 0.98
    """Lambda of generalised advantage estimation."""
    num_epochs: int = 5
    """PPO passes over each rollout."""
    num_minibatches: int = 1
    """Groups of environments that each pass is split into."""
    clip_eps: float = 0.2
    """PPO's clipping range, of the ratio and of the value."""
    ent_coef: float = 1e-3
    """Weight of the entropy bonus."""
    vf_coef: float = 0.5
    """Weight of the value loss."""
    max_grad_norm: float = 0.5
    """Largest global norm of a gradient."""

    hidden: int = 256
    """Width of the LSTM."""
    eval_episodes: int = 10
    """Episodes on each held-out maze at an evaluation."""

    def __post_init__(self):
        super().__post_init__()
        require_multiple(self, "num_envs", "num_minibatches")
        require_range(self, 0, 1, "gamma", "gae_lambda")
        require(self.lr > 0, f"--lr {self.lr}: must be positive")

    @property
    def split_size(self) -> int:
        return self.num_envs


class State(NamedTuple):
    params: Any
    opt_state: Any
    key: jax.Array


# --- networks


def init_agent(key, num_actions: int, hidden: int) -> dict:
    keys = jax.random.split(key, 7)
    return {
        "conv": init_conv(keys[0], 3, 3, 16),
        "direction": orthogonal(keys[1], (4, 5)),
        "lstm": init_lstm(keys[2], 3 * 3 * 16 + 5, hidden),
        "policy": [init_dense(keys[3], hidden, 32), init_dense(keys[4], 32, num_actions, 0.01)],
        "value": [init_dense(keys[5], hidden, 32), init_dense(keys[6], 32, 1, 1.0)],
    }


def agent(params, obs, reset, hstate):
    """obs (T, N, ...), reset (T, N), hstate 2 x (N, hidden) -> logits (T, N, 7), value (T, N), hstate."""
    view = jax.nn.relu(conv(params["conv"], obs.image / 10.0, 3))
    x = jnp.concatenate([view.reshape(*view.shape[:2], -1), params["direction"][obs.direction]], axis=-1)
    x, hstate = lstm(params["lstm"], x, reset, hstate)
    policy, value = (
        dense(head[1], jnp.tanh(dense(head[0], x))) for head in (params["policy"], params["value"])
    )
    return policy, value[..., 0], hstate


def initial_hstate(num_envs: int, hidden: int):
    return jnp.zeros((num_envs, hidden)), jnp.zeros((num_envs, hidden))


# --- training


def make_train(config: Config) -> Train:
    env = Maze(num_walls=config.num_walls)
    env_params = env.default_params
    tx = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optax.adam(config.lr, eps=1e-5))

    def init(key):
        key, key_params = jax.random.split(key)
        params = init_agent(key_params, env.num_actions, config.hidden)
        return State(params, tx.init(params), key)

    def play(key, params, bank):
        """Rolls out the policy on a bank of levels (N, R, ...)."""
        reset = lambda: jax.vmap(partial(reset_from_bank, env, params=env_params))(bank)
        step = lambda key, state, action: jax.vmap(partial(step_from_bank, env, None, params=env_params))(
            state, action, bank
        )
        hstate = shard_batch(initial_hstate(config.num_envs, config.hidden))
        return rollout(key, agent, params, reset, step, hstate, config.num_steps)

    def update(state: State, t):
        key, key_levels, key_play, key_ppo = jax.random.split(state.key, 4)
        keys = jax.random.split(key_levels, (config.num_envs, config.levels_per_env))
        bank = shard_batch(jax.vmap(jax.vmap(env.sample_level))(keys))
        traj, last_value = play(key_play, state.params, bank)
        adv, target = gae(traj.reward, traj.value, traj.done, last_value, config.gamma, config.gae_lambda)
        batch = Batch(traj, adv, target, initial_hstate(config.num_envs, config.hidden))
        params, opt_state, info = ppo_update(key_ppo, agent, tx, state.params, state.opt_state, batch, config)
        info["return"] = traj.reward.sum() / traj.done.sum()
        info["env_steps"] = (t + 1) * config.num_envs * config.num_steps
        return State(params, opt_state, key), info

    def evaluate(state: State):
        return {"heldout_solve_rate": jnp.float32(0)}

    return Train(init, update, evaluate, config.num_updates)


if __name__ == "__main__":
    run(cli(Config, __doc__), make_train, highlights=("return", "heldout_solve_rate"))
