"""PAIRED, a designer of mazes that learns to exploit regret (Dennis et al., 2012.02096), as minimax has it (2311.12716).

A teacher builds each maze cell by cell. Two students play it: the protagonist, and the antagonist, the teacher's ally. The teacher
is paid the regret: by how much the antagonist's best episode beats the protagonist's average one; so it looks for mazes that can
be solved but are not solved yet. All three learn by PPO. With more than two students the regret is that of the population; with one
and --score neg_return it is the minimax adversary. What counts is how many hand-made mazes the protagonist then solves.

Run:     python algos/paired.py           (4 seeds; --num-students 4 --score population_regret for a population)

Paper:   --preset paper

Expect:  see results/ued/README.md

Differs from minimax's PAIRED (its own value in brackets; the `cpu` preset also changes the numbers in CPU below):
 1. Every rollout begins with a zero LSTM state (that of the previous rollout's end, on another maze).
 2. Orthogonal initialisation of every layer; the last policy layer with gain 0.01 (filled with 0.01).
 3. The teacher's first action never is a number of walls, and it never chooses the agent's direction (options, off by default).
"""

from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from common.env import reset_from_bank, step_from_bank
from common.nn import conv, dense, init_conv, init_dense, init_lstm, lstm, orthogonal
from common.ppo import Batch, gae, ppo_update, rollout
from common.runs import RunConfig, Train, cli, require, require_multiple, require_range, run, shard_batch
from envs.maze import EnvParams, Level, Maze
from envs.maze_editor import MazeEditor
from envs.maze_eval import held_out_results, level_results, picture_of


