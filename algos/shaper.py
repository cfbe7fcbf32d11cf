"""Shaper: shaping a learning opponent with one recurrent policy (Khan et al., 2312.12568), and its rivals M-FOS and Good Shepherd.

A trial is many episodes of a two-player game against one naive learner, which begins it untrained and learns after every episode
(by PPO, in the same program). Evolution finds a policy that earns most over whole trials, and so shapes how its opponent learns.
Shaper's memory lives through the trial: it sees both the episode (history) and the opponent's learning (context). M-FOS keeps a
memory within episodes and passes a single vector on; Good Shepherd has neither; `reset` is Shaper with a memory of one episode.

Run:     python algos/shaper.py                            (the prisoner's dilemma, 4 seeds; --env imp, chicken or stag_hunt;
                                                            --method mfos, gs or reset for rivals)
         python algos/shaper.py --preset coin_game         (or in_the_matrix)
         python algos/shaper.py --preset mfos_rl           (M-FOS trained by PPO)

Paper:   --preset paper, paper_coin_game or paper_in_the_matrix

Expect:  the prisoner's dilemma, 8 seeds, reward a step over a trial: Shaper -0.64 ± 0.06 (its learner -2.17), M-FOS -0.96 ± 0.14
         (-1.91), Good Shepherd -1.14 ± 0.10 (-1.35), reset -1.04 ± 0.18 (-1.93), where mutual cooperation gives -1, defection -2;
         2.4 minutes for 4 seeds on two cores. See results/shaper/

Differs from the authors' Pax (its own value in brackets; the `cpu` preset also changes the numbers in CPU below):
 1. The evolution's mean is evaluated (the best of the current generation, chosen by its noisy fitness).
 2. Shaper's action noise is new in every generation (the same in all).
 3. The last step of an episode is rewarded, and other mends of the worlds (see envs/).
 4. A learner's minibatches are the same steps for all opponents of a generation (drawn for each).
 5. PPO on the policy goes through its memory in whole trials, M-FOS's meta-agent with it (one step deep, which leaves the
    meta-agent untrained); its minibatches are opponents (single steps), gamma 0.99 (0.96), entropy bonus 0.01 (0.1).
 6. Weight decay is on the mean square of a solution (as there) with evosax's current classes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from common.env import begin_evolution, in_32_bits
from common.lanes import Episode, affine, affine_shape, choose, gru, gru_shape, linear, pick, ppo_epochs, spread, to_matches
from common.nn import orthogonal
from common.ppo import gae
from common.runs import RunConfig, Train, cli, require, require_range, run, shard_batch
from envs.coin_game import CoinGame
from envs.in_the_matrix import InTheMatrix
from envs.matrix_games import MatrixGame, two_player

MATRIX = ("ipd", "imp", "chicken", "stag_hunt")
SIDES = ("shaper", "learner")


@dataclass(frozen=True)
class Config(RunConfig):
    """Shaper's settings; the defaults are the authors' for the iterated matrix games."""

    may_grow = ("num_updates",)
    preset: Literal["cpu", "coin_game", "in_the_matrix", "mfos_rl", "paper", "paper_coin_game", "paper_in_the_matrix"] = "cpu"
    """Which set of defaults to begin from: minutes on two cores, for one kind of world each, or the authors' own numbers."""
    env: Literal["ipd", "imp", "chicken", "stag_hunt", "coin_game", "ipditm", "impitm"] = "ipd"
    """The world: a matrix game, the coin game, or the prisoner's dilemma or matching pennies in the matrix."""
    method: Literal["shaper", "mfos", "gs", "reset"] = "shaper"
    """Who plays the first side: Shaper, M-FOS, Good Shepherd, or Shaper without a memory of earlier episodes."""
    averaging: Literal["none", "average", "attention"] = "none"
    """How memory is shared between the environments of a batch at every step (Shaper and M-FOS)."""
    trainer: Literal["es", "ppo"] = "es"
    """What trains the first side: evolution, or PPO on whole trials (M-FOS's other form)."""
    learner: Literal["tabular", "mlp", "gru"] = "tabular"
    """The opponent's network; tabular for matrix games only."""

    num_updates: int = 1000
    """Generations."""
    population_size: int = 1000
    """Policies tried in each generation."""
    num_opponents: int = 10
    """Learners that each policy meets, each in a trial of its own."""
    num_envs: int = 2
    """Environments in which a learner plays the policy at once; it learns from all of them."""
    num_episodes: int = 100
    """Episodes of a trial (outer steps); the learner learns after each."""
    num_steps: int = 100
    """Steps of an episode (inner steps)."""
    hidden: int = 16
    """Width of the policy's memory and layers."""

    es_lr: float = 0.1
    """Learning rate of Adam on the evolution's mean, at first."""
    es_lr_decay: float = 0.9999
    """Factor of that learning rate from one generation to the next; at least 0.001 is left."""
    es_beta1: float = 0.99
    """Adam's momentum on the evolution's mean."""
    sigma: float = 0.04
    """Standard deviation of the search, at first."""
    sigma_decay: float = 0.999
    """Factor of the standard deviation from one generation to the next; at least 0.01 is left."""
    shaping: Literal["mean", "zscore", "rank"] = "mean"
    """What the evolution makes of fitness: less its mean, standardised, or centred ranks."""
    weight_decay: float = 0.0
    """Weight of a solution's mean square against its fitness."""

    rl_lr: float = 0.005
    """--trainer ppo: learning rate of Adam on the policy. It plays one trial against each of num_opponents."""
    rl_gamma: float = 0.99
    """--trainer ppo: discount factor over the steps of a whole trial."""
    rl_epochs: int = 2
    """--trainer ppo: passes over the trials."""
    rl_minibatches: int = 2
    """--trainer ppo: groups of opponents that each pass is split into."""
    rl_ent_coef: float = 0.01
    """--trainer ppo: weight of the policy's entropy bonus. Lambda, clipping and the rest are the learner's."""

    lr: float = 1.0
    """Learning rate of the learner's Adam."""
    gamma: float = 0.96
    """Discount factor of the learner."""
    gae_lambda: float = 0.95
    """Lambda of the learner's generalised advantage estimation."""
    num_epochs: int = 2
    """The learner's PPO passes over each episode."""
    num_minibatches: int = 4
    """Groups of steps that each pass is split into."""
    clip_eps: float = 0.2
    """PPO's clipping range, of the ratio and of the value."""
    ent_coef: float = 0.02
    """Weight of the learner's entropy bonus."""
    vf_coef: float = 0.5
    """Weight of the value loss."""
    max_grad_norm: float = 0.5
    """Largest global norm of a learner's gradient."""
    learner_hidden: int = 16
    """Width of the learner's network, where it has one."""

    eval_learners: int = 64
    """Fresh learners that the evolution's mean meets at an evaluation."""
    eval_stop: int = 2
    """Episodes after which the learner stops to learn in the hard-stop challenge."""

    def __post_init__(self):
        super().__post_init__()
        counts = "population_size num_opponents num_envs num_episodes num_steps hidden num_epochs num_minibatches rl_epochs"
        for name in (*counts.split(), "rl_minibatches", "learner_hidden", "eval_learners"):
            require(getattr(self, name) >= 1, f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        require(
            self.population_size % 2 == 0, f"--population-size {self.population_size}: must be even, half of it mirrors the other"
        )
        steps = self.num_envs * self.num_steps
        require(
            steps % self.num_minibatches == 0,
            f"--num-minibatches {self.num_minibatches}: must divide num-envs x num-steps, {steps}",
        )
        require_range(self, 0, 1, "gamma", "rl_gamma", "gae_lambda", "es_lr_decay", "sigma_decay", "es_beta1")
        require_range(self, 0, 1000, "clip_eps", "ent_coef", "rl_ent_coef", "vf_coef", "max_grad_norm", "weight_decay", "eval_stop")
        for name in ("lr", "es_lr", "rl_lr", "sigma"):
            require(getattr(self, name) > 0, f"--{name.replace('_', '-')} {getattr(self, name)}: must be positive")
        divides = self.trainer == "es" or self.num_opponents % self.rl_minibatches == 0
        require(divides, f"--rl-minibatches {self.rl_minibatches}: must divide --num-opponents {self.num_opponents}")
        tabular = self.learner == "tabular" and self.env not in MATRIX
        require(not tabular, f"--learner tabular: --env {self.env} needs mlp or gru")
        mixes = self.averaging == "none" or self.method in ("shaper", "mfos", "reset")
        require(mixes, f"--averaging {self.averaging}: --method {self.method} has no memory to average")

    @property
    def split_size(self) -> int:
        return self.population_size if self.trainer == "es" else self.num_opponents


PAPER = Config(log_every=10, eval_every=100, save_every=100, preset="paper")
FOR_GRIDS = dict(learner="gru", lr=5e-3, num_minibatches=8, ent_coef=0.1, shaping="rank", weight_decay=0.1, num_opponents=1)
PAPER_COIN = replace(
    PAPER, preset="paper_coin_game", env="coin_game", num_updates=3000, num_envs=100, num_episodes=600, num_steps=16,
    population_size=4000, **FOR_GRIDS,
)  # fmt: skip
PAPER_GRID = replace(
    PAPER, preset="paper_in_the_matrix", env="ipditm", num_updates=5000, num_envs=50, num_episodes=500, num_steps=152,
    population_size=1024, sigma=0.075, es_lr=0.05, es_lr_decay=0.999, hidden=32, learner_hidden=8, **FOR_GRIDS,
)  # fmt: skip
SHORT = dict(num_seeds=4, log_every=5, es_beta1=0.9, shaping="rank")
CPU = replace(
    PAPER, preset="cpu", num_updates=120, eval_every=40, save_every=40, population_size=64, num_opponents=2,
    sigma=0.2, sigma_decay=1.0, **SHORT,
)  # fmt: skip
CPU_COIN = replace(
    PAPER_COIN, preset="coin_game", num_updates=100, eval_every=50, save_every=50, population_size=32, num_envs=32,
    num_episodes=100, eval_learners=8, **SHORT,
)  # fmt: skip
CPU_GRID = replace(
    PAPER_GRID, preset="in_the_matrix", num_updates=60, eval_every=30, save_every=30, population_size=16, num_envs=8,
    num_episodes=20, eval_learners=4, **(SHORT | {"num_seeds": 2}),
)  # fmt: skip
CPU_RL = replace(CPU, preset="mfos_rl", method="mfos", trainer="ppo", num_opponents=16, num_episodes=30, num_steps=30)
PRESETS = {x.preset: x for x in (CPU, CPU_COIN, CPU_GRID, CPU_RL, PAPER, PAPER_COIN, PAPER_GRID)}


class State(NamedTuple):
    """All of one seed's run, trained by evolution."""

    es: Any  # evosax's Open_ES
    key: jax.Array

    @property
    def params(self):
        """The evolution's mean, one long vector."""
        return self.es.mean


class RLState(NamedTuple):
    """All of one seed's run, trained by PPO."""

    params: dict
    opt_state: Any
    key: jax.Array


# --- layers


def layer_norm(params, x) -> jax.Array:
    """Over the features."""
    x = x - x.mean(-2, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-2, keepdims=True) + 1e-5) * (1 + params["scale"]) + params["b"]


