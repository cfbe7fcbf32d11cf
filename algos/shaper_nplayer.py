"""Opponent shaping among N players: one shaper or several among naive learners (Leading the Pack, Souly et al., 2312.12564).

Of the N players of an iterated matrix game, S are shapers and L = N - S are naive learners. A trial is many episodes; the learners
begin it untrained and learn after every episode, each by itself, by PPO in the same program. A shaper is Shaper (2312.12568)
without averaging: a recurrent policy whose memory lives through the trial, found by evolution for its own mean reward over whole
trials. Several shapers evolve independently: member p of each one's population plays with member p of the others'.

Run:     python algos/shaper_nplayer.py                    (snowdrift, 3 players, 1 shaper, 4 seeds; --env public_goods, stag_hunt
                                                            or tragedy; --num-players 5; --num-shapers 2, or 0: learners only)

Paper:   --preset paper (one shaper), paper_several (two)

Expect:  snowdrift with three players, 6 seeds, reward a step: the shaper 2.88, its two learners 1.92. See results/shaper_nplayer/

Differs from the paper (its own value in brackets, from the authors' code; the `cpu` preset also changes the numbers in CPU below):
 1. The evolution's means are evaluated (the best member of a generation, chosen by its noisy fitness).
 2. What a learner learns from belongs together: the observation it acted on and the reward of that step (with one shaper the next
    observation, with several the reward of the step before: both are slips of the code).
 3. A shaper's action noise is new in every generation, and common to its population; a learner's minibatches are the same steps in
    all groups of a generation (noise repeated in every generation; minibatches drawn for each).
 4. --repair pairs the populations of several shapers anew in each generation (always member p with member p, as here by default).
 5. LOLA among N players is in algos/lola.py.
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
from common.lanes import Episode, affine, affine_shape, choose, gru, gru_shape, linear, pick, ppo_epochs, to_matches
from common.nn import orthogonal
from common.ppo import gae
from common.runs import RunConfig, Train, cli, require, require_range, run, shard_batch
from envs.matrix_games import MatrixGame, n_player


@dataclass(frozen=True)
class Config(RunConfig):
    """Settings; the defaults are the authors' for one shaper."""

    may_grow = ("num_updates",)
    preset: Literal["cpu", "paper", "paper_several"] = "cpu"
    """Which set of defaults to begin from: minutes on two cores, or the authors' own numbers for one shaper or for several."""
    env: Literal["public_goods", "snowdrift", "stag_hunt", "tragedy"] = "public_goods"
    """The game: the public-goods (prisoner's) dilemma, snowdrift (chicken), the stag hunt or the tragedy of the commons."""
    num_players: int = 3
    """Players, N."""
    num_shapers: int = 1
    """Those of them who shape, S; the others learn. 0: all learn, and nothing evolves."""
    repair: bool = False
    """Whether members of several shapers' populations meet in a new random order in each generation."""
    learner: Literal["tabular", "mlp", "gru"] = "gru"
    """The learners' network."""

    num_updates: int = 800
    """Generations."""
    population_size: int = 100
    """Policies tried in each generation, for each shaper."""
    num_opponents: int = 10
    """Groups of learners that each policy meets, each in a trial of its own."""
    num_envs: int = 2
    """Environments in which a group plays at once; a learner learns from all of them."""
    num_episodes: int = 1000
    """Episodes of a trial, K; the learners learn after each."""
    num_steps: int = 100
    """Steps of an episode, T."""
    hidden: int = 16
    """Width of a shaper's memory."""

    es_lr: float = 0.1
    """Learning rate of Adam on the evolution's means, at first."""
    es_lr_decay: float = 0.9999
    """Factor of that learning rate from one generation to the next; at least 0.001 is left."""
    es_beta1: float = 0.99
    """Adam's momentum on the evolution's means."""
    sigma: float = 0.04
    """Standard deviation of the search, at first."""
    sigma_decay: float = 0.999
    """Factor of the standard deviation from one generation to the next; at least 0.01 is left."""
    shaping: Literal["mean", "rank"] = "mean"
    """What the evolution makes of fitness: less its mean, or centred ranks."""

    lr: float = 3e-4
    """Learning rate of a learner's Adam."""
    gamma: float = 0.96
    """Discount factor of a learner."""
    gae_lambda: float = 0.95
    """Lambda of a learner's generalised advantage estimation."""
    num_epochs: int = 4
    """A learner's PPO passes over each episode."""
    num_minibatches: int = 10
    """Groups of steps that each pass is split into."""
    clip_eps: float = 0.2
    """PPO's clipping range, of the ratio and of the value."""
    ent_coef: float = 0.1
    """Weight of a learner's entropy bonus."""
    vf_coef: float = 0.5
    """Weight of the value loss."""
    max_grad_norm: float = 0.5
    """Largest global norm of a learner's gradient."""
    learner_hidden: int = 16
    """Width of a learner's network, where it has one."""

    eval_learners: int = 64
    """Fresh groups of learners that the evolution's means meet at an evaluation."""

    def __post_init__(self):
        super().__post_init__()
        require(2 <= self.num_players <= 10, f"--num-players {self.num_players}: must lie between 2 and 10")
        allowed = f"must lie between 0 and the number of players, {self.num_players}"
        require(0 <= self.num_shapers <= self.num_players, f"--num-shapers {self.num_shapers}: {allowed}")
        counts = "population_size num_opponents num_envs num_episodes num_steps hidden num_epochs num_minibatches learner_hidden"
        for name in (*counts.split(), "eval_learners"):
            require(getattr(self, name) >= 1, f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        even = self.population_size % 2 == 0
        require(even, f"--population-size {self.population_size}: must be even, half of it mirrors the other")
        steps = self.num_envs * self.num_steps
        divides = steps % self.num_minibatches == 0
        require(divides, f"--num-minibatches {self.num_minibatches}: must divide num-envs x num-steps, {steps}")
        require(not self.repair or self.num_shapers > 1, f"--repair: --num-shapers {self.num_shapers} leaves nobody to pair")
        require_range(self, 0, 1, "gamma", "gae_lambda", "es_lr_decay", "sigma_decay", "es_beta1")
        require_range(self, 0, 1000, "clip_eps", "ent_coef", "vf_coef", "max_grad_norm")
        for name in ("lr", "es_lr", "sigma"):
            require(getattr(self, name) > 0, f"--{name.replace('_', '-')} {getattr(self, name)}: must be positive")

    @property
    def split_size(self) -> int:
        return self.population_size if self.num_shapers else 1

    @property
    def names(self) -> list[str]:
        """The players' names, by seat."""
        learners = range(1, self.num_players - self.num_shapers + 1)
        return [*(f"shaper_{i + 1}" for i in range(self.num_shapers)), *(f"learner_{i}" for i in learners)]


PAPER = Config(log_every=10, eval_every=100, save_every=100, preset="paper")
SEVERAL = replace(PAPER, preset="paper_several", num_shapers=2, es_lr=0.01, num_updates=1500)
CPU = replace(
    PAPER, preset="cpu", env="snowdrift", num_seeds=4, num_updates=60, log_every=5, eval_every=20, save_every=20,
    population_size=64, num_opponents=2, num_episodes=100, es_beta1=0.9, shaping="rank", learner="tabular", lr=0.3, num_epochs=2,
    num_minibatches=4, ent_coef=0.02,
)  # fmt: skip
PRESETS = {x.preset: x for x in (CPU, PAPER, SEVERAL)}


class State(NamedTuple):
    """All of one seed's run."""

    es: Any  # evosax's Open_ES, one for each shaper, leading axis S; () without shapers
    key: jax.Array

    @property
    def params(self):
        """The evolutions' means (S, D)."""
        return self.es.mean if self.es else ()


# --- players
#
# The networks of all players of one kind run side by side as the last axis of every array (common/lanes.py): its M lanes are
# population x seats x groups of learners, the population first, so that devices can share it.


class Player(NamedTuple):
    """A kind of player as pure functions. Weights stay through an episode, memory changes at every step."""

    act: Callable  # weights, memory, obs (E, F, M) -> logits (E, 2, M), value (E, M) or None, memory
    end: Callable  # key, weights, memory, episode -> weights, memory: what happens after an episode
    learns: bool = False  # whether the episode is recorded for `end`


def keep(key, weights, memory, episode):
    """The `end` of those who do not learn: memory goes on into the next episode."""
    return weights, memory


def act_shaper(weights, h, obs):
    """The shaper's policy: a GRU and a linear layer."""
    h = gru(weights["gru"], h, obs)
    return linear(weights["policy"], h), None, h


def zero_policy(config: Config) -> dict:
    """A shaper's weights, all zero: it acts uniformly at random."""
    shapes = {"gru": gru_shape(2**config.num_players + 1, config.hidden), "policy": (2, config.hidden)}
    return jax.tree.map(partial(jnp.zeros, dtype=jnp.float32), shapes, is_leaf=lambda x: isinstance(x, tuple))


def others_defecting(players: int) -> np.ndarray:
    """How many of the others defect in each joint action of a player's view, (2^N,)."""
    return np.array([bin(view % 2 ** (players - 1)).count("1") for view in range(2**players)])


def by_defectors(players: int) -> np.ndarray:
    """Which of the 2 N states {C, D} x (defectors among the others) each joint action in a view is, (2^N, 2 N) of 0 and 1."""
    own = np.arange(2**players) >> players - 1
    return np.eye(2 * players, dtype=np.float32)[own * players + others_defecting(players)]


def tit_for_tat(obs, tolerated) -> jax.Array:
    """Logits (E, 2, M) of defection after more than `tolerated` (M,) of the others defected; obs (E, F, M). START: cooperation."""
    players = (obs.shape[1] - 1).bit_length() - 1
    defecting = (others_defecting(players)[:, None] * obs[:, :-1]).sum(1)
    return 100.0 * jnp.stack([defecting <= tolerated, defecting > tolerated], axis=-2)


def tolerance(config: Config) -> tuple[float, float]:
    """How many defectors harsh tit-for-tat bears (none) and soft (half of the others)."""
    return 0.0, (config.num_players - 1) / 2


SHAPER = Player(act_shaper, keep)


# --- the naive learner


def init_learner(key, config: Config) -> dict:
    """The weights of one learner: a table of logits and values, or a network."""
    n_in, hidden = 2**config.num_players + 1, config.learner_hidden
    if config.learner == "tabular":
        return {"heads": jnp.full((3, n_in), 0.5, jnp.float32)}
    keys = jax.random.split(key, 4)
    heads = jnp.concatenate([orthogonal(keys[0], (2, hidden), 0.01), orthogonal(keys[1], (1, hidden))])
    if config.learner == "gru":
        wx, wh = orthogonal(keys[2], (3 * hidden, n_in)), orthogonal(keys[3], (3 * hidden, hidden))
        return {"gru": {"wx": wx, "wh": wh, "b": jnp.zeros(3 * hidden, jnp.float32)}, "heads": heads}
    shapes = affine_shape(n_in, hidden), affine_shape(hidden, hidden)
    layer = lambda key, shape: {"w": orthogonal(key, shape["w"], 2**0.5), "b": jnp.zeros(shape["b"], jnp.float32)}
    first, second = map(layer, keys[2:], shapes)
    return {"first": first, "second": second, "heads": heads}


def learner_net(params, memory, obs):
    """obs (..., F, M) -> logits (..., 2, M), value (..., M), memory."""
    x = obs
    if "gru" in params:
        x = memory = gru(params["gru"], memory, x)
    elif "first" in params:
        x = jnp.tanh(affine(params["second"], jnp.tanh(affine(params["first"], x))))
    logits, value = linear(params["heads"][:2], x), linear(params["heads"][2:], x)
    return logits, value[..., 0, :], memory


def make_learner(config: Config) -> Player:
    """PPO, one update after every episode, from all its environments. Weights are (params, opt_state)."""
    tx = optax.adam(config.lr, eps=1e-5)

    def end(key, weights, memory, episode: Episode):
        memory = jax.tree.map(jnp.zeros_like, memory)
        last = learner_net(weights[0], memory, episode.obs[0])[1]  # the next episode begins as this one did, with START
        done = jnp.zeros_like(episode.reward)
        adv, target = gae(episode.reward, episode.value, done, last, config.gamma, config.gae_lambda)
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (episode, adv, target))
        return ppo_epochs(key, learner_net, tx, *weights, flat, config), memory

    return Player(lambda weights, memory, obs: learner_net(weights[0], memory, obs), end, learns=True)


