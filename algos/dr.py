"""DR, domain randomisation (Tobin et al., 1703.06907): the agent trains on uniformly random mazes, as in minimax (2311.12716).

Every episode is on a new random maze; an LSTM agent learns by PPO. It is the baseline of unsupervised environment design: no
curriculum at all. What counts is how many hand-made mazes it has never seen it then solves.

Run:     python algos/dr.py               (4 seeds; --preset paper for minimax's own numbers)

Expect:  see results/ued/README.md

Differs from minimax's DR (its own value in brackets; the `cpu` preset also changes the numbers in CPU below):
 1. Within one update an environment goes through at most `levels_per_env` new mazes, then through the same again (always new).
 2. Every rollout begins with a zero LSTM state (that of the previous rollout's end, on another maze).
 3. Orthogonal initialisation of every layer; the last policy layer with gain 0.01 (filled with 0.01).
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from common.env import reset_from_bank, step_from_bank
from common.nn import conv, dense, init_conv, init_dense, init_lstm, lstm, orthogonal
from common.ppo import Batch, gae, ppo_update, rollout
from common.runs import RunConfig, Train, cli, require, require_multiple, require_range, run, shard_batch
from envs.maze import EnvParams, Maze
from envs.maze_eval import held_out_results, level_results, picture_of


@dataclass(frozen=True)
class Config(RunConfig):
    """DR's settings; the defaults are minimax's."""

    may_grow = ("num_updates",)
    num_updates: int = 30_000
    """PPO updates per seed."""
    num_envs: int = 32
    """Environments played side by side."""
    num_steps: int = 256
    """Steps of each environment between two updates; every episode is on a new level."""
    levels_per_env: int = 16
    """New levels at hand for each environment in one update; after the last the first comes again."""
    num_walls: int = 60
    """Wall cells drawn for a new level (with replacement)."""

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
        for name in (
            "num_envs",
            "num_steps",
            "num_epochs",
            "num_minibatches",
            "hidden",
            "eval_episodes",
            "levels_per_env",
        ):
            require(getattr(self, name) >= 1, f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        require_multiple(self, "num_envs", "num_minibatches")
        require_range(self, 0, 1, "gamma", "gae_lambda")
        require_range(self, 0, 167, "num_walls")
        require_range(self, 0, 1000, "clip_eps", "ent_coef", "vf_coef", "max_grad_norm")
        require(self.lr > 0, f"--lr {self.lr}: must be positive")

    @property
    def split_size(self) -> int:
        return self.num_envs


PAPER = Config(log_every=50, eval_every=1000, save_every=1000, preset="paper")
CPU = replace(
    PAPER, preset="cpu", num_seeds=4, num_updates=320, log_every=10, eval_every=40, save_every=40,
    hidden=64, lr=1e-3, gamma=0.995, gae_lambda=0.95, ent_coef=1e-2, num_minibatches=4,
)  # fmt: skip


class State(NamedTuple):
    """All of one seed's run."""

    params: Any
    opt_state: Any
    key: jax.Array


# --- networks


def init_agent(key, num_actions: int, hidden: int) -> dict:
    """The student: a convolution, an embedding of the direction, an LSTM, a policy head and a value head."""
    keys = jax.random.split(key, 6)
    return {
        "conv": init_conv(keys[0], 3, 3, 16),
        "direction": orthogonal(keys[1], (4, 5)),
        "lstm": init_lstm(keys[2], 3 * 3 * 16 + 5, hidden),
        "heads": init_dense(keys[3], hidden, 32 + 32),
        "policy": init_dense(keys[4], 32, num_actions, 0.01),
        "value": init_dense(keys[5], 32, 1, 1.0),
    }


def agent(params, obs, reset, hstate):
    """obs (T, N, ...), reset (T, N), hstate 2 x (N, hidden) -> logits (T, N, 7), value (T, N), hstate."""
    view = jax.nn.relu(conv(params["conv"], obs.image / 10.0, 3))
    x = jnp.concatenate([view.reshape(*view.shape[:2], -1), params["direction"][obs.direction]], axis=-1)
    x, hstate = lstm(params["lstm"], x, reset, hstate)
    policy, value = jnp.split(jnp.tanh(dense(params["heads"], x)), 2, axis=-1)
    return dense(params["policy"], policy), dense(params["value"], value)[..., 0], hstate


def init_hstate(num_envs: int, hidden: int):
    """The LSTM's state before an episode."""
    return jnp.zeros((num_envs, hidden), jnp.float32), jnp.zeros((num_envs, hidden), jnp.float32)


# --- training


def play(key, params, bank, config: Config) -> Batch:
    """Plays num_steps steps of every environment, through its row of the bank of levels (N, R, ...)."""
    env = Maze()
    bank, hstate = shard_batch((bank, init_hstate(config.num_envs, config.hidden)))

    def reset():
        return jax.vmap(partial(reset_from_bank, env, params=EnvParams()))(bank)

    def step(key, state, action):
        return jax.vmap(partial(step_from_bank, env, key, params=EnvParams()))(state, action, bank)

    traj, last_value, _ = rollout(key, agent, params, reset, step, hstate, config.num_steps)
    adv, target = gae(traj.reward, traj.value, traj.done, last_value, config.gamma, config.gae_lambda)
    return Batch(traj, adv, target, hstate)


def make_train(config: Config) -> Train:
    """DR as pure functions of one seed."""
    env = Maze(num_walls=config.num_walls)
    tx = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optax.adam(config.lr, eps=1e-5))

    def init(key):
        key, key_params = jax.random.split(key)
        params = init_agent(key_params, env.num_actions, config.hidden)
        return State(params, tx.init(params), key)

    def update(state: State, t):
        """New levels, a rollout, PPO."""
        key, key_levels, key_play, key_learn = jax.random.split(state.key, 4)
        keys = jax.random.split(key_levels, (config.num_envs, config.levels_per_env))
        batch = play(key_play, state.params, jax.vmap(jax.vmap(env.sample_level))(keys), config)
        params, opt_state, info = ppo_update(key_learn, agent, tx, state.params, state.opt_state, batch, config)
        episodes = jnp.maximum(batch.traj.done.sum(), 1)
        info["return"] = batch.traj.reward.sum() / episodes
        info["solve_rate"] = (batch.traj.reward > 0).sum().astype(jnp.float32) / episodes
        info["env_steps"] = (t + 1) * config.num_envs * config.num_steps
        return State(params, opt_state, key), info

    return Train(init, update, partial(evaluate, config), config.num_updates)


# --- evaluation


def evaluate(config: Config, state: State) -> dict:
    """Solve rates and a film on the held-out mazes; mazes as trained on, how hard they are and pictures."""
    key_play, key_sample = jax.random.split(jax.random.fold_in(state.key, 0))
    env, hstate = Maze(num_walls=config.num_walls), partial(init_hstate, hidden=config.hidden)
    results = held_out_results(key_play, agent, state.params, hstate, config.eval_episodes)
    sample = jax.vmap(env.sample_level)(jax.random.split(key_sample, 64))
    return results | level_results(sample) | {"mazes": picture_of(jax.tree.map(lambda x: x[:10], sample))}


if __name__ == "__main__":
    run(cli(Config, __doc__, {"cpu": CPU, "paper": PAPER}), make_train, highlights=("return", "heldout_solve_rate"))