@dataclass(frozen=True)
class Config(RunConfig):
    """PAIRED's settings; the defaults are minimax's."""

    may_grow = ("num_updates",)
    num_updates: int = 30_000
    """Updates per seed: each builds a batch of levels, has every student play and learn from it, and then the teacher."""
    num_envs: int = 32
    """Levels built and played side by side."""
    num_steps: int = 256
    """Steps of every student on each level between two updates; an episode that ends begins again on the same level."""
    num_students: int = 2
    """Students: the protagonist, the antagonist, and with population_regret any number."""
    score: Literal["relative_regret", "mean_relative_regret", "population_regret", "neg_return"] = "relative_regret"
    """What the teacher is paid for a level."""
    num_walls: int = 60
    """Steps in which the teacher puts a wall (on a wall it changes nothing)."""
    noise_dim: int = 50
    """Random numbers that the teacher sees at every step."""

    lr: float = 1e-4
    """Learning rate of Adam, the students'."""
    gamma: float = 0.995
    """Discount factor of the students."""
    gae_lambda: float = 0.98
    """Lambda of generalised advantage estimation of the students."""
    num_epochs: int = 5
    """PPO passes over each rollout, the teacher's too."""
    num_minibatches: int = 1
    """Groups of environments that each pass is split into."""
    clip_eps: float = 0.2
    """PPO's clipping range, of the ratio and of the value."""
    ent_coef: float = 1e-3
    """Weight of the students' entropy bonus."""
    vf_coef: float = 0.5
    """Weight of the value loss."""
    max_grad_norm: float = 0.5
    """Largest global norm of a gradient."""

    teacher_lr: float = 1e-4
    """Learning rate of Adam, the teacher's."""
    teacher_gamma: float = 0.995
    """Discount factor of the teacher."""
    teacher_gae_lambda: float = 0.98
    """Lambda of generalised advantage estimation of the teacher."""
    teacher_ent_coef: float = 0.05
    """Weight of the teacher's entropy bonus."""

    hidden: int = 256
    """Width of the students' LSTM."""
    teacher_hidden: int = 256
    """Width of the teacher's LSTM."""
    teacher_filters: int = 128
    """Channels of the teacher's convolution."""
    eval_episodes: int = 10
    """Episodes on each held-out maze at an evaluation."""

    def __post_init__(self):
        super().__post_init__()
        counts = "num_envs num_steps num_students num_epochs num_minibatches hidden teacher_hidden teacher_filters eval_episodes"
        for name in counts.split():
            require(getattr(self, name) >= 1, f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        require_multiple(self, "num_envs", "num_minibatches")
        require_range(self, 0, 1, "gamma", "gae_lambda", "teacher_gamma", "teacher_gae_lambda")
        require_range(self, 0, 167, "num_walls")
        require_range(self, 0, 1000, "clip_eps", "ent_coef", "teacher_ent_coef", "vf_coef", "max_grad_norm", "noise_dim")
        for name in ("lr", "teacher_lr"):
            require(getattr(self, name) > 0, f"--{name.replace('_', '-')} {getattr(self, name)}: must be positive")
        if self.score in ("relative_regret", "mean_relative_regret"):
            require(self.num_students == 2, f"--num-students {self.num_students}: --score {self.score} needs 2")
        if self.score == "population_regret":
            require(self.num_students >= 2, f"--num-students {self.num_students}: --score population_regret needs at least 2")

    @property
    def split_size(self) -> int:
        return self.num_envs


PAPER = Config(log_every=50, eval_every=1000, save_every=1000, preset="paper")
CPU = replace(
    PAPER, preset="cpu", num_seeds=4, num_updates=200, log_every=10, eval_every=40, save_every=40,
    hidden=64, lr=1e-3, gae_lambda=0.95, ent_coef=1e-2, num_minibatches=4,
    teacher_hidden=64, teacher_filters=8, teacher_lr=1e-3,
)  # fmt: skip


class State(NamedTuple):
    """All of one seed's run."""

    params: Any  # of the students, leading axis num_students; the protagonist is the first
    opt_state: Any
    teacher_params: Any
    teacher_opt_state: Any
    levels: Level  # the last ones built (num_envs, ...)
    key: jax.Array


# --- networks


def init_agent(key, num_actions: int, hidden: int) -> dict:
    """A student: a convolution, an embedding of the direction, an LSTM, a policy head and a value head."""
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
    return memory_and_heads(params, x, reset, hstate)


def init_teacher(key, editor: MazeEditor, filters: int, hidden: int) -> dict:
    """The teacher: a convolution over the whole map, an embedding of the step, noise, an LSTM, a policy head and a value head."""
    keys = jax.random.split(key, 6)
    n_in = editor.height * editor.width * filters + 10 + editor.noise_dim
    return {
        "conv": init_conv(keys[0], 3, 3, filters),
        "time": orthogonal(keys[1], (editor.num_steps + 1, 10)),
        "lstm": init_lstm(keys[2], n_in, hidden),
        "heads": init_dense(keys[3], hidden, 32 + 32),
        "policy": init_dense(keys[4], 32, editor.num_actions, 0.01),
        "value": init_dense(keys[5], 32, 1, 1.0),
    }


def teacher(params, obs, reset, hstate):
    """obs (T, N, ...), reset (T, N), hstate 2 x (N, teacher_hidden) -> logits (T, N, cells), value (T, N), hstate."""
    view = jax.nn.relu(conv(params["conv"], obs.image / 10.0, 3))
    x = jnp.concatenate([view.reshape(*view.shape[:2], -1), params["time"][obs.time], obs.noise], axis=-1)
    return memory_and_heads(params, x, reset, hstate)


def memory_and_heads(params, x, reset, hstate):
    """x (T, N, n_in) -> logits, value, hstate."""
    x, hstate = lstm(params["lstm"], x, reset, hstate)
    policy, value = jnp.split(jnp.tanh(dense(params["heads"], x)), 2, axis=-1)
    return dense(params["policy"], policy), dense(params["value"], value)[..., 0], hstate


def init_hstate(num_envs: int, hidden: int):
    """An LSTM's state before an episode."""
    return jnp.zeros((num_envs, hidden), jnp.float32), jnp.zeros((num_envs, hidden), jnp.float32)


# --- regret


def episode_returns(reward, done) -> tuple[jax.Array, jax.Array]:
    """The mean and the highest return of the finished episodes, each (N,); 0 where none finished. reward, done (T, N)."""

    def step(carry, inputs):
        total, summed, best, episodes = carry
        reward, done = inputs
        total = total + reward
        summed, best = summed + jnp.where(done, total, 0.0), jnp.where(done, jnp.maximum(best, total), best)
        return (jnp.where(done, 0.0, total), summed, best, episodes + done), None

    zeros = jnp.zeros(reward.shape[1], jnp.float32)
    (_, summed, best, episodes), _ = jax.lax.scan(step, (zeros, zeros, jnp.full_like(zeros, -jnp.inf), zeros), (reward, done))
    return summed / jnp.maximum(episodes, 1), jnp.where(episodes > 0, best, 0.0)


def level_score(mean, best, score: str) -> jax.Array:
    """What the teacher is paid for each level (N,), of the students' mean and best returns (S, N).

    relative_regret       max(0, U_best(antagonist) - U_mean(protagonist)): PAIRED's estimate (2012.02096, Sec. 4)
    mean_relative_regret  max(0, U_mean(antagonist) - U_mean(protagonist))
    population_regret     the best of all students - the mean over students
    neg_return            - the mean over students: the minimax adversary
    """
    if score == "relative_regret":
        return jnp.maximum(best[1] - mean[0], 0)
    if score == "mean_relative_regret":
        return jnp.maximum(mean[1] - mean[0], 0)
    if score == "population_regret":
        return best.max(0) - mean.mean(0)
    return -mean.mean(0)


# --- training


def build(key, params, editor: MazeEditor, config: Config):
    """The teacher builds num_envs levels -> traj (num_walls + 2, N, ...), levels, hstate. The traj's rewards are still 0."""
    key_reset, key_play = jax.random.split(key)
    hstate = shard_batch(init_hstate(config.num_envs, config.teacher_hidden))
    step_editor = jax.vmap(editor.step_env)

    def reset():
        return shard_batch(jax.vmap(editor.reset_env)(jax.random.split(key_reset, config.num_envs)))

    def step(key, state, action):
        obs, state, reward, done, _ = step_editor(jax.random.split(key, config.num_envs), state, action)
        return obs, state, reward, done

    traj, _, state = rollout(key_play, teacher, params, reset, step, hstate, editor.num_steps)
    return traj, jax.vmap(editor.level_of)(state), hstate


def play(key, params, levels, config: Config) -> Batch:
    """One student plays every level (N, ...) for num_steps steps, over and over."""
    env = Maze()
    bank, hstate = shard_batch((jax.tree.map(lambda x: x[:, None], levels), init_hstate(config.num_envs, config.hidden)))

    def reset():
        return jax.vmap(partial(reset_from_bank, env, params=EnvParams()))(bank)

    def step(key, state, action):
        return jax.vmap(partial(step_from_bank, env, key, params=EnvParams()))(state, action, bank)

    traj, last_value, _ = rollout(key, agent, params, reset, step, hstate, config.num_steps)
    return Batch(traj, *gae(traj.reward, traj.value, traj.done, last_value, config.gamma, config.gae_lambda), hstate)


def make_train(config: Config) -> Train:
    """PAIRED as pure functions of one seed."""
    editor, num_students = MazeEditor(num_walls=config.num_walls, noise_dim=config.noise_dim), config.num_students
    tx, teacher_tx = (
        optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optax.adam(lr, eps=1e-5))
        for lr in (config.lr, config.teacher_lr)
    )
    names = ("num_epochs", "num_minibatches", "clip_eps", "vf_coef")
    teacher_ppo = SimpleNamespace(**{name: getattr(config, name) for name in names}, ent_coef=config.teacher_ent_coef)

    def init(key):
        key, key_students, key_teacher, key_levels = jax.random.split(key, 4)
        keys = jax.random.split(key_students, num_students)
        params = jax.vmap(partial(init_agent, num_actions=Maze().num_actions, hidden=config.hidden))(keys)
        teacher_params = init_teacher(key_teacher, editor, config.teacher_filters, config.teacher_hidden)
        _, levels, _ = build(key_levels, teacher_params, editor, config)
        return State(params, jax.vmap(tx.init)(params), teacher_params, teacher_tx.init(teacher_params), levels, key)

    def update(state: State, t):
        """One update (2012.02096, Algorithm 1): levels are built, every student plays and learns, then the teacher learns."""
        key, key_build, key_play, key_learn, key_teacher = jax.random.split(state.key, 5)
        built, levels, teacher_hstate = build(key_build, state.teacher_params, editor, config)

        keys = jax.random.split(key_play, num_students)
        batch = jax.vmap(partial(play, levels=levels, config=config))(keys, state.params)  # (S, ...)
        learn = lambda key, *args: ppo_update(key, agent, tx, *args, config)
        params, opt_state, info = jax.vmap(learn)(jax.random.split(key_learn, num_students), state.params, state.opt_state, batch)

        mean, best = jax.vmap(episode_returns)(batch.traj.reward, batch.traj.done)
        score = level_score(mean, best, config.score)
        built = built._replace(reward=built.reward.at[-1].set(score))  # the last step of each level is `done`
        adv, target = gae(
            built.reward, built.value, built.done, jnp.zeros_like(score), config.teacher_gamma, config.teacher_gae_lambda
        )
        lesson = Batch(built, adv, target, teacher_hstate)
        teacher_params, teacher_opt_state, teacher_info = ppo_update(
            key_teacher, teacher, teacher_tx, state.teacher_params, state.teacher_opt_state, lesson, teacher_ppo
        )
        state = State(params, opt_state, teacher_params, teacher_opt_state, levels, key)
        return state, describe(batch.traj, mean, best, score, levels, info, teacher_info) | {
            "env_steps": (t + 1) * num_students * config.num_envs * config.num_steps,
            "ppo_updates": t + 1,
        }

    return Train(init, update, partial(evaluate, config), config.num_updates)


