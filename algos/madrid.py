"""MADRID: where does a football team play worse than it could? (Samvelyan et al., 2401.13460)

The target team is frozen. For each of several reference teams, MAP-Elites looks for scenarios (where 20 players and the ball stand)
in which the reference does better against the target than the target does against itself: the regret, cross-play minus self-play.
The archive has a cell for each place of the ball and each reference. An elite is the best of many noisy estimates, so its estimate
flatters it (winner's curse): challenged elites are played again, and at evaluations all elites are, with fresh luck.

Run:     python algos/madrid.py                   (the target: the last team of the shipped league, against its earlier selves and
                                                  the hard bot; --league runs/tizero/1/league.npz for another)
         python algos/madrid.py --league none --target hard --references easy medium sound --flaw never_shoots
         python algos/madrid.py --resume --num-updates 120      (a finished search goes on)

Paper:   --preset paper

Expect:  elites whose regret with fresh luck (regret_again) is a little above 0, that of `random` clearly below 0, targeted search
         near MADRID. Regret, the archive's own estimate, is several times that: most of it is luck

A run leaves arrays/ (levels, regret, regret_again; leading axes: seed, reference, cell), pictures of the regret over the pitch, a
column a reference in the order given (the archive's estimates above, with fresh luck below), of where elites' players stand, of
the worst scenarios, and a film of the two worst: cross-play on the left, self-play on the right.

Differs from the paper (2401.13460; its code is not public):
 1. World, target and league are envs/football.py's and algos/tizero.py's, bots envs/football_bots.py's.
 2. Cells: 20 x 8 places of the ball (160 uniform ones, shape not stated), in the cpu preset 10 x 4.
 3. In the cpu preset 16 repeats, not 4, and duels: a child that beats an elite and that elite both play again; the child's new
    matches and all of the elite's decide. `--preset paper` has 4 repeats and no duels.
 4. Emitters: Algorithm 3's Gaussian in the cpu preset; in `--preset paper`, or with `--emitter cma`, CMA-ME as in the paper's
    experiments, but on evosax's separable CMA-ES (a full covariance needs LAPACK in a batched loop, which can hang on CPU), and
    ranked by improvement, children in new cells first.
 5. `--method random` keeps the newest level of each cell whatever its regret, so that it is averaged over the same cells.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common.archive import Archive, filled, grid_cell, improvement_rank, init_archive, insert, sample_filled
from common.env import begin_evolution, in_32_bits, select
from common.runs import RunConfig, Train, cli, if_needed, require, require_multiple, run, shard_batch
from envs.football import Football, FootballParams
from envs.football_bots import BOTS, Bot, bot_actions, bot_of, pair
from envs.football_state import HALF_LENGTH, HIGH, LEVEL_SIZE, LONG, SHORT, SHOT, SIDE, STOP, FootballState
from envs.football_team import Team, load_league, match_actions, team_actions

OFFSET = 2.0  # of the QD score: regret is at least -2


@dataclass(frozen=True)
class Config(RunConfig):
    """MADRID's settings; the defaults are the paper's."""

    may_grow, paths = ("num_updates",), ("league",)
    num_updates: int = 5000
    """Iterations: each plays `candidates` levels for every reference."""
    method: Literal["madrid", "targeted", "random"] = "madrid"
    """madrid: children of elites. targeted: the same archive, levels drawn from scratch. random: levels drawn, nothing selected."""
    emitter: Literal["gaussian", "cma"] = "gaussian"
    """How children are made: noise on elites, or CMA-ME."""
    league: str = "shipped"
    """File of a league made by algos/tizero.py; `shipped` for this repository's; `none` for bots alone."""
    target: str = "last"
    """The team under test: the league's last, or a bot's name."""
    references: tuple[str, ...] = ("league", "easy", "medium", "hard")
    """league: its checkpoints before the last. sound: the target itself, without the flaw. Or bots' names."""
    num_checkpoints: int = 48
    """At most so many of the league's checkpoints, evenly spaced."""
    flaw: Literal["none", "never_shoots", "never_passes", "frozen", "ignores_loose_ball"] = "none"
    """A weakness planted in the target's actions. frozen: with the ball in its own third it stands still."""

    grid: tuple[int, int] = (20, 8)
    """Cells along and across the pitch, by where the ball is."""
    candidates: int = 60
    """Levels for each reference in an iteration."""
    repeats: int = 4
    """Matches of each level, in cross-play and in self-play."""
    duels: int = 0
    """Children at most, for each reference, that play again together with the elites they beat; other such children are dropped.
    0: whoever beats an elite replaces it."""
    horizon: int = 128
    """Steps of a match, 0.1 s each; the first goal decides it."""
    sigma: float = 0.1
    """Standard deviation of mutations, and of CMA-ME's emitters at a restart, in units of a level."""
    num_emitters: int = 4
    """CMA-ME: evolution strategies for each reference, which share the candidates."""
    final_repeats: int = 32
    """Fresh matches of each elite at evaluations."""
    chunk: int = 256
    """Matches side by side."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("candidates", "repeats", "horizon", "num_emitters", "final_repeats", "chunk", "num_checkpoints"):
            require(getattr(self, name) >= 1, f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        for name, count in zip(("along", "across"), self.grid, strict=True):
            require(1 <= count <= 1000, f"--grid: {count} cells {name} the pitch; must be between 1 and 1000")
        require(0 <= self.duels <= self.candidates, f"--duels {self.duels}: must lie between 0 and --candidates {self.candidates}")
        require(self.sigma > 0, f"--sigma {self.sigma}: must be positive")
        least = max(self.repeats, self.final_repeats)
        require(self.chunk >= least, f"--chunk {self.chunk}: must be at least the repeats of a level, {least}")
        require(self.target in ("last", *BOTS), f"--target {self.target!r}: must be last or one of {', '.join(BOTS)}")
        require(self.league != "none" or self.target != "last", "--league none: --target must be a bot's name")
        require(len(self.references) > 0, "--references: at least one is needed")
        for name in self.references:
            known = ("league", "sound", *BOTS)
            require(name in known, f"--references {name!r}: must be one of {', '.join(known)}")
            require(name != "league" or self.league != "none", "--references league: needs --league")
        if self.emitter == "cma":
            require(self.method == "madrid", f"--emitter cma: goes with --method madrid, not {self.method}")
            require_multiple(self, "candidates", "num_emitters")
            each = self.candidates // self.num_emitters
            require(each >= 4, f"--num-emitters {self.num_emitters}: leaves {each} candidates for each, must be at least 4")

    @property
    def num_cells(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def split_size(self) -> int:
        return 2 if self.repeats % 2 == self.final_repeats % 2 == 0 else 1


PAPER = Config(emitter="cma", log_every=50, eval_every=1000, save_every=500, preset="paper")
CPU = replace(
    PAPER, preset="cpu", num_seeds=2, num_updates=60, log_every=1, eval_every=30, save_every=10,
    emitter="gaussian", grid=(10, 4), candidates=16, repeats=16, duels=8, final_repeats=64, num_checkpoints=4,
    references=("league", "hard"),
)  # fmt: skip


class Elite(NamedTuple):
    """A scenario and how its matches went. Shares of the matches that the left team, and the right, decided by the first goal."""

    level: jax.Array  # (42,)
    xp: jax.Array  # (2,) cross-play: the reference on the left, the target on the right
    sp: jax.Array  # (2,) self-play: the target on both sides
    plays: jax.Array  # () matches of each


class State(NamedTuple):
    """All of one seed's run."""

    archive: Archive  # leading axes (references, cells); genotype: Elite
    emitter: Any  # CMA-ME's strategies, leading axes (references, emitters); else ()
    key: jax.Array