def start_learners(key, config: Config, seats: int, population: int, groups: int):
    """-> weights and memory of fresh learners: in each seat of each group its own, the same for every member of the population."""
    params = jax.vmap(partial(init_learner, config=config))(jax.random.split(key, seats * groups))
    params = jax.tree.map(lambda x: jnp.tile(jnp.moveaxis(x, 0, -1), population), params)
    lanes = population * seats * groups
    memory = jnp.zeros((config.num_envs, config.learner_hidden, lanes), jnp.float32) if config.learner == "gru" else ()
    return (params, optax.adam(config.lr, eps=1e-5).init(params)), memory


# --- a trial


class Side(NamedTuple):
    """Players of one kind in neighbouring seats."""

    player: Player
    seats: int
    weights: Any  # last axis M = population x seats x groups
    memory: Any


class Outcome(NamedTuple):
    """What happened in a trial, by episode and seat."""

    reward: jax.Array  # (K, N, P, O): the mean per step
    visits: Any  # (K, N, 2 N, P, O): how often the player did C, then D, by the number of defectors among the others; or ()


def play_trial(key, sides: list[Side], sizes, config: Config, with_visits: bool = False) -> Outcome:
    """A trial of num_episodes episodes. The sides sit clockwise, the first in seat 0.

    sizes: population P, groups O. Chance is the same for every member of the population.
    """
    population, groups = sizes
    game, ends = MatrixGame(n_player(config.env, config.num_players), config.num_steps), np.cumsum([s.seats for s in sides])
    env_step = lambda *args: game.step_env(None, *args, game.default_params)[:3]
    env_step = jax.vmap(jax.vmap(jax.vmap(env_step, -1, -1)))  # (E, P, ..., O)
    to_lanes = lambda x: [y.reshape(*y.shape[:-3], -1) for y in jnp.split(jnp.moveaxis(x, (1, 2), (-3, -2)), ends[:-1], axis=-2)]

    def step(weights, carry, noise):
        env_state, obs, memories = carry
        acts = [s.player.act(w, m, o) for s, w, m, o in zip(sides, weights, memories, obs, strict=True)]
        actions = [choose(logits + jnp.tile(n, population)) for (logits, *_), n in zip(acts, noise, strict=True)]  # (E, M) each
        joint = [a.reshape(-1, population, s.seats, groups) for a, s in zip(actions, sides, strict=True)]
        next_obs, env_state, reward = env_step(env_state, jnp.concatenate(joint, axis=2))  # (E, P, N, F, O), (E, P, N, O)
        notes = []
        for side, (logits, value, _), o, m, a, r in zip(sides, acts, obs, memories, actions, to_lanes(reward), strict=True):
            log_prob = pick(jax.nn.log_softmax(logits, axis=-2), a)
            notes.append(Episode(o, m, a, log_prob, value, r) if side.player.learns else None)
        visits = jnp.einsum("epnfo,fg->npgo", next_obs[..., :-1, :], by_defectors(config.num_players)) if with_visits else ()
        return (env_state, to_lanes(next_obs), [memory for *_, memory in acts]), (notes, reward.mean(0), visits)

    def episode(carry, k):
        weights, memories = carry
        key_noise, *key_ends = jax.random.split(jax.random.fold_in(key, k), 1 + len(sides))
        noise = jax.random.gumbel(key_noise, (config.num_steps, config.num_envs, 2, config.num_players, groups), jnp.float32)
        noise = [x.reshape(*x.shape[:3], -1) for x in jnp.split(noise, ends[:-1], axis=-2)]
        fill = lambda x: jnp.broadcast_to(x[..., None], (config.num_envs, population, *x.shape, groups))
        obs, env_state = jax.tree.map(fill, game.reset_env(None, game.default_params))
        carry = (env_state, to_lanes(obs), memories)
        (_, _, memories), (notes, reward, visits) = jax.lax.scan(partial(step, weights), carry, noise)
        after = [s.player.end(*args) for s, *args in zip(sides, key_ends, weights, memories, notes, strict=True)]
        visits = jax.tree.map(lambda x: x.mean(0).swapaxes(1, 2) / config.num_envs, visits)
        return tuple([x[i] for x in after] for i in range(2)), (reward.mean(0).swapaxes(0, 1), visits)

    carry = [s.weights for s in sides], [s.memory for s in sides]
    return Outcome(*jax.lax.scan(episode, carry, jnp.arange(config.num_episodes))[1])