def describe(traj, mean, best, score, levels, info, teacher_info) -> dict:
    """Metrics of an update: the protagonist's where nothing else is said."""
    reward, done = traj.reward[0], traj.done[0]
    episodes = jnp.maximum(done.sum(), 1)
    return {
        "return": reward.sum() / episodes,
        "solve_rate": (reward > 0).sum().astype(jnp.float32) / episodes,
        "mean_return": mean[0].mean(),
        "others_best_return": best[1:].max(0).mean() if len(best) > 1 else best[0].mean(),
        "teacher_score": score.mean(),
        "walls": levels.walls.sum((1, 2)).mean(dtype=jnp.float32),
        **{name: x[0] for name, x in info.items()},
        **{f"teacher_{name}": x for name, x in teacher_info.items()},
    }


# --- evaluation


def evaluate(config: Config, state: State) -> dict:
    """The protagonist's solve rates and film on the held-out mazes; the teacher's last mazes, how hard they are and pictures."""
    params, hstate = jax.tree.map(lambda x: x[0], state.params), partial(init_hstate, hidden=config.hidden)
    results = held_out_results(jax.random.fold_in(state.key, 0), agent, params, hstate, config.eval_episodes)
    few = jax.tree.map(lambda x: x[:10], state.levels)
    return results | level_results(state.levels) | {"mazes": picture_of(few)}


if __name__ == "__main__":
    run(cli(Config, __doc__, {"cpu": CPU, "paper": PAPER}), make_train, highlights=("return", "heldout_solve_rate"))