# --- who plays


class Players(NamedTuple):
    """The references, then the target."""

    names: list[str]
    teams: Team | None  # (K, ...)
    bots: Bot  # fields (L,)
    is_bot: np.ndarray  # (M + 1,) bool
    place: np.ndarray  # (M + 1,): of each among the teams or the bots


def make_players(config: Config) -> Players:
    """Reads the league. Raises UsageError where it does not have what is asked for."""
    teams, names = load_league(None if config.league == "shipped" else config.league) if config.league != "none" else (None, [])
    wanted = []
    if "league" in config.references:
        require(len(names) >= 2, f"--league {config.league}: has one team, and no earlier ones")
        kept = np.unique(np.linspace(0, len(names) - 2, min(config.num_checkpoints, len(names) - 1)).round().astype(int))
        wanted = [names[i] for i in kept]
    target = names[-1] if config.target == "last" else config.target
    wanted += [target if name == "sound" else name for name in config.references if name != "league"] + [target]
    is_bot = np.array([name in BOTS for name in wanted])
    listed = [name for name in wanted if name in BOTS] or ["hard"]
    bots = Bot(*(np.float32(x) for x in zip(*(bot_of(name) for name in listed), strict=True)))
    place = np.where(is_bot, np.cumsum(is_bot) - 1, [names.index(name) if name in names else 0 for name in wanted])
    return Players(wanted, teams, bots, is_bot, place)


