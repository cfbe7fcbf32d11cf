"""SFL, sampling for learnability (Rutherford et al., 2408.15099): train on mazes that the agent solves sometimes, not always.

Now and then many random mazes are played; those of the highest learnability p (1 - p), p the share of episodes solved, are kept.
Between two such searches half of each batch is drawn from them, the other half is new random mazes; an LSTM agent learns from both
by PPO. What counts is how many hand-made mazes it has never seen it then solves.

Run:     python algos/sfl.py              (4 seeds; --preset paper for the paper's own numbers)

Expect:  see results/ued/README.md

Differs from the authors' SFL on this maze (its own value in brackets; the `cpu` preset also changes the numbers in CPU below):
 1. The agent's heads are minimax's (tanh, initial gain sqrt(2); theirs relu, gain 2), so that only the curriculum differs.
 2. A level of which no episode ends during the search has learnability 0 (undefined, and sorted to the top).
 3. All finished episodes of the search count (at most ten a level).
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
from envs.maze import EnvParams, Level, Maze
from envs.maze_eval import held_out_results, level_results, picture_of


@dataclass(frozen=True)
class Config(RunConfig):
    """SFL's settings; the defaults are the authors' for this maze."""

    num_updates: int = 4_500
    """PPO updates per seed."""
    num_envs: int = 256
    """Levels played side by side."""
    num_steps: int = 256
    """Steps on each level between two updates; an episode that ends begins again on the same level."""
    learnable_share: float = 0.5
    """Share of the levels of a batch that are drawn, uniformly, from those kept; the others are new."""
    num_walls: int = 60
    """Wall cells drawn for a new level (with replacement)."""

    buffer_size: int = 1000
    """Levels kept at a search."""
    search_every: int = 100
    """Updates between two searches."""
    search_batches: int = 5
    """Batches of new levels that a search plays, one after another."""
    search_levels: int = 5000
    """Levels in each of these batches."""
    search_steps: int = 2000
    """Steps on each level in a search, over and over."""

    lr: float = 2.5e-4
    """Learning rate of Adam at the start; it falls linearly to 0."""
    gamma: float = 0.99
    """Discount factor."""
    gae_lambda: float = 0.95
    """Lambda of generalised advantage estimation."""
    num_epochs: int = 4
    """PPO passes over each rollout."""
    num_minibatches: int = 4
    """Groups of environments that each pass is split into."""
    clip_eps: float = 0.04
    """PPO's clipping range, of the ratio and of the value."""
    ent_coef: float = 0.0
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
        counts = "num_envs num_steps num_epochs num_minibatches hidden eval_episodes"
        for name in f"{counts} buffer_size search_every search_batches search_levels search_steps".split():
            require(getattr(self, name) >= 1, f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        require_multiple(self, "num_envs", "num_minibatches")
        require_range(self, 0, 1, "gamma", "gae_lambda", "learnable_share")
        require_range(self, 0, 167, "num_walls")
        require_range(self, 0, 1000, "clip_eps", "ent_coef", "vf_coef", "max_grad_norm")
        require(self.lr > 0, f"--lr {self.lr}: must be positive")
        found = self.search_batches * self.search_levels
        require(self.buffer_size <= found, f"--buffer-size {self.buffer_size}: a search plays only {found} levels")

    @property
    def split_size(self) -> int:
        return self.num_envs


PAPER = Config(log_every=50, eval_every=500, save_every=500, preset="paper")
CPU = replace(
    PAPER, preset="cpu", num_seeds=4, num_updates=320, log_every=10, eval_every=40, save_every=40,
    num_envs=32, hidden=64, lr=1e-3, gamma=0.995, clip_eps=0.2, ent_coef=1e-2, num_epochs=5,
    buffer_size=128, search_every=40, search_batches=1, search_levels=512, search_steps=1000,
)  # fmt: skip


class State(NamedTuple):
    """All of one seed's run."""

    params: Any
    opt_state: Any
    levels: Level  # those kept at the last search (buffer_size, ...), the most learnable first
    success: jax.Array  # (buffer_size,) the share of episodes that the agent then solved
    env_steps: jax.Array  # () int32
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


def play(key, params, levels: Level, num_steps: int, hidden: int):
    """Plays every level (N, ...) for num_steps steps, over and over -> traj (T, N, ...), last_value (N,), the first hstate."""
    env = Maze()
    bank, hstate = shard_batch((jax.tree.map(lambda x: x[:, None], levels), init_hstate(levels.agent_dir.shape[0], hidden)))

    def reset():
        return jax.vmap(partial(reset_from_bank, env, params=EnvParams()))(bank)

    def step(key, state, action):
        return jax.vmap(partial(step_from_bank, env, key, params=EnvParams()))(state, action, bank)

    traj, last_value, _ = rollout(key, agent, params, reset, step, hstate, num_steps)
    return traj, last_value, hstate


def success_rate(reward, done) -> jax.Array:
    """The share of finished episodes that were solved (N,); 0 where none finished. reward, done (T, N)."""
    return (done & (reward > 0)).sum(0).astype(jnp.float32) / jnp.maximum(done.sum(0), 1)


def learnability(success) -> jax.Array:
    """p (1 - p): the variance of the outcome (2408.15099, Sec. 4)."""
    return success * (1 - success)


def make_train(config: Config) -> Train:
    """SFL as pure functions of one seed."""
    env = Maze(num_walls=config.num_walls)
    num_learnable = round(config.learnable_share * config.num_envs)
    fall = optax.linear_schedule(config.lr, 0.0, config.num_updates * config.num_epochs * config.num_minibatches)
    tx = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optax.adam(fall, eps=1e-5))

    def sample_levels(key, num):
        return jax.vmap(env.sample_level)(jax.random.split(key, num))

    def init(key):
        key, key_params, key_levels = jax.random.split(key, 3)
        params = init_agent(key_params, env.num_actions, config.hidden)
        levels = sample_levels(key_levels, config.buffer_size)
        return State(params, tx.init(params), levels, jnp.zeros(config.buffer_size, jnp.float32), jnp.int32(0), key)

    def search(key, params):
        """Plays many new levels and keeps the most learnable -> levels, their success rates (2408.15099, Algorithm 2)."""

        def try_batch(_, key):
            key_levels, key_play = jax.random.split(key)
            levels = sample_levels(key_levels, config.search_levels)
            traj, *_ = play(key_play, params, levels, config.search_steps, config.hidden)  # XLA drops what is not used of it
            return None, (levels, success_rate(traj.reward, traj.done))

        _, tried = jax.lax.scan(try_batch, None, jax.random.split(key, config.search_batches))
        levels, success = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tried)
        best = jnp.argsort(-learnability(success))[: config.buffer_size]  # XLA would gather all seeds for a top_k
        return jax.tree.map(lambda x: x[best], (levels, success))

    def update(state: State, t):
        """One update (2408.15099, Algorithm 1): now and then a search; then a rollout on kept and on new levels, and PPO."""
        key, key_search, key_new, key_kept, key_play, key_learn = jax.random.split(state.key, 6)
        searches = t % config.search_every == 0
        levels, success = jax.lax.cond(searches, lambda: search(key_search, state.params), lambda: (state.levels, state.success))
        kept = jax.random.randint(key_kept, (num_learnable,), 0, config.buffer_size, jnp.int32)
        new = sample_levels(key_new, config.num_envs - num_learnable)
        batch_levels = jax.tree.map(lambda x, y: jnp.concatenate([x[kept], y]), levels, new)

        traj, last_value, hstate = play(key_play, state.params, batch_levels, config.num_steps, config.hidden)
        batch = Batch(traj, *gae(traj.reward, traj.value, traj.done, last_value, config.gamma, config.gae_lambda), hstate)
        params, opt_state, info = ppo_update(key_learn, agent, tx, state.params, state.opt_state, batch, config)
        searched = config.search_batches * config.search_levels * config.search_steps
        env_steps = state.env_steps + config.num_envs * config.num_steps + jnp.where(searches, searched, 0)
        state = State(params, opt_state, levels, success, env_steps, key)
        episodes = jnp.maximum(traj.done.sum(), 1)
        return state, info | {
            "return": traj.reward.sum() / episodes,
            "solve_rate": (traj.reward > 0).sum().astype(jnp.float32) / episodes,
            "learnability": learnability(success).mean(),
            "env_steps": env_steps,
            "ppo_updates": t + 1,
        }

    return Train(init, update, partial(evaluate, config), config.num_updates)


# --- evaluation


def evaluate(config: Config, state: State) -> dict:
    """Solve rates and a film on the held-out mazes; how hard the kept mazes are, and pictures of the most learnable."""
    hstate = partial(init_hstate, hidden=config.hidden)
    results = held_out_results(jax.random.fold_in(state.key, 0), agent, state.params, hstate, config.eval_episodes)
    few = jax.tree.map(lambda x: x[:10], state.levels)
    return results | level_results(state.levels) | {"mazes": picture_of(few)}


if __name__ == "__main__":
    run(cli(Config, __doc__, {"cpu": CPU, "paper": PAPER}), make_train, highlights=("return", "heldout_solve_rate"))