def share_memory(params, h, averaging: str, heads: int) -> jax.Array:
    """Batched averaging of memories h (E, H, M) over the environments E (Sec. 4): h/2 + (what the batch holds)/2.

    average takes the batch's mean; attention lets each environment attend to all, with some `heads`.
    """
    if averaging == "none":
        return h
    if averaging == "average":
        return 0.5 * h + 0.5 * h.mean(0)
    split = lambda x: x.reshape(x.shape[0], heads, -1, x.shape[-1])
    q, k, v = (split(x) for x in jnp.split(linear(params["qkv"], layer_norm(params["before"], h)), 3, axis=-2))
    weights = jax.nn.softmax((q[:, None] * k).sum(-2) / q.shape[2] ** 0.5, axis=1)  # (E, E, heads, M)
    seen = (weights[..., None, :] * v).sum(1).reshape(h.shape)
    return 0.5 * h + 0.5 * affine(params["out"], layer_norm(params["after"], h + seen))


def view(params, obs) -> jax.Array:
    """What a network makes of obs (..., F, M) before its memory: a relu layer, a 3 x 3 convolution of the image, or nothing."""
    if "layer" in params:
        return jax.nn.relu(affine(params["layer"], obs))
    if "conv" not in params:
        return obs
    image, vector = obs[..., :250, :], obs[..., 250:, :]
    image = image.reshape(*image.shape[:-2], 5, 5, 10, image.shape[-1])
    image = jnp.pad(image, [(0, 0)] * (image.ndim - 4) + [(1, 1), (1, 1), (0, 0), (0, 0)])
    patches = [image[..., i : i + 5, j : j + 5, :, :] for i in range(3) for j in range(3)]
    seen = jax.nn.relu(affine(params["conv"], jnp.concatenate(patches, axis=-2)))  # (..., 5, 5, 16, M)
    return jnp.concatenate([seen.reshape(*vector.shape[:-2], -1, vector.shape[-1]), vector], axis=-2)


