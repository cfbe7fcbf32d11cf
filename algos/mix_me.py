"""Mix-ME, quality-diversity for teams: MAP-Elites that mixes the agents of different teams (Ingvarsson et al., 2311.01829).

Several agents move one robot, each with joints and eyes of its own. A team's fitness is the return of an episode; its descriptor,
the share of the time that each foot touches the ground. An archive keeps the fittest team for each cell of descriptors, and every
update offers it a batch of children of its elites. Mix-ME adds team-crossover: a child takes each of its agents from another elite,
whole. What counts is the QD score, the sum of the elites' fitness: how many ways to move are known, and how good they are.

Run:     python algos/mix_me.py         (--variant naive for the same without crossover; --robot walker, quad, hopper;
                                        the paper's, with the physics extra: --robot ant_4x2, halfcheetah_6x1, ...)

Paper:   --preset paper

Expect:  the cheetah after 25,600 evaluations, 8 seeds: QD score 207,000 ± 7,000, 78 % of the cells filled (naive, which changes one
         agent of a child: 124,000 ± 6,000, 50 %); 1.4 minutes for 4 seeds on two cores. See results/mix_me/

The archive of a run is in arrays/ (genotype, fitness, descriptor, centroids; leading axes: seed, cell); `play(config, teams)` plays
teams (B, policies, parameters) of it again.

Differs from the paper (2311.01829; settings of its code, github.com/gardarjuto/Mix-ME, as no others could be read):
 1. The default robots and their physics are those of envs/planar.py, the paper's robots run in MJX: envs/locomotion.py (Brax v1).
 2. Episodes begin in one and the same pose (in one of batch_size random ones, always the same for each place of a batch); how
    the elites do from others is measured at evaluations, as the corrected scores.
 3. Random choices are drawn anew for every child (Python's random numbers, once when the program is traced).
 4. Polynomial mutation changes each number with a probability (a fixed share of each layer's).
 5. `--emitter cma_me` (2002.02400's improvement emitter, on evosax's separable CMA-ES: a full covariance of whole teams has
    10^8 entries) and `--emitter iso_line` are not in the paper.
"""

import importlib.util
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common.archive import (
    Archive,
    coverage,
    cvt_centroids,
    filled,
    grid_cell,
    grid_centroids,
    improvement_rank,
    init_archive,
    insert,
    max_fitness,
    nearest,
    qd_score,
    sample_filled,
)
from common.env import begin_evolution, in_32_bits, select
from common.runs import RunConfig, Train, cli, require, require_multiple, require_range, run, shard_batch
from envs.locomotion import TASKS, Locomotion
from envs.planar import Planar, PlanarParams