# --- evolution


def make_evolution(config: Config):
    """Open_ES (1703.03864): mirrored samples, Adam, decaying step sizes, begun at zero -> strategy, its params."""
    from evosax.algorithms import Open_ES  # on use only: evosax starts the backend when it is imported
    from evosax.core.fitness_shaping import centered_rank_fitness_shaping_fn

    lr = lambda t: jnp.maximum(config.es_lr * config.es_lr_decay**t, 0.001)
    less_mean = lambda population, fitness, state, params: fitness - fitness.mean()
    strategy = Open_ES(
        config.population_size,
        zero_policy(config),
        optimizer=optax.adam(lr, b1=config.es_beta1),
        std_schedule=lambda t: jnp.maximum(config.sigma * config.sigma_decay**t, 0.01),
        fitness_shaping_fn=less_mean if config.shaping == "mean" else centered_rank_fitness_shaping_fn,
        metrics_fn=lambda *_: {},
    )
    return strategy, strategy.default_params


def seat_shapers(populations, groups: int, config: Config) -> Side:
    """The shapers' side of weights (S, P, ...): in every trial the members of one number play together."""
    seats, population = jax.tree.leaves(populations)[0].shape[:2]
    weights = to_matches(jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), populations), groups)
    weights = jax.tree.map(lambda x: shard_batch(x, x.ndim - 1), weights)
    memory = jnp.zeros((config.num_envs, config.hidden, seats * population * groups), jnp.float32)
    return Side(SHAPER, seats, weights, memory)


