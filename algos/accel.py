"""ACCEL: a curriculum of mazes that evolves by small edits (Parker-Holder et al., 2203.01302), as minimax has it (2311.12716).

A buffer keeps the mazes on which the agent has most to learn. Mazes drawn from it are played again and learned from (PPO, an LSTM
agent); then each is edited a little, and a child that scores high joins the buffer. Starting from empty rooms, hard mazes evolve at
the edge of what the agent can do. What counts is how many hand-made mazes it has never seen it then solves.

Run:     python algos/accel.py            (4 seeds; --parallel for the parallel form)

Paper:   --preset paper; its parallel form also sets --parallel --lr 1e-4 --ent-coef 1e-3

Expect:  see results/ued/README.md

Differs from minimax's ACCEL (its own value in brackets; the `cpu` preset also changes the numbers in CPU below):
 1. Whether an update replays is drawn from the update's index, the same for all seeds (drawn per run), so that seeds trained in one
    program take the same branch and none pays for both.
 2. `num_updates` counts cycles (PPO updates); the metric ppo_updates counts those.
 3. A level's best return is kept for good (overwritten by the latest rollout's, which makes MaxMC forget).
 4. Levels are equal when all of a level is, the agent's direction too (all but the direction).
 5. Orthogonal initialisation of every layer; the last policy layer with gain 0.01 (filled with 0.01).
 6. A level that is taken in or scored again has age 0 (a new level takes over the age of the one it replaces).
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from common.env import reset_from_bank, select, step_from_bank
from common.level_buffer import (
    LevelBuffer,
    Trial,
    age_buffer,
    init_buffer,
    max_episode_return,
    max_mc,
    positive_value_loss,
    replay_weights,
    sample_replay,
    update_buffer,
)
from common.nn import conv, dense, init_conv, init_dense, init_lstm, lstm, orthogonal
from common.ppo import Batch, gae, ppo_update, rollout
from common.runs import RunConfig, Train, cli, nothing_like, require, require_multiple, require_range, run, shard_batch
from envs.maze import EnvParams, Maze
from envs.maze_eval import held_out_results, level_results, picture_of


@dataclass(frozen=True)
class Config(RunConfig):
    """ACCEL's settings; the defaults are minimax's."""

    may_grow = ("num_updates",)
    num_updates: int = 37_500
    """Cycles per seed: each plays a batch of levels and, when it replays, learns from it and plays the edited levels too."""
    num_envs: int = 32
    """Levels played side by side in each batch."""
    num_steps: int = 256
    """Steps on each level between two updates; an episode that ends begins again on the same level."""
    parallel: bool = False
    """New, replayed and edited levels in one wide batch, learning from the replayed ones (minimax's parallel ACCEL)."""

    buffer_size: int = 4000
    """Levels kept."""
    min_fill: float = 0.5
    """Share of the buffer that must be filled before levels are replayed."""
    replay_prob: float = 0.8
    """Probability that a cycle replays levels rather than tries new ones (1 when --parallel)."""
    staleness_coef: float = 0.5
    """Weight of a level's age against its score in the replay distribution (rho)."""
    temperature: float = 0.3
    """Temperature of the score's part of the replay distribution (beta); small prefers the best ranks."""
    score: Literal["max_mc", "positive_value_loss"] = "max_mc"
    """What makes a level worth keeping."""
    num_edits: int = 20
    """Edits that turn a replayed level into its child."""
    num_walls: int = 0
    """Wall cells drawn for a new level (with replacement): empty rooms, from which edits build."""

    lr: float = 3e-4
    """Learning rate of Adam."""
    gamma: float = 0.999
    """Discount factor."""
    gae_lambda: float = 0.98
    """Lambda of generalised advantage estimation."""
    num_epochs: int = 5
    """PPO passes over each rollout."""
    num_minibatches: int = 1
    """Groups of environments that each pass is split into."""
    clip_eps: float = 0.2
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
        for name in ("num_envs", "num_steps", "num_epochs", "num_minibatches", "hidden", "eval_episodes", "num_edits"):
            require(getattr(self, name) >= 1, f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        require_multiple(self, "num_envs", "num_minibatches")
        require_range(self, 0, 1, "gamma", "gae_lambda", "replay_prob", "staleness_coef", "min_fill")
        require_range(self, 0, 167, "num_walls")
        require_range(self, 0, 1000, "clip_eps", "ent_coef", "vf_coef", "max_grad_norm")
        require(self.lr > 0, f"--lr {self.lr}: must be positive")
        require(self.temperature > 0, f"--temperature {self.temperature}: must be positive")
        least = self.num_envs * (3 if self.parallel else 1)
        require(self.buffer_size >= least, f"--buffer-size {self.buffer_size}: must be at least a batch, {least}")

    @property
    def split_size(self) -> int:
        return self.num_envs


PAPER = Config(log_every=50, eval_every=1000, save_every=1000, preset="paper")
CPU = replace(
    PAPER, preset="cpu", num_seeds=4, num_updates=320, log_every=10, eval_every=40, save_every=40,
    hidden=64, lr=1e-3, gamma=0.995, gae_lambda=0.95, ent_coef=1e-2, num_minibatches=4,
    buffer_size=1000, min_fill=0.25, temperature=1.0, num_edits=50,
)  # fmt: skip


class State(NamedTuple):
    """All of one seed's run."""

    params: Any
    opt_state: Any
    buffer: LevelBuffer
    env_steps: jax.Array  # () int32
    ppo_updates: jax.Array  # () int32
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


def play_levels(key, params, levels, best_return, config: Config, index=-1, edits=0) -> tuple[Batch, Trial]:
    """Plays every level (N, ...) for num_steps steps, over and over -> what PPO learns from, and what the buffer is told.

    best_return (N,) is the best that is known of each level before, -inf for none.
    """
    env, num = Maze(), levels.agent_dir.shape[0]
    bank = shard_batch(jax.tree.map(lambda x: x[:, None], levels))
    hstate = shard_batch(init_hstate(num, config.hidden))

    def reset():
        return jax.vmap(partial(reset_from_bank, env, params=EnvParams()))(bank)

    def step(key, state, action):
        return jax.vmap(partial(step_from_bank, env, key, params=EnvParams()))(state, action, bank)

    traj, last_value, _ = rollout(key, agent, params, reset, step, hstate, config.num_steps)
    adv, target = gae(traj.reward, traj.value, traj.done, last_value, config.gamma, config.gae_lambda)
    best_return = jnp.maximum(max_episode_return(traj.reward, traj.done), best_return)
    use_mc = config.score == "max_mc"
    score = max_mc(traj.value, traj.done, best_return) if use_mc else positive_value_loss(adv, traj.done)
    index, edits = (jnp.broadcast_to(x, num).astype(jnp.int32) for x in (index, edits))
    return Batch(traj, adv, target, hstate), Trial(levels, score, best_return, edits, index)


def make_train(config: Config) -> Train:
    """ACCEL as pure functions of one seed."""
    env, num = Maze(num_walls=config.num_walls), config.num_envs
    prioritise = dict(temperature=config.temperature, staleness_coef=config.staleness_coef)
    tx = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optax.adam(config.lr, eps=1e-5))

    def init(key):
        key, key_params = jax.random.split(key)
        params = init_agent(key_params, env.num_actions, config.hidden)
        buffer = init_buffer(jax.eval_shape(env.sample_level, key), config.buffer_size)
        return State(params, tx.init(params), buffer, jnp.int32(0), jnp.int32(0), key)

    def sample_levels(key, num):
        return jax.vmap(env.sample_level)(jax.random.split(key, num))

    def edit_levels(key, levels):
        return jax.vmap(partial(env.mutate_level, num_edits=config.num_edits))(jax.random.split(key, num), levels)

    def draw(key, buffer, replay):
        """Replayed levels, or new ones -> levels, their slots (-1: new), best returns, edits, the buffer with new ages."""
        key_new, key_replay = jax.random.split(key)
        index, drawn = sample_replay(key_replay, buffer, num, **prioritise)
        stored = jax.tree.map(lambda x: x[index], (buffer.levels, buffer.max_return, buffer.edits))
        fresh = (sample_levels(key_new, num), jnp.full(num, -jnp.inf, jnp.float32), jnp.zeros(num, jnp.int32))
        levels, best, edits = select(replay, stored, fresh)
        age = jnp.where(replay, drawn.age, age_buffer(buffer, num).age)
        return levels, jnp.where(replay, index, -1), best, edits, buffer._replace(age=age)

    def learn(key, state, batch, do):
        """PPO on a batch, kept where `do` is set -> params, opt_state, diagnostics (NaN where it is not)."""
        params, opt_state, info = ppo_update(key, agent, tx, state.params, state.opt_state, batch, config)
        params, opt_state = select(do, (params, opt_state), (state.params, state.opt_state))
        return params, opt_state, jax.tree.map(lambda x: jnp.where(do, x, jnp.nan), info)

    def is_warm(buffer):
        return buffer.size >= config.min_fill * config.buffer_size

    def update(state: State, t):
        """One cycle (Algorithm 1): new levels, to score them only; or replayed ones, to learn from, and then their children."""
        key, key_draw, key_play, key_learn, key_edit, key_child = jax.random.split(state.key, 6)
        turn = jax.random.uniform(jax.random.fold_in(jax.random.key(0), t), dtype=jnp.float32) < config.replay_prob
        replay = turn & is_warm(state.buffer)
        levels, index, best, edits, buffer = draw(key_draw, state.buffer, replay)
        batch, trial = play_levels(key_play, state.params, levels, best, config, index, edits)
        buffer = update_buffer(buffer, trial, **prioritise)

        def learn_and_edit():
            params, opt_state, info = learn(key_learn, state, batch, replay)
            children = edit_levels(key_edit, levels)
            _, trial = play_levels(key_child, params, children, -jnp.inf, config, edits=edits + 1)
            trial = trial._replace(score=jnp.where(replay, trial.score, -jnp.inf))
            return params, opt_state, trial, info

        def only_look():
            *_, trial, info = nothing_like(learn_and_edit)
            return state.params, state.opt_state, trial._replace(score=jnp.full(num, -jnp.inf, jnp.float32)), info

        params, opt_state, trial, info = jax.lax.cond(turn, learn_and_edit, only_look)
        buffer = update_buffer(buffer, trial, **prioritise)
        played = num * config.num_steps * (1 + turn.astype(jnp.int32))
        state = State(params, opt_state, buffer, state.env_steps + played, state.ppo_updates + replay, key)
        return state, info | describe(state, batch.traj, levels, replay)

    def update_parallel(state: State, t):
        """One cycle of the parallel form (2311.12716): new, replayed and edited levels in one batch, PPO on the replayed third."""
        key, key_draw, key_new, key_edit, key_play, key_learn = jax.random.split(state.key, 6)
        replay = is_warm(state.buffer)
        levels, index, best, edits, buffer = draw(key_draw, state.buffer, replay)
        batches = [(sample_levels(key_new, num), -1, -jnp.inf, 0), (levels, index, best, edits)]
        batches.append((edit_levels(key_edit, levels), -1, -jnp.inf, edits + 1))
        batches = [(x[0], *(jnp.broadcast_to(y, num) for y in x[1:])) for x in batches]
        wide, index, best, edits = jax.tree.map(lambda *x: jnp.concatenate(x), *batches)
        batch, trial = play_levels(key_play, state.params, wide, best, config, index, edits)
        buffer = update_buffer(buffer, trial, **prioritise)
        steps, hstate = jax.tree.map(lambda x: x[:, num : 2 * num], batch[:3]), init_hstate(num, config.hidden)
        params, opt_state, info = learn(key_learn, state, Batch(*steps, hstate), replay)
        played = 3 * num * config.num_steps
        state = State(params, opt_state, buffer, state.env_steps + played, state.ppo_updates + replay, key)
        return state, info | describe(state, steps[0], levels, replay)

    return Train(init, update_parallel if config.parallel else update, partial(evaluate, config), config.num_updates)


def describe(state: State, traj, levels, replay) -> dict:
    """Metrics of a cycle. What is float is NaN where nothing was replayed."""
    episodes = jnp.maximum(traj.done.sum(), 1)
    floats = {
        "return": traj.reward.sum() / episodes,
        "solve_rate": (traj.reward > 0).sum().astype(jnp.float32) / episodes,
        "walls": levels.walls.sum((1, 2)).mean(dtype=jnp.float32),
    }
    floats = {name: jnp.where(replay, x, jnp.nan) for name, x in floats.items()}
    return floats | {"buffer": state.buffer.size, "env_steps": state.env_steps, "ppo_updates": state.ppo_updates}


# --- evaluation


def evaluate(config: Config, state: State) -> dict:
    """Solve rates and a film on the held-out mazes, how hard the mazes are that would be replayed, pictures of the best of them."""
    key_play, key_sample, key_new = jax.random.split(jax.random.fold_in(state.key, 0), 3)
    buffer, hstate = state.buffer, partial(init_hstate, hidden=config.hidden)
    results = held_out_results(key_play, agent, state.params, hstate, config.eval_episodes)

    weights = replay_weights(buffer, config.temperature, config.staleness_coef)
    index = jax.random.categorical(key_sample, jnp.log(weights), shape=(64,))
    sample = jax.tree.map(lambda x: x[index], buffer.levels)
    replayed = level_results(sample) | {"buffer_edits": buffer.edits[index].mean()}
    replayed = {name: jnp.where(buffer.size > 0, x, jnp.nan) for name, x in replayed.items()}

    best = jax.tree.map(lambda x: x[jax.lax.top_k(-buffer.rank, 10)[1]], buffer.levels)
    new = jax.vmap(Maze(num_walls=config.num_walls).sample_level)(jax.random.split(key_new, 10))
    return results | replayed | {"mazes": picture_of(select(buffer.size > 0, best, new))}


if __name__ == "__main__":
    run(cli(Config, __doc__, {"cpu": CPU, "paper": PAPER}), make_train, highlights=("return", "heldout_solve_rate"))