def player(players: Players, who: int | jax.Array, bot: bool):
    """One of the bots, or of the teams."""
    return jax.tree.map(lambda x: jnp.asarray(x)[who], players.bots if bot else players.teams)


class Either(NamedTuple):
    """A player whose kind is known only when it runs."""

    is_bot: jax.Array  # () bool
    bot: Bot
    team: Team


def side_actions(key, side: Bot | Team, state: FootballState, team: int) -> jax.Array:
    """Actions (10, B) of one side."""
    if isinstance(side, Team):
        return team_actions(key, side, state, team)
    both = (side, BOTS["hard"]) if team == 0 else (BOTS["hard"], side)
    return jnp.split(bot_actions(key, state, pair(*both)), 2)[team]


def chosen_actions(key, left: Bot | Team | Either, right: Bot | Team, state: FootballState):
    """Actions (10, B) of the left side and of the right."""
    if isinstance(left, Either):
        key, key_bot = jax.random.split(key)
        by_team, theirs = chosen_actions(key, left.team, right, state)
        by_bot = partial(side_actions, key_bot, left.bot, state, 0)
        return jax.lax.cond(left.is_bot, by_bot, lambda: by_team), theirs
    if isinstance(left, Bot) and isinstance(right, Bot):
        return jnp.split(bot_actions(key, state, pair(left, right)), 2)
    if isinstance(left, Team) and isinstance(right, Team):
        return jnp.split(match_actions(key, left, right, state), 2)
    key_left, key_right = jax.random.split(key)
    return side_actions(key_left, left, state, 0), side_actions(key_right, right, state, 1)


def acts(key, sides, flaw: str, flawed, state: FootballState) -> jax.Array:
    """Actions (20, B) of two sides; those of a side that is `flawed` with a flaw."""
    chosen = chosen_actions(key, *sides, state)
    if flaw != "none":
        chosen = [jnp.where(flawed[i], with_flaw(flaw, state, action, i), action) for i, action in enumerate(chosen)]
    return jnp.concatenate(chosen)


def with_flaw(flaw: str, state: FootballState, action, team: int) -> jax.Array:
    """A team's actions (10, ...) with a weakness."""
    if flaw == "never_shoots":
        return jnp.where(action == SHOT, 0, action)
    if flaw == "never_passes":
        return jnp.where((action == LONG) | (action == HIGH) | (action == SHORT), 0, action)
    if flaw == "frozen":
        in_own_third = SIDE[team, 0] * state.x[team, 1:] < -HALF_LENGTH / 3
        return jnp.where(state.owner[team, 1:] & in_own_third, STOP, action)
    if flaw == "ignores_loose_ball":
        return jnp.where(state.owner.any((0, 1)), action, STOP)
    return action


# --- matches