def view_shape(env: str, hidden: int) -> tuple[dict, int]:
    """-> the shapes of `view`'s weights, the number of its features."""
    if env in MATRIX:
        return {}, 5
    if env == "coin_game":
        return {"layer": affine_shape(36, hidden)}, hidden
    return {"conv": affine_shape(90, 16)}, 25 * 16 + 6


# --- worlds


class World(NamedTuple):
    """A game as the trial needs it; shapes (E, P, O, ...): environments, population, opponents."""

    env: Any
    num_features: int
    bootstrap: bool  # whether the learner values what comes after an episode (matrix games) or takes it for the end
    stats: Callable  # (features of the first side, info) -> {name: (E, P, O)}, what is counted at each step
    strategies: dict  # name -> obs (E, F, M) -> logits (E, A, M): fixed opponents


def matrix_stats(features, info) -> dict:
    """How often each joint action is played, the first side's action first."""
    return {f"visits/{name}": features[..., k] for k, name in enumerate(("CC", "CD", "DC", "DD"))}


def coin_stats(features, info) -> dict:
    """Coins picked up, by who and of whose colour."""
    return {f"coins/{s}_{c}": info["picked"][..., i, j] for i, s in enumerate(SIDES) for j, c in enumerate(("own", "other"))}


def grid_stats(features, info) -> dict:
    """Meetings, and the share of cooperation coins held there."""
    met = info["met"]
    return {"meetings": met[..., 0]} | {f"strategy/{s}": met[..., i] * info["strategy"][..., i] for i, s in enumerate(SIDES)}


def play_surely(defects) -> jax.Array:
    """The logits of a strategy that defects where `defects` (E, M) is 1 and cooperates where it is 0."""
    return 100.0 * jnp.stack([1 - defects, defects], axis=-2)


def greedy(obs) -> jax.Array:
    """The coin game's greedy strategy: towards any coin."""
    coins = obs.reshape(obs.shape[0], 3, 3, 4, -1)[:, :, :, 2:].sum(3)  # (E, row, column, M), oneself in the middle
    ways = [coins[:, :, 2].sum(1), coins[:, :, 0].sum(1), coins[:, 2].sum(1), coins[:, 0].sum(1)]
    return 100.0 * jnp.stack([*ways, jnp.full_like(ways[0], 0.5)], axis=-2)


