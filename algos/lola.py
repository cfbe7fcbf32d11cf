"""LOLA-DiCE: learning with opponent-learning awareness (Foerster et al., 1709.04326), by DiCE (1802.05098), in matrix games.

A LOLA player imagines the next learning steps of the others, and differentiates its own return through them. So in the
prisoner's dilemma two LOLA players find tit for tat, where naive learners defect. Policies are tables of memory one. For N players
every LOLA player imagines all the others learning naively and at once.

Run:     python algos/lola.py                              (the prisoner's dilemma, both players LOLA, 8 seeds)
         python algos/lola.py --num-lola 1                 (LOLA against a naive learner; 0: naive learners alone)
         python algos/lola.py --env public_goods --num-players 3

Paper:   --preset paper (the numbers of github.com/alexis-jacq/LOLA_DiCE, as the paper's own could not be read)

Expect:  mean reward a step of both players, 8 seeds: -1.27 ± 0.07, of naive ones -1.87 ± 0.12. See results/shaper/

Differs from 1802.05098 and that code (their own value in brackets):
 1. A player's own step is Adam's, as in that code (1802.05098: plain gradient ascent).
 2. Policies begin at normal random logits (0). The baseline of a state is fitted to the returns from there (to the reward).
 3. `cpu` plays 256 games of 100 steps for a gradient, with a step of 0.1 for 300 updates (128 of 150, 0.2, 200).
 4. Among N players each LOLA player imagines all others learning at once (two players).
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from common.runs import RunConfig, Train, cli, require, require_range, run, shard_batch
from envs.matrix_games import TWO_PLAYER, MatrixGame, n_player, two_player


@dataclass(frozen=True)
class Config(RunConfig):
    """LOLA's settings; the defaults are for two cores."""

    may_grow = ("num_updates",)
    env: Literal["ipd", "imp", "chicken", "stag_hunt", "public_goods", "snowdrift", "n_stag_hunt", "tragedy"] = "ipd"
    """The game: one of two players, or (the last four) of --num-players."""
    num_players: int = 2
    """Players; more than two in the last four games only."""
    num_lola: int = 2
    """How many of them, the first ones, are LOLA; the others learn naively."""
    num_lookaheads: int = 1
    """Learning steps of the others that a LOLA player imagines."""
    num_envs: int = 256
    """Games played for every estimate of a gradient."""
    num_steps: int = 100
    """Steps of a game."""
    lr: float = 0.1
    """Learning rate of a player's own step (Adam)."""
    lr_naive: float = 0.1
    """Learning rate of a naive learner's own step (Adam)."""
    lr_imagined: float = 0.3
    """Learning rate of the others' imagined steps (gradient ascent)."""
    lr_value: float = 0.1
    """Learning rate of the baseline's table."""
    gamma: float = 0.96
    """Discount factor."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_envs", "num_steps"):
            require(getattr(self, name) >= 1, f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        most = 2 if self.env in TWO_PLAYER else 10
        require(2 <= self.num_players <= most, f"--num-players {self.num_players}: --env {self.env} needs 2 to {most}")
        require_range(self, 0, self.num_players, "num_lola")
        require_range(self, 0, 10, "num_lookaheads")
        require_range(self, 0, 100, "lr", "lr_naive", "lr_imagined", "lr_value")
        require(0 <= self.gamma < 1, f"--gamma {self.gamma}: must lie in [0, 1)")

    @property
    def split_size(self) -> int:
        return self.num_envs


CPU = Config(num_seeds=8, num_updates=300, log_every=10, eval_every=100, save_every=100)
PAPER = replace(CPU, preset="paper", num_seeds=5, num_updates=200, num_envs=128, num_steps=150, lr=0.2, lr_naive=0.2)
PRESETS = {"cpu": CPU, "paper": PAPER}


class Params(NamedTuple):
    """What the players learn; S = 2^N + 1 views of the last joint action, START the last."""

    logits: jax.Array  # (N, S) of defecting
    value: jax.Array  # (N, S)


class State(NamedTuple):
    """All of one seed's run."""

    params: Params
    opt_state: Any
    key: jax.Array


class Games(NamedTuple):
    """T steps of E games."""

    view: jax.Array  # (T, E, N) int32, before the action
    action: jax.Array  # (T, E, N) int32
    reward: jax.Array  # (T, E, N)


def make_game(config: Config) -> MatrixGame:
    """The game that the settings name."""
    if config.env in TWO_PLAYER:
        return MatrixGame(two_player(config.env), config.num_steps)
    name = config.env.removeprefix("n_")
    return MatrixGame(n_player(name, config.num_players), config.num_steps)


def play(key, logits, config: Config) -> Games:
    """Games of the policies `logits` (N, S) against each other, from START."""
    game, num = make_game(config), config.num_players
    params = game.default_params
    noise = shard_batch(jax.random.logistic(key, (config.num_steps, config.num_envs, num), jnp.float32), 1)
    _, first = jax.vmap(lambda _: game.reset_env(None, params))(jnp.arange(config.num_envs))

    def step(state, noise):
        action = (read(logits, state.view) + noise > 0).astype(jnp.int32)
        _, after, reward, _, _ = jax.vmap(lambda s, a: game.step_env(None, s, a, params))(state, action)
        return after, Games(state.view, action, reward)

    return jax.lax.scan(step, first, noise)[1]


def read(table, view) -> jax.Array:
    """table (N, S) at the players' views (..., N) -> (..., N)."""
    return (jax.nn.one_hot(view, table.shape[1], dtype=jnp.float32) * table).sum(-1)