def play(key, config: Config, sides, flawed, level, record: bool = False):
    """Matches from levels (42, B) -> who scored first (2, B) float32, and the states (T, ..., B) if they are kept.

    flawed: of each side, whether it has the config's flaw.
    """
    env = Football(max_steps_in_episode=config.horizon)
    params = FootballParams(jnp.stack([skill_of(side) for side in sides]), config.horizon)
    state = jax.tree.map(lambda x: shard_batch(x, x.ndim - 1), env.reset_to_level(level))

    def step(carry, key):
        state, first = carry
        key_act, key_step = jax.random.split(key)
        actions = acts(key_act, sides, config.flaw, flawed, state)
        _, state, _, _, info = env.step_env(key_step, state, actions, params)
        first = jnp.where(first.any(0), first, info["goal"])
        return (state, first), state if record else ()

    first = jnp.zeros((2, level.shape[1]), bool)
    (_, first), states = jax.lax.scan(step, (state, first), jax.random.split(key, config.horizon))
    return first.astype(jnp.float32), states


def skill_of(side: Bot | Team | Either) -> jax.Array:
    """What FootballParams.skill should be for it."""
    if isinstance(side, Either):
        return jnp.where(side.is_bot, side.bot.skill, 1.0)
    return jnp.float32(side.skill if isinstance(side, Bot) else 1.0)


def play_jobs(key, config: Config, players: Players, left: np.ndarray, levels, record: bool = False):
    """Job j: levels[j] (42, B) between player left[j] and the target -> (jobs, 2, B), states (jobs, T, ..., B).

    Jobs run one after another in one loop: it is compiled once, and a match's width stays in the processor's cache.
    """
    target = len(players.names) - 1
    right = player(players, players.place[target], bool(players.is_bot[target]))
    is_bot = players.is_bot[left]

    def job(inputs):
        key, bot, place, flawed, level = inputs
        sides = [player(players, place, kind) for kind in (True, False) if (is_bot == kind).any()]
        one = sides[0] if len(sides) == 1 else Either(bot, *sides)
        return play(key, config, (one, right), (flawed, True), level, record)

    return jax.lax.map(job, (jax.random.split(key, len(left)), is_bot, players.place[left], left == target, levels))