MATRIX_STRATEGIES = {
    "tft": lambda obs: play_surely(obs[:, 1] + obs[:, 3]),  # tit for tat: as the other did, in CD and DD; cooperates at START
    "cooperate": lambda obs: play_surely(0 * obs[:, 0]),
    "defect": lambda obs: play_surely(0 * obs[:, 0] + 1),
}
COIN_STRATEGIES = {"greedy": greedy, "stay": lambda obs: jnp.zeros_like(obs[:, :5]).at[:, 4].set(100.0)}


def make_world(config: Config) -> World:
    """The world that the settings name."""
    if config.env in MATRIX:
        return World(MatrixGame(two_player(config.env), config.num_steps), 5, True, matrix_stats, MATRIX_STRATEGIES)
    if config.env == "coin_game":
        return World(CoinGame(max_steps_in_episode=config.num_steps), 36, False, coin_stats, COIN_STRATEGIES)
    return World(InTheMatrix(config.env[:3], max_steps_in_episode=config.num_steps), 256, False, grid_stats, {})


def features_of(obs) -> jax.Array:
    """Observations (E, P, O, 2, ...) as plain vectors (E, P, O, 2, F)."""
    return jnp.concatenate([x.reshape(*x.shape[:4], -1).astype(jnp.float32) for x in jax.tree.leaves(obs)], axis=-1)


def to_lanes(x) -> jax.Array:
    """(E, P, O, F) -> (E, F, M)."""
    return x.reshape(x.shape[0], -1, x.shape[-1]).swapaxes(1, 2)


# --- players


class Player(NamedTuple):
    """One side of the game as pure functions. Weights stay through an episode, memory changes at every step."""

    act: Callable  # weights, memory, obs (E, F, M) -> logits (E, A, M), value (E, M) or None, memory
    end: Callable  # key, weights, memory, episode, k -> weights, memory: what happens after episode k
    records: str = "nothing"  # or "episode": for `end`; or "trial": for who trains it


def policy_shapes(config: Config) -> dict:
    """The shapes of one policy's weights."""
    hidden, actions = config.hidden, make_world(config).env.num_actions
    seen, n_in = view_shape(config.env, hidden)
    norm = {"scale": (hidden,), "b": (hidden,)}
    share = {"qkv": (3 * hidden, hidden), "before": norm, "after": norm, "out": affine_shape(hidden, hidden)}
    share = share if config.averaging == "attention" else {}
    last = {"policy": (actions, hidden)} | ({"value": (1, hidden)} if config.trainer == "ppo" else {})
    if config.method == "gs":
        return {"view": seen, "first": affine_shape(n_in, hidden), "second": affine_shape(hidden, hidden)} | last
    if config.method == "mfos":
        part = {"view": seen, "in": affine_shape(n_in, hidden), "gru": gru_shape(hidden, hidden), "share": share}
        return {"actor": part, "meta": part, "th": affine_shape(hidden, hidden)} | last
    return {"view": seen, "gru": gru_shape(n_in, hidden), "share": share} | last


def make_policy(config: Config) -> Player:
    """The first side: Shaper, M-FOS or Good Shepherd, of weights as in `policy_shapes` with a last axis M."""
    mix = partial(share_memory, averaging=config.averaging, heads=1 if config.env in MATRIX else 8)

    def heads(weights, x, memory):
        value = linear(weights["value"], x)[..., 0, :] if "value" in weights else None
        return linear(weights["policy"], x), value, memory

    def shaper(weights, h, obs):
        h = gru(weights["gru"], mix(weights["share"], h), view(weights["view"], obs))
        return heads(weights, h, h)

    def mfos(weights, memory, obs):
        (h_actor, h_meta, th), parts = memory, (weights["actor"], weights["meta"])
        h_actor, h_meta = (
            gru(part["gru"], mix(part["share"], h), affine(part["in"], view(part["view"], obs)))
            for part, h in zip(parts, (h_actor, h_meta), strict=True)
        )
        return heads(weights, th * h_actor, (h_actor, h_meta, th))

    def good_shepherd(weights, memory, obs):
        x = jnp.tanh(affine(weights["first"], view(weights["view"], obs)))
        return heads(weights, jnp.tanh(affine(weights["second"], x)), memory)

    def end(key, weights, memory, episode, k):
        if config.method == "mfos":  # the meta-agent's word for the next episode; all that was seen in this one is forgotten
            h_actor, h_meta, _ = memory
            return weights, (0 * h_actor, 0 * h_meta, jax.nn.sigmoid(affine(weights["th"], h_meta)))
        return weights, 0 * memory if config.method == "reset" else memory

    act = {"mfos": mfos, "gs": good_shepherd}.get(config.method, shaper)
    return Player(act, end)


def init_memory(config: Config, num_envs: int, matches: int):
    """The policy's memory at the start of a trial."""
    h = jnp.zeros((num_envs, config.hidden, matches), jnp.float32)
    return {"gs": (), "mfos": (h, h, jnp.ones_like(h))}.get(config.method, h)


def fixed_player(logits_of: Callable) -> Player:
    """A player that does not learn and remembers nothing: obs (E, F, M) -> logits (E, A, M)."""
    act = lambda weights, memory, obs: (logits_of(obs), None, memory)
    return Player(act, lambda key, weights, memory, episode, k: (weights, memory))