# --- DiCE


def magic_box(x) -> jax.Array:
    """1, with the derivative of x (1802.05098, Eq. 4)."""
    return jnp.exp(x - jax.lax.stop_gradient(x))


def returns(logits, value, games: Games, gamma: float) -> jax.Array:
    """Every player's discounted return, as an estimate that may be differentiated any number of times -> (N,).

    1802.05098, Eq. 5 and 9: a reward depends on all actions up to it, of all players; the baseline takes out what is expected.
    """
    discount = (gamma ** np.arange(len(games.reward)))[:, None, None].astype(np.float32)
    log_prob = jax.nn.log_sigmoid(read(logits, games.view) * (2 * games.action - 1)).sum(-1, keepdims=True)  # (T, E, 1)
    rewarded = magic_box(jnp.cumsum(log_prob, axis=0)) * discount * games.reward
    expected = (1 - magic_box(log_prob)) * discount * jax.lax.stop_gradient(read(value, games.view))
    return (rewarded + expected).sum(0).mean(0)


def imagine(key, logits, value, me: int, config: Config) -> jax.Array:
    """The policies after the others' next steps, as a function of mine (1709.04326, Eq. 8; 1802.05098, Alg. 1) -> (N, S)."""
    others = np.float32(np.arange(config.num_players) != me)[:, None]

    def learn(logits, key):
        games = play(key, jax.lax.stop_gradient(logits), config)
        grads = jax.jacrev(lambda x: returns(x, value, games, config.gamma))(logits)  # (N, N, S)
        return logits + config.lr_imagined * others * own(grads), None

    return jax.lax.scan(learn, logits, jax.random.split(key, config.num_lookaheads))[0]


def own(grads) -> jax.Array:
    """Of d return_i / d logits_j, (N, N, S), each player's own: (N, S)."""
    return jnp.stack([grads[i, i] for i in range(len(grads))])


def lola_gradient(key, logits, value, me: int, config: Config) -> jax.Array:
    """d (my return against the others once they have learned) / d (my logits) -> (S,)."""
    key_imagine, key_play = jax.random.split(key)

    def objective(mine):
        after = imagine(key_imagine, logits.at[me].set(mine), value, me, config)
        games = play(key_play, jax.lax.stop_gradient(after), config)
        return returns(after, value, games, config.gamma)[me]

    return jax.grad(objective)(logits[me])


def value_error(value, games: Games, gamma: float) -> jax.Array:
    """The baseline's squared error, as a share of the largest return possible for rewards of 1."""
    step = lambda after, reward: (reward + gamma * after,) * 2
    _, target = jax.lax.scan(step, jnp.zeros_like(games.reward[0]), games.reward, reverse=True)
    return ((1 - gamma) ** 2 * (read(value, games.view) - target) ** 2).sum(-1).mean()


# --- training


def make_train(config: Config) -> Train:
    """Players that learn beside each other, as pure functions of one seed."""
    states = 2**config.num_players + 1
    rates = np.float32([config.lr if i < config.num_lola else config.lr_naive for i in range(config.num_players)])[:, None]
    tx = optax.adam(1.0)
    tx_value = optax.adam(1.0 / (1 - config.gamma))

    def init(key):
        key, key_logits = jax.random.split(key)
        logits = jax.random.normal(key_logits, (config.num_players, states), jnp.float32)
        params = Params(logits, jnp.zeros_like(logits))
        return State(params, (tx.init(params.logits), tx_value.init(params.value)), key)

    def update(state: State, t):
        key, key_play, *keys = jax.random.split(state.key, 2 + config.num_players)
        logits, value = state.params
        games = play(key_play, logits, config)
        naive = own(jax.jacrev(lambda x: returns(x, value, games, config.gamma))(logits))
        ours = [lola_gradient(keys[i], logits, value, i, config) for i in range(config.num_lola)]
        grads = jnp.stack([*ours, *naive[config.num_lola :]])
        steps, opt_logits = tx.update(-grads, state.opt_state[0])
        errors = jax.grad(value_error)(value, games, config.gamma)
        value_steps, opt_value = tx_value.update(errors, state.opt_state[1])
        params = Params(logits + rates * steps, value + config.lr_value * value_steps)
        rewards = games.reward.mean((0, 1))
        metrics = {f"reward_{i + 1}": rewards[i] for i in range(config.num_players)}
        return State(params, (opt_logits, opt_value), key), metrics | {"welfare": rewards.mean()}

    return Train(init, update, partial(evaluate, config), config.num_updates)


def evaluate(config: Config, state: State) -> dict:
    """Fresh games of the learned policies: mean rewards per step, and how often each cooperates after what."""
    games = play(jax.random.fold_in(state.key, 0), state.params.logits, config)
    rewards = games.reward.mean((0, 1))
    results = {f"eval_reward_{i + 1}": x for i, x in enumerate(rewards)} | {"eval_welfare": rewards.mean()}
    results["eval_cooperation"] = (games.action == 0).mean()
    cooperates = jax.nn.sigmoid(-state.params.logits)
    if config.num_players == 2:
        for i, player in enumerate(cooperates):
            results |= {f"cooperates_{i + 1}/{s}": player[k] for k, s in enumerate(("CC", "CD", "DC", "DD", "START"))}
    return results | {"cooperates": cooperates}


if __name__ == "__main__":
    run(cli(Config, __doc__, PRESETS), make_train, highlights=("welfare", "eval_welfare"))