def seat_learners(key, seats: int, population: int, groups: int, config: Config) -> list[Side]:
    """The side of fresh learners, if any."""
    weights, memory = start_learners(key, config, seats, population, groups) if seats else ((), ())
    return [Side(make_learner(config), seats, weights, memory)] if seats else []


def rows(tree, index):
    """Of every shaper s the members index[s]: leaves (S, P, ...), index (S, P)."""
    return jax.tree.map(lambda x: jax.vmap(lambda x, i: x[i])(x, index), tree)


def make_train(config: Config) -> Train:
    """The evolution of S shapers as pure functions of one seed. Without shapers an update is a trial of learners alone."""
    strategy, es_params = make_evolution(config)
    num_shapers, learners = config.num_shapers, config.num_players - config.num_shapers
    sizes = (config.population_size if num_shapers else 1, config.num_opponents)
    steps = np.float32(np.prod([*sizes, config.num_envs, config.num_episodes, config.num_steps]))

    def init(key):
        key, key_es = jax.random.split(key)
        if not num_shapers:
            return State((), key)
        es = jax.vmap(lambda key: strategy.init(key, zero_policy(config), es_params))(jax.random.split(key_es, num_shapers))
        return State(begin_evolution(jax.tree.map(jnp.asarray, es)), key)

    def update(state: State, t):
        """A generation: member p of every shaper's population plays a trial with each group of fresh learners."""
        key, key_ask, key_pair, key_tell, key_learn, key_trial = jax.random.split(state.key, 6)
        sides, es = seat_learners(key_learn, learners, *sizes, config), state.es
        if num_shapers:
            keys = jax.random.split(key_ask, num_shapers)
            population, es = in_32_bits(jax.vmap(strategy.ask, (0, 0, None))(keys, es, es_params))
            order = pairing(key_pair, config)
            sides = [seat_shapers(rows(population, order), sizes[1], config), *sides]
        reward = play_trial(key_trial, sides, sizes, config).reward.mean((0, 3))  # (N, P)
        if num_shapers:
            fitness = rows(reward[:num_shapers], jnp.argsort(order))
            tell = jax.vmap(strategy.tell, (0, 0, 0, 0, None))
            es, _ = tell(jax.random.split(key_tell, num_shapers), population, -fitness, es, es_params)
            es = jax.tree.map(lambda x, like: x.astype(like.dtype), es, state.es)
        metrics = {"welfare": reward.mean(), "env_steps": (t + 1.0) * steps}
        metrics |= {name: reward[i].mean() for i, name in enumerate(config.names)}
        metrics |= {"sigma": es.std[0], "mean_norm": jnp.sqrt((es.mean**2).sum(-1)).mean()} if num_shapers else {}
        return State(es, key), metrics

    return Train(init, update, partial(evaluate, config), config.num_updates)