# --- the naive learner


def init_learner(key, config: Config) -> dict:
    """The weights of one learner: a table, or a network."""
    actions, hidden = make_world(config).env.num_actions, config.learner_hidden
    seen, n_in = view_shape(config.env, hidden)
    if config.learner == "tabular":
        return {"heads": jnp.full((actions + 1, n_in), 0.5, jnp.float32)}
    layer = lambda key, n_out, n_in: {"w": orthogonal(key, (n_out, n_in), 2**0.5), "b": jnp.zeros(n_out, jnp.float32)}
    keys = jax.random.split(key, 8)
    filled = {name: layer(keys[i], *shape["w"]) for i, (name, shape) in enumerate(seen.items())}
    heads = jnp.concatenate([orthogonal(keys[2], (actions, hidden), 0.01), orthogonal(keys[3], (1, hidden))])
    if config.learner == "gru":
        wx, wh = orthogonal(keys[4], (3 * hidden, n_in)), orthogonal(keys[5], (3 * hidden, hidden))
        return {"view": filled, "gru": {"wx": wx, "wh": wh, "b": jnp.zeros(3 * hidden, jnp.float32)}, "heads": heads}
    first, second = layer(keys[4], hidden, n_in), layer(keys[5], hidden, hidden)
    return {"view": filled, "first": first, "second": second, "heads": heads}


def learner_net(params, memory, obs):
    """obs (..., F, M) -> logits (..., A, M), value (..., M), memory."""
    x = view(params["view"], obs) if "view" in params else obs
    if "gru" in params:
        x = memory = gru(params["gru"], memory, x)
    elif "first" in params:
        x = jnp.tanh(affine(params["second"], jnp.tanh(affine(params["first"], x))))
    out = linear(params["heads"], x)
    return out[..., :-1, :], out[..., -1, :], memory


def make_learner(config: Config, bootstrap: bool) -> Player:
    """The second side: PPO, one update after every episode, from all its environments. Its weights are (params, opt_state, stop);
    from episode `stop` (M,) on it learns no more."""
    tx = optax.adam(config.lr, eps=1e-5)

    def act(weights, memory, obs):
        return learner_net(weights[0], memory, obs)

    def end(key, weights, memory, episode: Episode, k):
        params, opt_state, stop = weights
        memory = jax.tree.map(jnp.zeros_like, memory)
        last = jnp.zeros_like(episode.value[0])
        if bootstrap:  # the next episode begins with the same observation as this one did
            last = learner_net(params, memory, episode.obs[0])[1]
        done = jnp.zeros_like(episode.reward)
        adv, target = gae(episode.reward, episode.value, done, last, config.gamma, config.gae_lambda)
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (episode, adv, target))
        new, opt_state = ppo_epochs(key, learner_net, tx, params, opt_state, flat, config)
        params = jax.tree.map(lambda x, y: jnp.where(k < stop, x, y), new, params)
        return (params, opt_state, stop), memory

    return Player(act, end, records="episode")


def start_learner(key, config: Config, population: int, opponents: int, num_envs: int, stop=jnp.inf):
    """-> weights and memory of fresh learners: each of the opponents its own, the same ones for every member of the population."""
    params = jax.vmap(partial(init_learner, config=config))(jax.random.split(key, opponents))
    params = jax.tree.map(lambda x: jnp.tile(jnp.moveaxis(x, 0, -1), population), params)
    matches = population * opponents
    memory = jnp.zeros((num_envs, config.learner_hidden, matches), jnp.float32) if config.learner == "gru" else ()
    stop = jnp.broadcast_to(stop, matches)
    return (params, optax.adam(config.lr, eps=1e-5).init(params), stop), memory


# --- a trial


class Outcome(NamedTuple):
    """What happened in a trial, by episode."""

    reward: jax.Array  # (K, 2, P, O): the mean per step of each side
    stats: dict  # name -> (K, P, O)
    film: Any  # states of the first match (K, T, ...)
    trial: Any  # what players of records "trial" saw: Episode, leading axes (K, T, E), without memories