@dataclass(frozen=True)
class Config(RunConfig):
    """Mix-ME's settings; the defaults are those of the authors' code."""

    may_grow = ("num_updates",)
    num_updates: int = 1000
    """Generations per seed: each plays a batch of teams and offers them to the archive. The first one's are random."""
    robot: Literal[
        "cheetah", "walker", "hopper", "quad", "halfcheetah_6x1", "walker2d_2x3", "hopper_3x1", "ant_4x2", "humanoid_9|8"
    ] = "cheetah"
    """Six agents with one joint each, two with three, three with one, four with two (envs/planar.py); the others, the paper's, have
    their agents and joints in their names and need the physics extra (envs/locomotion.py)."""
    obs_distance: int = 1
    """How far an agent sees along the robot's joints; -1 for all of it."""
    variant: Literal["mix_me", "shared_pool", "naive", "parameter_sharing", "single_agent"] = "mix_me"
    """mix_me: a policy for each agent, crossover keeps roles. shared_pool: crossover gives a slot any agent's policy.
    naive: no crossover. parameter_sharing: one policy for all agents. single_agent: one agent sees and moves everything."""
    emitter: Literal["mixing", "iso_line", "cma_me"] = "mixing"
    """mixing: the paper's operators. iso_line: no polynomial mutation. cma_me: CMA-ME, without crossover."""
    homogenisation: Literal["concat", "max"] = "concat"
    """What one policy for several slots sees: concat, the whole robot with what the agent cannot see zeroed; max, the agent's
    own view and its number."""
    batch_size: int = 16
    """Teams played in each generation."""
    episode_length: int = 300
    """Steps of an episode, 0.05 s each."""
    hidden: int = 64
    """Width of the policies' two hidden layers."""

    archive: Literal["cvt", "grid"] = "cvt"
    """Cells: a centroidal Voronoi tessellation, or a grid."""
    num_cells: int = 1024
    """Cells of the archive (of a grid: at most so many)."""
    cvt_samples: int = 50_000
    """Points whose k-means make the tessellation."""
    cvt_iterations: int = 20
    """Lloyd's iterations."""

    variation_percentage: float = 0.3
    """Share of a batch from iso+line variation."""
    crossplay_percentage: float = 0.3
    """Share of a batch from team-crossover (mix_me and shared_pool). The rest is polynomial mutation."""
    k_mutations: int = 1
    """Agents that crossover replaces in each child; with naive, those that variation and mutation change. 0 for all."""
    iso_sigma: float = 0.005
    """Standard deviation of the noise on each parameter."""
    line_sigma: float = 0.05
    """Standard deviation of the step along the line between two parents."""
    eta: float = 10.0
    """Polynomial mutation: the larger, the smaller the steps."""
    mutation_bound: float = 0.5
    """Polynomial mutation keeps parameters within +- this."""
    proportion_to_mutate: float = 0.1
    """Polynomial mutation: share of parameters changed."""
    num_emitters: int = 4
    """CMA-ME: evolution strategies that share the batch."""
    cma_sigma: float = 0.05
    """CMA-ME: standard deviation at a restart."""

    def __post_init__(self):
        super().__post_init__()
        counts = "batch_size episode_length hidden num_cells cvt_samples cvt_iterations num_emitters"
        for name in counts.split():
            require(getattr(self, name) >= 1, f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        if self.robot in TASKS:
            found = importlib.util.find_spec("mujoco") and importlib.util.find_spec("mujoco.mjx")
            require(bool(found), f"--robot {self.robot}: needs MuJoCo's MJX, pip install -e '.[physics]'")
        require(self.obs_distance >= -1, f"--obs-distance {self.obs_distance}: must be at least -1")
        require(self.k_mutations >= 0, f"--k-mutations {self.k_mutations}: must not be negative")
        require_range(self, 0, 1, "variation_percentage", "crossplay_percentage", "proportion_to_mutate")
        shares = self.variation_percentage + self.crossplay_percentage
        require(shares <= 1, f"--variation-percentage and --crossplay-percentage: {shares:g} together, must be at most 1")
        require_range(self, 0, 1000, "iso_sigma", "line_sigma", "eta")
        for name in ("mutation_bound", "cma_sigma"):
            require(getattr(self, name) > 0, f"--{name.replace('_', '-')} {getattr(self, name)}: must be positive")
        require(
            self.cvt_samples >= self.num_cells, f"--cvt-samples {self.cvt_samples}: must be at least --num-cells {self.num_cells}"
        )
        if self.emitter == "cma_me":
            require_multiple(self, "batch_size", "num_emitters")
            each = self.batch_size // self.num_emitters
            require(each >= 4, f"--num-emitters {self.num_emitters}: leaves {each} teams for each, must be at least 4")

    @property
    def split_size(self) -> int:
        return self.batch_size


PAPER = Config(log_every=20, eval_every=200, save_every=200, preset="paper")
CPU = replace(
    PAPER, preset="cpu", num_seeds=4, num_updates=400, log_every=10, eval_every=100, save_every=100,
    batch_size=128, episode_length=100, hidden=32,
)  # fmt: skip


class State(NamedTuple):
    """All of one seed's run."""

    archive: Archive  # genotype (N, policies, parameters)
    centroids: jax.Array  # (N, D), the same for all seeds
    emitter: Any  # CMA-ME's strategies, leading axis num_emitters; else ()
    key: jax.Array


# --- teams: a genotype (policies, parameters) is each policy's weights in one vector


class Team(NamedTuple):
    """How a variant's policies and its robot go together."""

    env: Planar | Locomotion
    num_policies: int
    sizes: tuple[int, ...]  # of the layers
    observe: Any  # state (..., B) -> (agents, sizes[0], B)
    outputs: np.ndarray  # (agents, joints of each): which of a policy's outputs move the agent's joints

    @property
    def num_parameters(self) -> int:
        return sum((n_in + 1) * n_out for n_in, n_out in zip(self.sizes, self.sizes[1:], strict=False))


def make_team(config: Config) -> Team:
    """The robot shared out as the variant wants it."""
    world = Locomotion if config.robot in TASKS else Planar
    env = world(config.robot, config.obs_distance, single=config.variant == "single_agent")
    alike = config.variant in ("parameter_sharing", "shared_pool")
    num_policies = 1 if config.variant == "parameter_sharing" else env.num_agents
    size_in, size_out, observe = env.obs_size, env.num_actions, env.get_obs
    outputs = np.tile(np.arange(env.num_actions), (env.num_agents, 1))
    if alike and config.homogenisation == "concat":
        seen = np.array([[f in features for f in range(env.num_features)] for features in env.features], np.float32)
        size_in, size_out = env.num_features, env.num_joints
        observe = lambda state: env.all_features(state) * seen[..., None]
        outputs = env.own_joints
    elif alike:
        size_in += env.num_agents
        number = np.eye(env.num_agents, dtype=np.float32)[..., None]

        def observe(state):
            obs = env.get_obs(state)
            return jnp.concatenate([jnp.broadcast_to(number, (*number.shape[:2], obs.shape[-1])), obs], axis=1)

    return Team(env, num_policies, (size_in, config.hidden, config.hidden, size_out), observe, outputs)


def init_teams(key, team: Team, num: int) -> jax.Array:
    """Random teams (num, policies, parameters): uniform weights of variance 1 / n_in, zero biases."""
    keys, parts = jax.random.split(key, len(team.sizes)), []
    for key, n_in, n_out in zip(keys, team.sizes, team.sizes[1:], strict=False):
        shape = (num, team.num_policies, n_in * n_out)
        weights = jax.random.uniform(key, shape, jnp.float32, minval=-1) * (3 / n_in) ** 0.5
        parts += [weights, jnp.zeros((*shape[:2], n_out), jnp.float32)]
    return jnp.concatenate(parts, axis=-1)


def layers(teams, sizes) -> list:
    """Weights (B, policies, n_in, n_out) and biases (B, policies, 1, n_out) of every layer."""
    parts, at = [], 0
    for n_in, n_out in zip(sizes, sizes[1:], strict=False):
        w = teams[..., at : at + n_in * n_out].reshape(*teams.shape[:2], n_in, n_out)
        parts.append((w, teams[..., None, at + n_in * n_out : at + (n_in + 1) * n_out]))
        at += (n_in + 1) * n_out
    return parts


def act(parts, obs, team: Team) -> jax.Array:
    """obs (agents, n_in, B) -> actions (agents, joints of each, B): ReLU, ReLU, tanh."""
    num_agents, _, num = obs.shape
    x = obs.transpose(2, 0, 1).reshape(num, team.num_policies, num_agents // team.num_policies, -1)
    for i, (w, b) in enumerate(parts):
        x = jnp.einsum("bpki,bpio->bpko", x, w) + b
        x = jax.nn.relu(x) if i + 1 < len(parts) else jnp.tanh(x)
    x = x.reshape(num, num_agents, -1).transpose(1, 2, 0)
    return jnp.stack([x[i][outputs] for i, outputs in enumerate(team.outputs)])


class Episode(NamedTuple):
    """What one episode of each of B teams came to."""

    fitness: jax.Array  # (B,): the sum of rewards
    descriptor: jax.Array  # (B, feet): the share of steps in which each foot touched the ground
    record: Any  # the states of the teams that were to be recorded, after every step: (T, ..., K)


def play(config: Config, teams, key=None, params: PlanarParams | None = None, recorded=()) -> Episode:
    """One episode of each team (B, policies, parameters), from the same start, or with a `key` from starts with noise.

    After a fall nothing counts. `recorded` (K,): teams whose states are kept.
    """
    team, num = make_team(config), teams.shape[0]
    env, parts = team.env, layers(teams, team.sizes)
    params = params or PlanarParams(reset_noise=0.0 if key is None else 0.05)
    keys = jax.random.split(jax.random.key(0) if key is None else key, num)
    _, state = jax.vmap(env.reset_env, (0, None), -1)(keys, params)
    state = jax.tree.map(lambda x: shard_batch(x, x.ndim - 1), state)

    def step(carry, _):
        state, going_on, total, contact, steps = carry
        _, state, reward, fallen, info = env.step_env(None, state, act(parts, team.observe(state), team), params)
        total = total + jnp.where(going_on, reward, 0.0)
        contact = contact + (info["contact"] & going_on)
        record = jax.tree.map(lambda x: x[..., jnp.asarray(recorded, jnp.int32)], state)
        return (state, going_on & ~fallen, total, contact, steps + going_on), record

    zeros = jnp.zeros(num, jnp.float32)
    carry = (state, jnp.ones(num, bool), zeros, jnp.zeros((env.num_feet, num), jnp.float32), zeros)
    (_, _, total, contact, steps), record = jax.lax.scan(step, carry, length=config.episode_length)
    return Episode(total, (contact / steps).T, record)


# --- cells


def grid_shape(config: Config, num_descriptors: int) -> tuple[int, ...]:
    """The finest grid with equally many intervals in every dimension and at most num_cells cells."""
    return (int(config.num_cells ** (1 / num_descriptors) + 1e-6),) * num_descriptors


def make_centroids(config: Config, num_descriptors: int) -> jax.Array:
    """The archive's cells (N, D); a tessellation is the same for all seeds."""
    if config.archive == "grid":
        return grid_centroids(grid_shape(config, num_descriptors))
    return cvt_centroids(jax.random.key(0), config.num_cells, num_descriptors, config.cvt_samples, config.cvt_iterations)


def cells_of(config: Config, centroids, descriptor) -> jax.Array:
    """The cell (B,) of each descriptor (B, D)."""
    if config.archive == "grid":
        return grid_cell(descriptor, grid_shape(config, descriptor.shape[1]))
    return nearest(descriptor, centroids)


# --- variation operators: parents and children (B, policies, parameters)


def iso_line(key, x1, x2, iso_sigma: float, line_sigma: float) -> jax.Array:
    """x1 + iso_sigma N(0, I) + line_sigma N(0, 1) (x2 - x1), one step along the line for a whole team (1804.03906)."""
    key_iso, key_line = jax.random.split(key)
    step = line_sigma * jax.random.normal(key_line, (x1.shape[0], 1, 1), jnp.float32)
    return x1 + iso_sigma * jax.random.normal(key_iso, x1.shape, jnp.float32) + step * (x2 - x1)


def polynomial(key, x, eta: float, bound: float, proportion: float) -> jax.Array:
    """Polynomial mutation (Deb and Goyal, 1996) of a share of all numbers, which are then within +-bound."""
    key_which, key_how = jax.random.split(key)
    u, power = jax.random.uniform(key_how, x.shape, jnp.float32), 1 / (eta + 1)
    x = jnp.clip(x, -bound, bound)
    to_low, to_high = (x + bound) / (2 * bound), (bound - x) / (2 * bound)
    down = (2 * u + (1 - 2 * u) * (1 - to_low) ** (eta + 1)) ** power - 1
    up = 1 - (2 * (1 - u) + (2 * u - 1) * (1 - to_high) ** (eta + 1)) ** power
    mutated = x + 2 * bound * jnp.where(u < 0.5, down, up)
    chosen = jax.random.uniform(key_which, x.shape, jnp.float32) < proportion
    return jnp.clip(jnp.where(chosen, mutated, x), -bound, bound)


def some_agents(key, shape: tuple[int, int], k: int) -> jax.Array:
    """k agents of each team, at random, (B, policies, 1) bool; all where k is 0."""
    if not 0 < k < shape[1]:
        return jnp.ones((*shape, 1), bool)
    order = jax.random.uniform(key, shape, jnp.float32)
    return ((order[..., None] > order[:, None]).sum(-1) < k)[..., None]


def team_crossover(key, archive: Archive, num: int, k: int, keep_roles: bool) -> jax.Array:
    """Mix-ME's operator: each agent (k of them) is taken, whole, from an elite drawn for it alone.

    With `keep_roles` slot i takes that elite's agent i, else any of its agents.
    """
    key_base, key_team, key_slot, key_some = jax.random.split(key, 4)
    shape = (num, archive.genotype.shape[1])
    slot = jnp.arange(shape[1]) if keep_roles else jax.random.randint(key_slot, shape, 0, shape[1], jnp.int32)
    donors = archive.genotype[sample_filled(key_team, archive, shape), slot]
    base = archive.genotype[sample_filled(key_base, archive, (num,))] if 0 < k < shape[1] else donors
    return jnp.where(some_agents(key_some, shape, k), donors, base)


def shares(config: Config) -> tuple[int, int, int]:
    """How many children of a batch come from iso+line, from polynomial mutation and from crossover."""
    crossed = int(config.batch_size * config.crossplay_percentage) if config.variant in ("mix_me", "shared_pool") else 0
    varied = int(config.batch_size * config.variation_percentage)
    if config.emitter == "iso_line":
        varied = config.batch_size - crossed
    return varied, config.batch_size - crossed - varied, crossed


def emit(key, archive: Archive, config: Config) -> jax.Array:
    """A batch of children: iso+line, polynomial mutation, crossover, in this order."""
    keys = jax.random.split(key, 7)
    varied, mutated, crossed = shares(config)
    x1, x2, x3 = (archive.genotype[sample_filled(keys[i], archive, (num,))] for i, num in enumerate((varied, varied, mutated)))
    children = jnp.concatenate([
        iso_line(keys[3], x1, x2, config.iso_sigma, config.line_sigma),
        polynomial(keys[4], x3, config.eta, config.mutation_bound, config.proportion_to_mutate),
    ])  # fmt: skip
    if config.variant == "naive":
        chosen = some_agents(keys[5], children.shape[:2], config.k_mutations)
        children = jnp.where(chosen, children, jnp.concatenate([x1, x3]))
    if not crossed:
        return children
    return jnp.concatenate([children, team_crossover(keys[6], archive, crossed, config.k_mutations, config.variant == "mix_me")])


# --- CMA-ME (2002.02400): evolution strategies that climb towards improvements of the archive


class CmaMe(NamedTuple):
    """evosax's separable CMA-ES, and its settings."""

    strategy: Any
    params: Any


def make_cma_me(config: Config, team: Team) -> CmaMe:
    from evosax.algorithms import Sep_CMA_ES  # on use only: it starts the backend when it is imported

    each = config.batch_size // config.num_emitters
    strategy = Sep_CMA_ES(population_size=each, solution=jnp.zeros((team.num_policies, team.num_parameters), jnp.float32))
    return CmaMe(strategy, strategy.default_params.replace(std_init=config.cma_sigma))


def restart(key, cma: CmaMe, archive: Archive, config: Config):
    """All emitters anew, each about an elite drawn at random."""
    key_elite, key_init = jax.random.split(key)
    means = archive.genotype[sample_filled(key_elite, archive, (config.num_emitters,))]
    init = jax.vmap(cma.strategy.init, (0, 0, None))
    state = init(jax.random.split(key_init, config.num_emitters), means, cma.params)
    return begin_evolution(state)


def ask(key, cma: CmaMe, state, config: Config):
    """-> the batch of children, emitter by emitter, and the state to tell of them."""
    keys = jax.random.split(key, config.num_emitters)
    children, state = in_32_bits(jax.vmap(cma.strategy.ask, (0, 0, None))(keys, state, cma.params))
    return children.reshape(config.batch_size, *children.shape[2:]), state


def tell(key, cma: CmaMe, state, children, rank, taken, archive: Archive, config: Config):
    """Every emitter learns from the ranks of its children; one of which the archive took none begins anew."""
    key_tell, key_restart = jax.random.split(key)
    split = lambda x: x.reshape(config.num_emitters, -1, *x.shape[1:])
    keys = jax.random.split(key_tell, config.num_emitters)
    state, _ = jax.vmap(cma.strategy.tell, (0, 0, 0, 0, None))(keys, split(children), split(rank), state, cma.params)
    state = jax.vmap(select)(split(taken).any(1), state, restart(key_restart, cma, archive, config))
    return in_32_bits(state)


# --- training


def make_train(config: Config) -> Train:
    """Mix-ME as pure functions of one seed."""
    team, num = make_team(config), config.batch_size
    genotype = jax.ShapeDtypeStruct((team.num_policies, team.num_parameters), jnp.float32)
    cma = make_cma_me(config, team) if config.emitter == "cma_me" else None

    def init(key):
        centroids = make_centroids(config, team.env.num_feet)
        archive = init_archive(genotype, *centroids.shape)
        return State(archive, centroids, restart(key, cma, archive, config) if cma else (), key)

    def update(state: State, t):
        """One generation of MAP-Elites (1504.04909)."""
        key, key_emit, key_tell = jax.random.split(state.key, 3)
        children, emitter = ask(key_emit, cma, state.emitter, config) if cma else (emit(key_emit, state.archive, config), ())
        children = shard_batch(jax.lax.cond(t == 0, lambda: init_teams(key_emit, team, num), lambda: children))
        episode = play(config, children)
        cell = cells_of(config, state.centroids, episode.descriptor)
        held = state.archive.fitness[cell]
        archive, taken = insert(state.archive, children, episode.fitness, episode.descriptor, cell)
        if cma:
            rank = improvement_rank(episode.fitness, held)
            emitter = tell(key_tell, cma, emitter, children, rank, taken & (t > 0), archive, config)
        state = State(archive, state.centroids, emitter, key)
        return state, scores(config, archive) | describe(config, episode, taken, t)

    return Train(init, update, partial(evaluate, config), config.num_updates)


def scores(config: Config, archive: Archive) -> dict:
    """The metrics of an archive. The QD score's offset a step is the robot's, so that no elite counts less than nothing."""
    offset = make_team(config).env.robot.offset * config.episode_length
    best = max_fitness(archive)
    return {
        "qd_score": qd_score(archive, offset),
        "coverage": coverage(archive),
        "max_fitness": jnp.where(jnp.isfinite(best), best, jnp.nan),
    }


def describe(config: Config, episode: Episode, taken, t) -> dict:
    """Metrics of a generation: the share of children taken, of all and of each operator (NaN where there is none)."""
    varied, mutated, _ = shares(config)
    parts = jnp.split(taken, [varied, varied + mutated])
    named = zip(("iso_line", "polynomial", "crossover"), parts, strict=True) if config.emitter != "cma_me" else ()
    return {
        "children_fitness": episode.fitness.mean(),
        "taken": taken.mean(),
        **{f"taken_{name}": jnp.where(t > 0, x.mean(), jnp.nan) for name, x in named if x.size},
        "evaluations": (t + 1) * config.batch_size,
        "env_steps": (t + 1) * config.batch_size * config.episode_length,
    }


# --- evaluation


def evaluate(config: Config, state: State) -> dict:
    """The archive's scores, and its scores when every elite plays again from another start; a picture, a film, the archive."""
    archive, env = state.archive, make_team(config).env
    shown = corner_elites(archive)
    episode = play(config, archive.genotype, jax.random.fold_in(state.key, 0), recorded=shown)
    cell = cells_of(config, state.centroids, episode.descriptor)
    fitness = jnp.where(filled(archive), episode.fitness, -jnp.inf)
    empty = init_archive(jax.ShapeDtypeStruct((), jnp.float32), *state.centroids.shape)
    again, _ = insert(empty, fitness, fitness, episode.descriptor, cell)
    corrected = {f"corrected_{name}": x for name, x in scores(config, again).items()}
    frames = film(env, episode.record)
    return scores(config, archive) | corrected | {
        "elites": frames[::2],
        "archive": picture(config, state, frames),
        **archive._asdict(),
        "fitness": archive.fitness[:, None],  # a column: figures/ draws what has one axis as a curve
        "centroids": state.centroids,
    }  # fmt: skip


def corner_elites(archive: Archive) -> jax.Array:
    """The elites nearest to four corners of the descriptors' cube (4,): the first half of the feet never or always on the ground,
    and so the second half. With one foot, four places along its line."""
    num = archive.descriptor.shape[1]
    corners = np.repeat([[0, 0], [1, 0], [0, 1], [1, 1]], num // 2, axis=1) if num > 1 else np.arange(4)[:, None] / 3
    distance = ((archive.descriptor[:, None] - corners) ** 2).sum(-1)
    return jnp.where(filled(archive)[:, None], distance, jnp.inf).argmin(0)


def film(env, record) -> jax.Array:
    """States (T, ..., 4) drawn two by two: (T, H, W, 3) uint8."""
    images = jax.lax.map(jax.vmap(env.render, -1), record)  # (T, 4, h, w, 3)
    rows = [jnp.concatenate([images[:, i], images[:, i + 1]], axis=2) for i in (0, 2)]
    return jnp.concatenate(rows, axis=1)


PALETTE = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], np.float32)


def picture(config: Config, state: State, frames) -> jax.Array:
    """The archive's map, the brighter the fitter, empty cells grey, beside two moments of the film: (144, 720, 3) uint8.

    Two descriptors: the first to the right, the second up. Four: a map of maps, the third and fourth within each of its tiles.
    """
    num, size = state.centroids.shape[1], 144
    right, up = jnp.meshgrid((jnp.arange(size) + 0.5) / size, (size - jnp.arange(size) - 0.5) / size)
    tile = lambda x: (jnp.floor(12 * x) + 0.5) / 12
    axes = [right] if num == 1 else [right, up] if num == 2 else [tile(right), tile(up), 12 * right % 1, 12 * up % 1]
    cell = cells_of(config, state.centroids, jnp.stack([x.reshape(-1) for x in axes], axis=1))
    known = filled(state.archive)
    low = jnp.where(known, state.archive.fitness, jnp.inf).min()
    share = (state.archive.fitness - low) / jnp.maximum(state.archive.fitness.max() - low, 1e-6)
    place = jnp.clip(jnp.where(known, share, 0.0), 0, 1) * (len(PALETTE) - 1)
    colours = jnp.stack([jnp.interp(place, np.arange(len(PALETTE)), PALETTE[:, i]) for i in range(3)], axis=1)
    colours = jnp.where(known[:, None], colours, 200.0)
    chart = colours[cell].reshape(size, size, 3).astype(jnp.uint8)
    moments = frames[jnp.array([config.episode_length // 4, config.episode_length // 2])]
    return jnp.concatenate([chart, *moments], axis=1)


if __name__ == "__main__":
    run(cli(Config, __doc__, {"cpu": CPU, "paper": PAPER}), make_train, highlights=("qd_score", "coverage"))