def pairing(key, config: Config) -> jax.Array:
    """Which member of each shaper's population plays in which trials, (S, P): the same number, or with --repair a random one."""
    keys = jax.random.split(key, config.num_shapers)
    in_order = jnp.tile(jnp.arange(config.population_size), (config.num_shapers, 1))
    return jax.vmap(jax.random.permutation)(keys, in_order) if config.repair else in_order


# --- evaluation


def evaluate(config: Config, state: State) -> dict:
    """The evolutions' means in whole trials with fresh groups of learners; tit-for-tat, harsh and soft, in the shapers' seats; and
    learners in all seats. Rewards are means per step; `_last` is of the last tenth of the trial. Welfare: the mean of all.
    """
    key_meet, key_alone = jax.random.split(jax.random.fold_in(state.key, 0))
    alone = learners_alone(key_alone, config)
    if not config.num_shapers:
        return of_seats("eval", alone.reward[:, :, 0], config) | through_trial(alone, config)
    together = meet_learners(key_meet, state.params, config)
    results = of_seats("eval", together.reward[:, :, 0], config)
    for i, name in enumerate(("tft_harsh", "tft_soft")):
        results |= of_seats(name, together.reward[:, :, i + 1], config)
    alone_welfare = of_seats("alone", alone.reward[:, :, 0], config)
    results |= {name: alone_welfare[name] for name in ("alone_welfare", "alone_welfare_last")}
    return results | through_trial(together, config)