def play_trial(key, world: World, players, weights, memories, sizes, config: Config, with_stats: bool = False):
    """A trial of num_episodes episodes (Algorithm 1) -> Outcome, the players' last weights and memories.

    sizes: population P, opponents O, environments E. Chance is the same for every member of the population.
    """
    population, opponents, num_envs = sizes
    shape = (num_envs, population, opponents)
    over_games = lambda f: jax.vmap(jax.vmap(jax.vmap(f), (None, 0)), (0, 0))  # keys (E, O), the rest (E, P, O)
    params, num_actions = world.env.default_params, world.env.num_actions
    reset = over_games(lambda key, _: world.env.reset_env(key, params))
    env_step = over_games(lambda key, args: world.env.step_env(key, *args, params))

    def observe(obs):
        features = features_of(obs)
        return features, tuple(to_lanes(features[..., i, :]) for i in range(2))

    def step(weights, carry, inputs):
        env_state, obs, memories = carry
        noise, keys = inputs
        acts = [p.act(w, m, o) for p, w, m, o in zip(players, weights, memories, obs, strict=True)]
        actions = [choose(logits + jnp.tile(n, population)) for (logits, *_), n in zip(acts, noise, strict=True)]  # (E, M) each
        both = jnp.stack([x.reshape(shape) for x in actions], axis=-1)
        next_obs, env_state, reward, _, info = env_step(keys, (env_state, both))
        features, next_obs = observe(next_obs)
        reward = reward.reshape(num_envs, -1, 2)
        notes = []
        for i, (logits, value, _) in enumerate(acts):
            log_prob = pick(jax.nn.log_softmax(logits, axis=-2), actions[i])
            note = Episode(obs[i], memories[i], actions[i], log_prob, value, reward[..., i])
            notes.append(note if players[i].records != "nothing" else None)
        after = tuple(memory for *_, memory in acts)
        stats, film = {}, ()
        if with_stats:
            stats = jax.tree.map(lambda x: x.astype(jnp.float32).mean(0), world.stats(features[..., 0, :], info))
            film = jax.tree.map(lambda x: x[0, 0, 0], env_state)
        return (env_state, next_obs, after), (tuple(notes), reward.mean(0), stats, film)

    def episode(carry, k):
        weights, memories = carry
        key_reset, key_noise, key_env, *key_end = jax.random.split(jax.random.fold_in(key, k), 5)
        noise = jax.random.gumbel(key_noise, (config.num_steps, 2, num_envs, num_actions, opponents), jnp.float32)
        keys = jax.random.split(key_env, (config.num_steps, num_envs, opponents))
        obs, env_state = reset(jax.random.split(key_reset, (num_envs, opponents)), jnp.zeros(shape, jnp.float32))
        carry = (env_state, observe(obs)[1], memories)
        (_, _, memories), (notes, reward, stats, film) = jax.lax.scan(partial(step, weights), carry, (noise, keys))
        ends = [p.end(key_end[i], weights[i], memories[i], notes[i], k) for i, p in enumerate(players)]
        reward = reward.mean(0).T.reshape(2, population, opponents)
        trial = [n._replace(memory=()) for n, p in zip(notes, players, strict=True) if p.records == "trial"]
        return tuple(zip(*ends, strict=True)), (reward, jax.tree.map(lambda x: x.mean(0), stats), film, trial)

    (weights, memories), outcome = jax.lax.scan(episode, (weights, memories), jnp.arange(config.num_episodes))
    return Outcome(*outcome), weights, memories


# --- evolution


def make_evolution(config: Config):
    """Open_ES (1703.03864) as Shaper has it: mirrored samples, Adam, decaying step sizes, begun at zero -> strategy, its params."""
    from evosax.algorithms import Open_ES  # on use only: evosax starts the backend when it is imported
    from evosax.core.fitness_shaping import centered_rank_fitness_shaping_fn, standardize_fitness_shaping_fn

    shapings = {"mean": lambda x, fitness, *_: fitness - fitness.mean(), "zscore": standardize_fitness_shaping_fn}
    shape_fitness = shapings.get(config.shaping, centered_rank_fitness_shaping_fn)
    decayed = lambda x, fitness, *rest: shape_fitness(x, fitness + config.weight_decay * (x * x).mean(-1), *rest)
    lr = lambda t: jnp.maximum(config.es_lr * config.es_lr_decay**t, 0.001)
    strategy = Open_ES(
        config.population_size,
        zero_policy(config),
        optimizer=optax.adam(lr, b1=config.es_beta1),
        std_schedule=lambda t: jnp.maximum(config.sigma * config.sigma_decay**t, 0.01),
        fitness_shaping_fn=decayed,
        metrics_fn=lambda *_: {},
    )
    return strategy, strategy.default_params


def zero_policy(config: Config) -> dict:
    """A policy's weights, all zero: it acts uniformly at random."""
    return jax.tree.map(partial(jnp.zeros, dtype=jnp.float32), policy_shapes(config), is_leaf=lambda x: isinstance(x, tuple))


def make_train(config: Config) -> Train:
    """The training of a policy that shapes, as pure functions of one seed."""
    return train_by_evolution(config) if config.trainer == "es" else train_by_ppo(config)


def train_by_evolution(config: Config) -> Train:
    world = make_world(config)
    strategy, es_params = make_evolution(config)
    players = (make_policy(config), make_learner(config, world.bootstrap))
    sizes = (config.population_size, config.num_opponents, config.num_envs)
    steps = np.float32(np.prod([*sizes, config.num_episodes, config.num_steps]))

    def init(key):
        key, key_es = jax.random.split(key)
        es = strategy.init(key_es, zero_policy(config), es_params)
        return State(begin_evolution(jax.tree.map(jnp.asarray, es)), key)

    def update(state: State, t):
        """A generation: every policy of the population plays a trial against each of its fresh learners."""
        key, key_ask, key_tell, key_learner, key_trial = jax.random.split(state.key, 5)
        population, es = in_32_bits(strategy.ask(key_ask, state.es, es_params))
        weights = to_matches(population, config.num_opponents)
        weights = jax.tree.map(lambda x: shard_batch(x, x.ndim - 1), weights)
        memory = init_memory(config, config.num_envs, config.population_size * config.num_opponents)
        learner, learner_memory = start_learner(key_learner, config, *sizes)
        outcome, _, _ = play_trial(key_trial, world, players, (weights, learner), (memory, learner_memory), sizes, config)
        fitness = outcome.reward[:, 0].mean((0, 2))  # (P,)
        es, _ = strategy.tell(key_tell, population, -fitness, es, es_params)
        es = jax.tree.map(lambda x, like: x.astype(like.dtype), es, state.es)
        return State(es, key), {
            "shaper_reward": fitness.mean(),
            "shaper_best": fitness.max(),
            "learner_reward": outcome.reward[:, 1].mean(),
            "sigma": es.std,
            "mean_norm": jnp.sqrt((es.mean**2).sum()),
            "env_steps": (t + 1.0) * steps,
        }

    return Train(init, update, partial(evaluate, config), config.num_updates)