def score(key, config: Config, players: Players, levels, repeats: int) -> Elite:
    """Plays levels (M, N, 42), those of each reference, `repeats` times in cross-play and in self-play -> Elite (M, N)."""
    num_refs, num = levels.shape[:2]
    each = min(config.chunk // repeats, num)
    parts = -(-num // each)
    chunks = jnp.pad(levels, ((0, 0), (0, parts * each - num), (0, 0))).reshape(num_refs * parts, each, LEVEL_SIZE)
    chunks = jnp.repeat(chunks.swapaxes(1, 2), repeats, axis=2)
    left = np.concatenate([np.repeat(np.arange(num_refs), parts), np.full(num_refs * parts, num_refs)])
    first, _ = play_jobs(key, config, players, left, jnp.concatenate([chunks, chunks]))
    share = first.reshape(2, num_refs, parts, 2, each, repeats).mean(-1).swapaxes(3, 4)
    xp, sp = share.reshape(2, num_refs, parts * each, 2)[:, :, :num]
    return Elite(levels, xp, sp, jnp.full((num_refs, num), float(repeats), jnp.float32))


def regret(elite: Elite) -> jax.Array:
    """V(reference, target) - V(target, target) (5.2), in [-2, 2]; V: 1 for the first goal, -1 against it."""
    return (elite.xp[..., 0] - elite.xp[..., 1]) - (elite.sp[..., 0] - elite.sp[..., 1])


def pooled(a: Elite, b: Elite) -> Elite:
    """All matches of both, for the same levels."""
    plays = a.plays + b.plays
    share = (a.plays / plays)[..., None]
    return Elite(a.level, share * a.xp + (1 - share) * b.xp, share * a.sp + (1 - share) * b.sp, plays)


# --- the archive: of one reference each, but `offer_all` and `duel`


def cell_of(level, config: Config) -> jax.Array:
    """The cell of a level (..., 42): x of the ball counts slowest."""
    return grid_cell(level[..., 40:42] / np.float32([0.9, 0.4]), config.grid, -1.0, 1.0)


def offer(config: Config, archive: Archive, elite: Elite, allowed) -> tuple[Archive, jax.Array]:
    """Inserts those (N,) that are allowed, by their regret -> the archive, which were taken."""
    fitness = jnp.where(allowed, regret(elite), -jnp.inf)
    return insert(archive, elite, fitness, elite.level[:, 40:42], cell_of(elite.level, config))


def keep_newest(config: Config, archive: Archive, elite: Elite) -> tuple[Archive, jax.Array]:
    """The first of the batch in each cell replaces what is there, whatever its regret."""
    cell = cell_of(elite.level, config)
    empty = archive._replace(fitness=archive.fitness.at[cell].set(-jnp.inf))
    new, taken = insert(empty, elite, jnp.zeros(cell.shape, jnp.float32), elite.level[:, 40:42], cell)
    fitness = jnp.where(filled(new), regret(new.genotype), -jnp.inf)
    return new._replace(fitness=fitness), taken


def duel(key, config: Config, players: Players, archive: Archive, elite: Elite) -> tuple[Archive, jax.Array]:
    """Children (M, N) that fill an empty cell are taken. One that beats an elite plays again, and so does that elite; the child's
    new matches alone (it was chosen by the others) and all of the elite's decide. Of one cell's children only the best fights."""
    cell = cell_of(elite.level, config)
    held = jax.vmap(lambda a, c: filled(a)[c])(archive, cell)
    _, better = jax.vmap(partial(offer, config))(archive, elite, held)
    chosen = jnp.argsort(~better, axis=1, stable=True)[:, : config.duels]
    take = lambda tree, index: jax.tree.map(lambda x: jax.vmap(lambda y, i: y[i])(x, index), tree)
    child, fights, place = take((elite, better, cell), chosen)
    old = take(archive.genotype, place)
    again = score(key, config, players, jnp.concatenate([child.level, old.level], axis=1), config.repeats)
    child = jax.tree.map(lambda x: x[:, : config.duels], again)
    old = pooled(old, jax.tree.map(lambda x: x[:, config.duels :], again))

    def settle(archive, elite, old, child, held, fights, place, chosen):
        where = jnp.where(fights, place, config.num_cells)  # past the end: not written
        genotype = jax.tree.map(lambda x, y: x.at[where].set(y, mode="drop"), archive.genotype, old)
        archive = archive._replace(genotype=genotype, fitness=archive.fitness.at[where].set(regret(old), mode="drop"))
        elite = jax.tree.map(lambda x, y: x.at[chosen].set(y), elite, child)
        return offer(config, archive, elite, ~held | jnp.zeros_like(held).at[chosen].set(fights))

    keep = select_children(fights, child, take(elite, chosen))
    return jax.vmap(settle)(archive, elite, old, keep, held, fights, place, chosen)


def select_children(fights, new: Elite, child: Elite) -> Elite:
    """The new numbers of those that fought, the first ones of the others."""
    pick = lambda x, y: jnp.where(fights.reshape(*fights.shape, *[1] * (x.ndim - 2)), x, y)
    return jax.tree.map(pick, new, child)


def offer_all(key, config: Config, players: Players, archive: Archive, elite: Elite) -> tuple[Archive, jax.Array]:
    """A batch for every reference -> archive, which were taken (M, N)."""
    if config.method == "random":
        return jax.vmap(partial(keep_newest, config))(archive, elite)
    if config.duels:
        return duel(key, config, players, archive, elite)
    return jax.vmap(partial(offer, config))(archive, elite, jnp.ones(elite.plays.shape, bool))


# --- emitters


def sample_levels(key, shape) -> jax.Array:
    """(*shape, 42): anywhere."""
    return jnp.moveaxis(Football().sample_level(key, shape), 0, -1)


def mutate(key, archive: Archive, config: Config) -> jax.Array:
    """Children (M, N, 42) of elites drawn uniformly (Algorithm 3)."""
    key_parent, key_noise = jax.random.split(key)
    keys = jax.random.split(key_parent, archive.fitness.shape[0])
    parents = jax.vmap(lambda key, a: a.genotype.level[sample_filled(key, a, (config.candidates,))])(keys, archive)
    children = Football().mutate_level(key_noise, jnp.moveaxis(parents, -1, 0), config.sigma)
    return jnp.moveaxis(children, 0, -1)


class Cma(NamedTuple):
    """evosax's separable CMA-ES, and its settings."""

    strategy: Any
    params: Any


def make_cma(config: Config) -> Cma:
    from evosax.algorithms import Sep_CMA_ES  # on use only: it starts the backend when it is imported

    strategy = Sep_CMA_ES(population_size=config.candidates // config.num_emitters, solution=jnp.zeros(LEVEL_SIZE, jnp.float32))
    return Cma(strategy, strategy.default_params.replace(std_init=config.sigma))


def restart_emitters(key, cma: Cma, archive: Archive, config: Config):
    """All emitters (M, E) anew, each about an elite of its reference drawn at random."""
    key_elite, key_init = jax.random.split(key)
    shape = (archive.fitness.shape[0], config.num_emitters)
    keys = jax.random.split(key_elite, shape[0])
    means = jax.vmap(lambda key, a: a.genotype.level[sample_filled(key, a, shape[1:])])(keys, archive)
    init = jax.vmap(jax.vmap(cma.strategy.init, (0, 0, None)), (0, 0, None))
    state = init(jax.random.split(key_init, shape), means, cma.params)
    return begin_evolution(state)


def ask(key, cma: Cma, state, config: Config):
    """-> children (M, N, 42), emitter by emitter, clipped to where levels are drawn from; the state to tell of them."""
    shape = state.mean.shape[:2]
    ask_one = jax.vmap(jax.vmap(cma.strategy.ask, (0, 0, None)), (0, 0, None))
    children, state = in_32_bits(ask_one(jax.random.split(key, shape), state, cma.params))
    bounds = np.tile(np.float32([0.9, 0.4]), 21)
    return jnp.clip(children, -bounds, bounds).reshape(shape[0], config.candidates, LEVEL_SIZE), state


def tell(key, cma: Cma, state, children, rank, taken, archive: Archive, config: Config):
    """Every emitter learns from the ranks of its children; one of which the archive took none begins anew at an elite."""
    key_tell, key_restart = jax.random.split(key)
    shape = state.mean.shape[:2]
    split = lambda x: x.reshape(*shape, -1, *x.shape[2:])
    tell_one = jax.vmap(jax.vmap(cma.strategy.tell, (0, 0, 0, 0, None)), (0, 0, 0, 0, None))
    told, _ = tell_one(jax.random.split(key_tell, shape), split(children), split(rank), state, cma.params)
    state = jax.vmap(jax.vmap(select))(split(taken).any(2), in_32_bits(told), restart_emitters(key_restart, cma, archive, config))
    return in_32_bits(state)


# --- the search


def make_train(config: Config) -> Train:
    """MADRID as pure functions of one seed."""
    players = make_players(config)
    num_refs = len(players.names) - 1
    cma = make_cma(config) if config.emitter == "cma" else None

    def init(key):
        number = jax.ShapeDtypeStruct((), jnp.float32)
        like = Elite(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((LEVEL_SIZE,), (2,), (2,))), number)
        archive = jax.tree.map(lambda x: jnp.broadcast_to(x, (num_refs, *x.shape)), init_archive(like, config.num_cells, 2))
        return State(archive, restart_emitters(key, cma, archive, config) if cma else (), key)

    def update(state: State, t):
        """One iteration (Algorithm 3). The first one's levels are random."""
        key, key_random, key_emit, key_play, key_duel, key_tell = jax.random.split(state.key, 6)
        levels, emitter = sample_levels(key_random, (num_refs, config.candidates)), ()
        if cma:
            children, emitter = ask(key_emit, cma, state.emitter, config)
        elif config.method == "madrid":
            children = mutate(key_emit, state.archive, config)
        if config.method == "madrid":
            levels = jnp.where(t == 0, levels, children)
        elite = score(key_play, config, players, levels, config.repeats)
        archive, taken = offer_all(key_duel, config, players, state.archive, elite)
        if cma:
            held = jax.vmap(lambda a, c: a.fitness[c])(state.archive, cell_of(levels, config))
            split = lambda x: x.reshape(num_refs, config.num_emitters, -1)
            rank = jax.vmap(jax.vmap(improvement_rank))(split(regret(elite)), split(held)).reshape(num_refs, -1)
            emitter = tell(key_tell, cma, emitter, levels, rank, taken & (t > 0), archive, config)
        played = (t + 1) * num_refs * (config.candidates + 2 * config.duels * (config.method != "random"))
        info = {"children_regret": regret(elite).mean(), "taken": taken.mean(), "evaluations": played}
        info["env_steps_m"] = played.astype(jnp.float32) * (2e-6 * config.repeats * config.horizon)
        return State(archive, emitter, key), summary_of(archive) | info

    return Train(init, update, partial(evaluate, config, players), config.num_updates)


def mean_where(x, where, axis=None) -> jax.Array:
    """NaN where there is none."""
    return jnp.where(where, x, np.float32(0)).sum(axis) / jnp.where(where.any(axis), where.sum(axis), jnp.nan)


def summary_of(archive: Archive) -> dict:
    """The metrics of an archive by its own estimates: over filled cells of all references; the QD score is a reference's mean."""
    known = archive.fitness > -jnp.inf
    return {
        "regret": mean_where(archive.fitness, known),
        "coverage": known.mean(),
        "qd_score": jnp.where(known, archive.fitness + OFFSET, 0.0).sum(1).mean(),
    }


# --- evaluation


def evaluate(config: Config, players: Players, state: State) -> dict:
    """The archive's estimates and what fresh matches say (`..._again`); arrays of each reference and cell; pictures and a film."""
    archive, known = state.archive, state.archive.fitness > -jnp.inf
    key_again, key_film = jax.random.split(jax.random.fold_in(state.key, 0))
    fresh_matches = lambda level: score(key_again, config, players, level, config.final_repeats)
    again = if_needed(known.any(), fresh_matches, archive.genotype.level)
    fresh = jnp.where(known, regret(again), jnp.nan)
    values = jnp.where(known, regret(again), 0.0)
    scalars = summary_of(archive) | {
        "regret_again": mean_where(values, known),
        "curse": mean_where(jnp.where(known, archive.fitness, 0.0) - values, known),
        "qd_score_again": jnp.where(known, values + OFFSET, 0.0).sum(1).mean(),
        "positive_again": mean_where(values > 0, known),
        "scoring_again": mean_where(again.xp[..., 0], known),
        "conceding_again": mean_where(again.xp[..., 1], known),
    }
    order = jnp.argsort(jnp.where(known, -values, jnp.inf).reshape(-1))
    levels = archive.genotype.level
    return scalars | {
        "reference_regret": mean_where(jnp.where(known, archive.fitness, 0.0), known, 1),
        "reference_regret_again": mean_where(values, known, 1),
        "reference_scoring_again": mean_where(again.xp[..., 0], known, 1),
        "reference_positive_again": mean_where(values > 0, known, 1),
        "pitch": jnp.concatenate([pitch_maps(x, config.grid) for x in (archive.fitness, fresh)]),
        "positions": positions(levels, known),
        "worst": drawings(levels.reshape(-1, LEVEL_SIZE)[order[:4]]),
        "worst_matches": film(key_film, config, players, levels, jnp.where(known, values, -jnp.inf)),
        **dict(levels=levels, cell_regret=archive.fitness, cell_regret_again=fresh, cell_xp=again.xp, cell_sp=again.sp),
    }


def pitch_maps(values, grid: tuple[int, int], length: int = 120, columns: int = 5) -> jax.Array:
    """Maps of the pitch, one a reference (M, cells), -1 blue to 1 red, grey where nothing is known: (H, W, 3) uint8."""
    num, columns, pixels = values.shape[0], min(columns, values.shape[0]), max(1, length // grid[0])
    tiles = jnp.pad(values, ((0, -num % columns), (0, 0)), constant_values=jnp.nan).reshape(-1, *grid).swapaxes(1, 2)
    x = jnp.clip(jnp.repeat(jnp.repeat(tiles, pixels, 1), pixels, 2), -1, 1)[..., None]
    red, white, blue = (np.float32(c) for c in ([190, 30, 40], [248, 246, 240], [40, 80, 180]))
    colour = jnp.where(x > 0, white + x * (red - white), white - x * (blue - white))
    colour = jnp.where(jnp.isfinite(jnp.repeat(jnp.repeat(tiles, pixels, 1), pixels, 2))[..., None], colour, 165.0)
    colour = jnp.pad(colour, ((0, 0), (2, 2), (2, 2), (0, 0)))
    rows = colour.reshape(-1, columns, *colour.shape[1:]).swapaxes(1, 2)
    return rows.reshape(-1, columns * colour.shape[2], 3).astype(jnp.uint8)


def positions(levels, known, pixels: int = 4) -> jax.Array:
    """Where the elites' left players, right players and balls stand, the brighter the more: three maps side by side, uint8."""
    shape = (45, 20)
    cell = grid_cell(levels.reshape(-1, 21, 2) / np.float32([0.9, 0.4]), shape, -1.0, 1.0)
    weight = jnp.broadcast_to(known.reshape(-1, 1), cell.shape)
    maps = []
    for part in (slice(0, 10), slice(10, 20), slice(20, 21)):
        count = jnp.zeros(shape[0] * shape[1], jnp.float32).at[cell[:, part]].add(weight[:, part])
        maps.append(jnp.pad(count.reshape(shape).T / jnp.maximum(count.max(), 1), 1, constant_values=1.0))
    image = jnp.repeat(jnp.repeat(jnp.concatenate(maps, axis=1), pixels, 0), pixels, 1)[..., None]
    return (image * np.float32([255, 230, 120]) + (1 - image) * np.float32([20, 50, 30])).astype(jnp.uint8)


def tiled(images) -> jax.Array:
    """(..., 4, H, W, 3) two by two, every second pixel."""
    rows = [jnp.concatenate([images[..., i, ::2, ::2, :], images[..., i + 1, ::2, ::2, :]], axis=-2) for i in (0, 2)]
    return jnp.concatenate(rows, axis=-3)


def drawings(levels) -> jax.Array:
    """Four scenarios (4, 42) as they begin, the worst first."""
    env = Football()
    return tiled(jax.lax.map(lambda level: env.render(env.reset_to_level(level)), levels))


def film(key, config: Config, players: Players, levels, values) -> jax.Array:
    """The worst scenarios of the two references that expose most: cross-play beside self-play, every third step (T, H, W, 3) uint8.

    Of eight matches of each, that in which the reference does best, and that in which the target, on the left, does worst.
    """
    env, num, num_matches = Football(), levels.shape[0], 8
    worst = values.argmax(1)
    level = jnp.take_along_axis(levels, worst[:, None, None], 1).swapaxes(1, 2)  # (M, 42, 1)
    level = jnp.repeat(jnp.concatenate([level, level]), num_matches, axis=2)
    left = np.concatenate([np.arange(num), np.full(num, num)])
    first, states = play_jobs(key, config, players, left, level, record=True)
    value = first[:, 0] - first[:, 1]
    match = jnp.where(np.arange(2 * num) < num, value.argmax(1), value.argmin(1))
    top = jnp.argsort(-values.max(1), stable=True)[jnp.array([0, min(1, num - 1)])]
    shown = jnp.stack([top[0], num + top[0], top[1], num + top[1]])
    pick = jax.tree.map(lambda x: jax.vmap(lambda s, m: x[s, ::3, ..., m])(shown, match[shown]), states)  # (4, T, ...)
    return tiled(jnp.moveaxis(jax.lax.map(lambda match: jax.lax.map(env.render, match), pick), 0, 1))


if __name__ == "__main__":
    run(cli(Config, __doc__, {"cpu": CPU, "paper": PAPER}), make_train, highlights=("regret", "coverage"))