def kinds(config: Config) -> dict[str, slice]:
    """The seats of each kind of player that there is."""
    seats = {"shapers": slice(0, config.num_shapers), "learners": slice(config.num_shapers, config.num_players)}
    return {kind: where for kind, where in seats.items() if where.stop > where.start}


def of_seats(prefix: str, reward, config: Config) -> dict:
    """The mean rewards of reward (K, N, O) by player and by kind, over the trial and over its last tenth."""
    tenth, results = max(config.num_episodes // 10, 1), {}
    places = {name: slice(i, i + 1) for i, name in enumerate(config.names)} | kinds(config) | {"welfare": slice(None)}
    for name, where in places.items():
        results |= {f"{prefix}_{name}": reward[:, where].mean(), f"{prefix}_{name}_last": reward[-tenth:, where].mean()}
    return results


def through_trial(outcome: Outcome, config: Config) -> dict:
    """Curves over the episodes of the first probe: rewards, welfare, and how often each kind of player was in each state."""
    reward = outcome.reward[:, :, 0].mean(2)  # (K, N)
    results = {f"episodes/{name}": reward[:, i] for i, name in enumerate(config.names)} | {"episodes/welfare": reward.mean(1)}
    states = [f"{action}{number}" for action in "CD" for number in range(config.num_players)]
    for kind, where in kinds(config).items():
        visits = outcome.visits[:, where, :, 0].mean((1, 3))  # (K, 2 N)
        results |= {f"episodes/{kind}_{name}": visits[:, i] for i, name in enumerate(states)}
        results |= {f"visits/{kind}_{name}": visits[:, i].mean() for i, name in enumerate(states)}
    return results


def meet_learners(key, means, config: Config) -> Outcome:
    """Shapers of some evolutions' means (S, D), one a seat, and eval_learners groups of fresh learners -> Outcome with a population
    of three probes, played with the same chance: the shapers, harsh tit-for-tat in their seats, soft tit-for-tat.

    The means may come from several runs: a cross-play of shapers trained apart is means[s] = states[s].params[s].
    """
    weights = jax.vmap(make_evolution(config)[0]._unravel_solution)(means)
    sizes, seats = (3, config.eval_learners), config.num_shapers
    shapers = seat_shapers(jax.tree.map(lambda x: jnp.repeat(x[:, None], 3, axis=1), weights), sizes[1], config)
    probe = np.arange(3).repeat(seats * sizes[1])  # (M,)
    tolerated = np.array((0, *tolerance(config)))[probe]

    def act(weights, memory, obs):
        logits, value, memory = SHAPER.act(weights, memory, obs)
        return jnp.where(probe == 0, logits, tit_for_tat(obs, tolerated)), value, memory

    key_start, key_trial = jax.random.split(key)
    sides = [shapers._replace(player=Player(act, keep))]
    sides += seat_learners(key_start, config.num_players - seats, *sizes, config)
    return play_trial(key_trial, sides, sizes, config, with_visits=True)


def learners_alone(key, config: Config) -> Outcome:
    """Learners in all seats."""
    key_start, key_trial = jax.random.split(key)
    sizes = (1, config.eval_learners)
    sides = seat_learners(key_start, config.num_players, *sizes, config)
    return play_trial(key_trial, sides, sizes, config, with_visits=True)


if __name__ == "__main__":
    run(cli(Config, __doc__, PRESETS), make_train, highlights=("welfare", "eval_shapers"))