# --- reinforcement learning


def init_policy(key, config: Config) -> dict:
    """A policy's weights for PPO: normal, scaled by the number of inputs; the last layer small; biases 0."""
    shapes, tree = jax.tree.flatten(policy_shapes(config), is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(key, len(shapes))
    fill = lambda key, s: jax.random.normal(key, s, jnp.float32) / s[1] ** 0.5 if len(s) > 1 else jnp.zeros(s, jnp.float32)
    weights = jax.tree.unflatten(tree, [fill(k, s) for k, s in zip(keys, shapes, strict=True)])
    return weights | {"policy": 0.01 * weights["policy"]}


def replay(policy: Player, weights, memory, obs):
    """What the policy does and thinks in a whole trial: obs (K, T, E, F, M) -> logits (K, T, E, A, M), value (K, T, E, M).

    Gradients flow through all of its memory; only the memories between episodes are kept for them.
    """

    def step(memory, obs):
        logits, value, memory = policy.act(weights, memory, obs)
        return memory, (logits, value)

    def episode(memory, obs):
        memory, out = jax.lax.scan(step, memory, obs)
        return policy.end(None, weights, memory, None, 0)[1], out

    return jax.lax.scan(jax.checkpoint(episode), memory, obs)[1]


def trial_loss(params, batch, config: Config):
    """PPO's loss on whole trials, one for each opponent M; every leaf of `batch` is (K, T, E, ..., M)."""
    trial, adv, target = batch
    matches = adv.shape[-1]
    memory = init_memory(config, config.num_envs, matches)
    logits, value = replay(make_policy(config), spread(params, (1, matches)), memory, trial.obs)
    log_probs = jax.nn.log_softmax(logits, axis=-2)
    ratio = jnp.exp(pick(log_probs, trial.action) - trial.log_prob)
    adv = (adv - adv.mean()) / (adv.std() + 1e-8)
    gain = jnp.minimum(ratio * adv, jnp.clip(ratio, 1 - config.clip_eps, 1 + config.clip_eps) * adv)
    entropy = -(jnp.exp(log_probs) * log_probs).sum(-2)
    return (-gain + config.vf_coef * (value - target) ** 2 - config.rl_ent_coef * entropy).mean()


def train_by_ppo(config: Config) -> Train:
    world, tx = make_world(config), optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optax.adam(config.rl_lr, eps=1e-5))
    players = (make_policy(config)._replace(records="trial"), make_learner(config, world.bootstrap))
    sizes = (1, config.num_opponents, config.num_envs)
    steps = np.float32(np.prod([*sizes, config.num_episodes, config.num_steps]))

    def init(key):
        key, key_policy = jax.random.split(key)
        params = init_policy(key_policy, config)
        return RLState(params, tx.init(params), key)

    def update(state: RLState, t):
        """A trial against each of the fresh learners, then PPO on all of them."""
        key, key_learner, key_trial, *keys = jax.random.split(state.key, 3 + config.rl_epochs)
        memory = init_memory(config, config.num_envs, config.num_opponents)
        learner, learner_memory = start_learner(key_learner, config, *sizes)
        weights = jax.tree.map(lambda x: shard_batch(x, x.ndim - 1), spread(state.params, sizes))
        outcome, _, _ = play_trial(key_trial, world, players, (weights, learner), (memory, learner_memory), sizes, config)
        (trial,) = outcome.trial
        reward, value = (x.reshape(-1, *x.shape[2:]) for x in (trial.reward, trial.value))  # (K T, E, M)
        adv, target = gae(reward, value, 0 * reward, 0 * reward[0], config.rl_gamma, config.gae_lambda)
        batch = (trial, adv.reshape(trial.value.shape), target.reshape(trial.value.shape))

        def minibatch(carry, rows):
            params, opt_state = carry
            grads = jax.grad(trial_loss)(params, jax.tree.map(lambda x: x[..., rows], batch), config)
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        orders = [jax.random.permutation(k, config.num_opponents).reshape(config.rl_minibatches, -1) for k in keys]
        (params, opt_state), _ = jax.lax.scan(minibatch, (state.params, state.opt_state), jnp.concatenate(orders))
        rewards = outcome.reward.mean((0, 2, 3))
        metrics = {f"{side}_reward": rewards[i] for i, side in enumerate(SIDES)}
        return RLState(params, opt_state, key), metrics | {"env_steps": (t + 1.0) * steps}

    return Train(init, update, partial(evaluate, config), config.num_updates)


# --- evaluation


def policy_of(config: Config, state) -> dict:
    """The weights that a state has found: the evolution's mean, or PPO's parameters."""
    return state.params if config.trainer == "ppo" else make_evolution(config)[0]._unravel_solution(state.es.mean)


def evaluate(config: Config, state) -> dict:
    """The policy in whole trials against fresh learners: as trained, in the hard-stop challenge, and half blind; against
    fixed strategies; and two naive learners against each other. Rewards are means per step; `_last` is of the last tenth."""
    key_learn, key_naive, key_fixed = jax.random.split(jax.random.fold_in(state.key, 0), 3)
    weights = policy_of(config, state)
    world = make_world(config)
    outcome = meet_learners(key_learn, weights, config)
    reward = outcome.reward.mean(3)  # (K, 2, probes)
    tenth, after = max(config.num_episodes // 10, 1), min(config.eval_stop, config.num_episodes - 1)
    results = {}
    for i, side in enumerate(SIDES):
        results |= {f"eval_{side}": reward[:, i, 0].mean(), f"eval_{side}_last": reward[-tenth:, i, 0].mean()}
        results |= {f"hardstop_{side}": reward[after:, i, 1].mean(), f"episodes/{side}": reward[:, i, 0]}
        results |= {f"blind_{side}": reward[:, i, 2].mean()} if config.env in MATRIX else {}
    for name, x in outcome.stats.items():
        results |= {name: x[:, 0].mean(), f"episodes/{name.replace('/', '_')}": x[:, 0].mean(1)}
    naive = naive_play(key_naive, config).reward.mean((2, 3))  # (K, 2)
    results |= {f"naive_{i + 1}": x for i, x in enumerate(naive.mean(0))}
    results |= {f"naive_{i + 1}_last": x for i, x in enumerate(naive[-tenth:].mean(0))}
    results |= {f"against/{name}": x for name, x in meet_strategies(key_fixed, weights, config).items()}
    if config.env not in MATRIX:
        results["film"] = jax.vmap(world.env.render)(jax.tree.map(lambda x: x[-1], outcome.film))
    return results


def meet_learners(key, weights, config: Config) -> Outcome:
    """One policy against eval_learners fresh learners -> Outcome with a population of the probes, played with the same chance.

    0: as trained. 1: the learner stops learning after eval_stop episodes. 2 (matrix games): in all but one of a learner's
    environments the policy sees START at every step.
    """
    world, num = make_world(config), config.eval_learners
    sizes = (3 if config.env in MATRIX else 2, num, config.num_envs)
    probe = np.arange(sizes[0]).repeat(num)  # (M,)
    policy, learner = make_policy(config), make_learner(config, world.bootstrap)

    def act(weights, memory, obs):
        blind = (probe == 2) & (np.arange(config.num_envs)[:, None, None] > 0)
        start = (np.arange(world.num_features) == world.num_features - 1)[:, None]
        return policy.act(weights, memory, jnp.where(blind, start, obs))

    key_start, key_trial = jax.random.split(key)
    matches = (spread(weights, sizes), start_learner(key_start, config, *sizes, jnp.where(probe == 1, config.eval_stop, jnp.inf)))
    memories = (init_memory(config, config.num_envs, len(probe)), matches[1][1])
    players = (policy._replace(act=act), learner)
    return play_trial(key_trial, world, players, (matches[0], matches[1][0]), memories, sizes, config, True)[0]


def naive_play(key, config: Config) -> Outcome:
    """Naive learners on both sides."""
    world, sizes = make_world(config), (1, config.eval_learners, config.num_envs)
    key_first, key_second, key_trial = jax.random.split(key, 3)
    players = (make_learner(config, world.bootstrap),) * 2
    weights, memories = zip(*(start_learner(k, config, *sizes) for k in (key_first, key_second)), strict=True)
    return play_trial(key_trial, world, players, weights, memories, sizes, config)[0]


def meet_strategies(key, weights, config: Config) -> dict:
    """One policy against the strategies that do not learn -> name -> its mean reward."""
    world, repeats = make_world(config), 4
    if not world.strategies:
        return {}
    who = np.arange(len(world.strategies)).repeat(repeats)  # (M,)
    sizes = (1, len(who), config.num_envs)

    def logits_of(obs):
        return sum(jnp.where(who == k, strategy(obs), 0.0) for k, strategy in enumerate(world.strategies.values()))

    memories = (init_memory(config, config.num_envs, len(who)), ())
    players, weights = (make_policy(config), fixed_player(logits_of)), (spread(weights, sizes), ())
    reward = play_trial(key, world, players, weights, memories, sizes, config)[0].reward[:, 0, 0]  # (K, M)
    return dict(zip(world.strategies, reward.reshape(len(reward), -1, repeats).mean((0, 2)), strict=True))


def cross_play(key, first, second, config: Config) -> Outcome:
    """Two policies, such as shapers trained apart, against each other for a trial."""
    sizes = (1, config.eval_learners, config.num_envs)
    memories = (init_memory(config, config.num_envs, config.eval_learners),) * 2
    weights = (spread(first, sizes), spread(second, sizes))
    return play_trial(key, make_world(config), (make_policy(config),) * 2, weights, memories, sizes, config)[0]


if __name__ == "__main__":
    run(cli(Config, __doc__, PRESETS), make_train, highlights=("shaper_reward", "eval_shaper"))
