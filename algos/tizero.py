"""TiZero: eleven-a-side football by self-play (Lin et al., 2302.07515), the agents that MADRID (2401.13460) looks for faults in.

Ten players share one network. PPO takes the product of their probability ratios as one, the joint ratio, with the team's advantage;
the critic sees the whole pitch. Training climbs a ladder of scenarios: few attackers before an empty goal, then a keeper, then 3v3,
5v5 and 11v11 against better and better bots. At its top the team plays itself and its earlier selves, the league: first mostly the
newest ("challenge"), then those that are hardest to beat ("generalise"). The league is MADRID's set of references.

Run:     python algos/tizero.py         (--ratio independent for PPO's ratio of each player)

Paper:   --preset paper

Expect:  a run ends with 200 whole matches against each of three bots; the shipped league's (seed 0, about 75 minutes on one core)
         won 200, 200 and 190 against the easy, the medium and the hard bot, and lost 0, 0 and 4

A run's league is in league.npz (`load_league` of envs/football_team.py reads it); matches.json tells how whole matches against the
bots ended. The league that is shipped is envs/data/football_league.npz; its `meta` has the command and the commit that made it. A
run's league.npz can take its place.

Differs from the paper (2302.07515; its training code is not public, so what is not in the paper is chosen here):
 1. The world is envs/football.py, not the Google Research Football engine, and the bots are envs/football_bots.py's.
 2. A player's network is a perceptron with two hidden layers over the team's view and his own, without memory (six encoders, an
    LSTM of 256, and a head that predicts who he is); 64 units wide, with --preset paper 256.
 3. Training and league are on levels that end with a goal or after 256 steps, so that an attack that fails can be answered (whole
    matches, 3000 steps). MADRID's levels have 128. Players see neither score nor clock, and a
    time-out is no end: the value of what comes next counts.
 4. The ladder's rungs are this file's (ten levels; there as here a team climbs by winning, and what changes is the opponent's
    strength and where players and ball are); it climbs with time too, and goes on playing lower rungs (at the top, those of
    whole teams). Bots stay at its top. The critic is told who plays and on which rung.
 5. Masked are actions that would do nothing, and slides but near a ball that the others have (more, such as shots from afar).
 6. The world's checkpoint reward is added. Players begin with a liking for idling, which keeps them running where they run.
 7. The learner plays on the left: the world turns the pitch for the right team. No random actions at the start of levels, which are
    random themselves.
 8. Rewards of a step are larger, so that they weigh in a level what the paper's weigh in a match of 3000 steps (hold 1e-4, pass
    0.05, grouping -0.001, out of bounds -0.001, which is read here as a player beyond the lines).
 9. One computer's rollout and learning in turn (distributed actors and learners for 45 days).
"""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from common.nn import orthogonal
from common.ppo import gae
from common.runs import RunConfig, Train, cli, require, require_multiple, require_range, run, shard_batch
from common.runs.checkpoint import load, newest_good, write_atomically
from common.runs.config import NOT_COMPARED, as_dict
from common.runs.files import code_commit
from common.runs.hosts import is_main
from envs.football import Football, FootballParams, checkpoints, send_off
from envs.football_bots import BOTS, Bot, bot_actions
from envs.football_state import FORMATION, HALF_LENGTH, HALF_WIDTH, LEVEL_SIZE, NORMAL, NUM_ACTIONS, FootballState
from envs.football_team import WHOLE_VIEW, Team, apply_team, init_team, sample_actions, save_league, views


@dataclass(frozen=True)
class Config(RunConfig):
    """TiZero's settings."""

    num_updates: int = 400
    """Updates per seed: each plays num_matches levels, one after another for `horizon` steps, and learns from them."""
    num_matches: int = 256
    """Matches side by side."""
    horizon: int = 256
    """Steps of a level, 0.1 s each; a goal ends it before."""
    hidden: int = 64
    """Width of the two hidden layers of players and critic."""

    ratio: Literal["joint", "independent"] = "joint"
    """joint: the product of the team's ratios is clipped as one. independent: each player's."""
    lr: float = 1.5e-3
    """Adam's learning rate at the start; it falls to a tenth."""
    gamma: float = 0.995
    """Discount."""
    gae_lambda: float = 0.95
    """GAE's decay."""
    num_epochs: int = 2
    """PPO's passes over what was played."""
    num_minibatches: int = 8
    """Parts of a pass, each some of the steps of all matches."""
    clip_eps: float = 0.2
    """PPO's clipping."""
    ent_coef: float = 0.003
    """Weight of the entropy (of the team with the joint ratio, else of a player) at the start; it falls to a tenth."""
    vf_coef: float = 0.5
    """Weight of the critic's loss."""
    max_grad_norm: float = 0.5
    """Gradients are clipped to this norm."""
    idle_bias: float = 2.5
    """By how much idling's logit is larger than the others' at the start."""

    checkpoint_coef: float = 0.3
    """Rewards beside the goals' 1, those of the other team subtracted: for the world's checkpoints, ten of 0.1;"""
    pass_coef: float = 0.01
    """for a pass that arrives;"""
    hold_coef: float = 5e-4
    """for a step with the ball in play;"""
    crowd_coef: float = 2e-3
    """lost for a step in which ten pairs of team-mates are within 5 m;"""
    out_coef: float = 2e-3
    """and in which a player is off the pitch."""

    ladder_share: float = 0.3
    """The part of training after which the ladder's top is reached at the latest."""
    newest_rung: float = 0.75
    """Share of the matches on the rung that is reached; the others are on any up to it."""
    climb_at: float = 0.65
    """The share of decided levels to win before the next rung."""
    generalise_from: float = 0.75
    """The part of training after which opponents are drawn by how hard they are to beat."""
    newest_share: float = 0.8
    """Share of the league's matches that are against the newest self, until then."""
    bot_share: float = 0.5
    """Share of the matches at the ladder's top that bots play."""
    num_groups: int = 16
    """Groups of matches; each has one opponent of the league."""
    league_size: int = 8
    """Checkpoints in the league, at equal distances in training."""

    eval_matches: int = 64
    """Levels played for each pairing at evaluations."""
    film_steps: int = 300
    """Length of the film of a match."""
    final_matches: int = 200
    """Whole matches against each of three bots after training; 0 for none."""
    match_steps: int = 3000
    """Steps of a whole match."""

    def __post_init__(self):
        super().__post_init__()
        counts = "num_matches horizon hidden num_epochs num_minibatches num_groups league_size eval_matches match_steps"
        for name in counts.split():
            require(getattr(self, name) >= 1, f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        require(self.final_matches >= 0, f"--final-matches {self.final_matches}: must not be negative")
        require(self.film_steps >= 3, f"--film-steps {self.film_steps}: must be at least 3")
        require(self.lr > 0, f"--lr {self.lr}: must be positive")
        require_range(self, 0, 1, "gamma", "gae_lambda", "climb_at", "newest_rung", "newest_share")
        require_range(self, 0, 1, "bot_share", "ladder_share", "generalise_from")
        require(self.ladder_share > 0, "--ladder-share 0: must be positive")
        require_multiple(self, "horizon", "num_minibatches")
        require_multiple(self, "num_matches", "num_groups")
        require_multiple(self, "num_updates", "league_size")

    @property
    def split_size(self) -> int:
        return self.num_groups


PAPER = Config(preset="paper", hidden=256, num_updates=48_000, num_matches=1024, num_groups=32, league_size=48, lr=5e-4)
PAPER = replace(PAPER, gamma=0.999, log_every=10, eval_every=2000, save_every=500, pass_coef=0.05)
CPU = Config(preset="cpu", num_updates=1600, num_matches=128, log_every=5, eval_every=400, save_every=200)


class State(NamedTuple):
    """All of one seed's run."""

    params: dict  # actor: Team; critic: dict
    opt_state: Any
    league_params: Team  # (M, ...): checkpoints
    born: jax.Array  # (M,) int32: after how many updates each was kept; 0: not yet
    points: jax.Array  # (M,): the learner's share of the decided levels against each, a running mean
    rung: jax.Array  # () int32: how far up the ladder
    rates: jax.Array  # (2,): the shares of the rung's levels that are won and lost, running means
    key: jax.Array


# --- the critic


def init_critic(key, hidden: int) -> dict:
    """A perceptron of two hidden layers; weights are (out, in)."""
    sizes = [(hidden, WHOLE_VIEW + 13), (hidden, hidden), (1, hidden)]
    keys, gains = jax.random.split(key, 3), (2**0.5, 2**0.5, 1.0)
    weights = [orthogonal(k, size, gain) for k, size, gain in zip(keys, sizes, gains, strict=True)]
    return {"w": weights, "b": [jnp.zeros((len(w), 1), jnp.float32) for w in weights]}


def critic(params: dict, whole, active, task) -> jax.Array:
    """The team's value (B,) from its view (126, B), who of it takes part (10, B), and what it is up against (3, B)."""
    x = jnp.concatenate([whole, active.astype(jnp.float32), task])
    for w, b in zip(params["w"][:2], params["b"][:2], strict=True):
        x = jnp.tanh(w @ x + b)
    return (params["w"][2] @ x + params["b"][2])[0]


# --- the ladder


class Rung(NamedTuple):
    """A kind of level, and when it is mastered."""

    attackers: int
    defenders: int
    keeper: bool  # of the defenders
    ball_from: float  # the ball's x, in a level's units
    ball_to: float
    bot: str
    goals: float  # the share of levels to win before the next rung; a hard bot wins about half as many again


LADDER = (
    Rung(3, 0, False, 0.5, 0.85, "easy", 0.5),
    Rung(3, 0, True, 0.5, 0.85, "easy", 0.2),
    Rung(3, 3, True, 0.3, 0.85, "easy", 0.15),
    Rung(5, 5, True, 0.0, 0.85, "easy", 0.12),
    Rung(5, 5, True, 0.0, 0.85, "medium", 0.1),
    Rung(10, 10, True, 0.2, 0.9, "easy", 0.12),
    Rung(10, 10, True, 0.0, 0.9, "medium", 0.05),
    Rung(10, 10, True, -0.9, 0.9, "medium", 0.05),
    Rung(10, 10, True, -0.9, 0.9, "hard", 0.05),
    Rung(10, 10, True, -0.9, 0.9, "hard", 1.0),  # the top: the league, the hard bot, and all bots but the easy one
)
TOP = len(LADDER) - 1
WHOLE_TEAMS = 5  # the first rung of eleven against eleven
NAMES = ("easy", "medium", "hard", "dribbler", "passer")
NUMBERS = np.float32([rung._replace(bot=NAMES.index(rung.bot)) for rung in LADDER])
BOT_NUMBERS = np.float32([BOTS[name] for name in NAMES])


def begin_levels(key, env: Football, rung) -> FootballState:
    """A level of each match's rung (B,). Small teams stand about the ball; of the large ones' levels two in ten are kick-offs, five
    are in formation, and in the others everyone is anywhere, as in MADRID's."""
    num, row = rung.shape[0], jnp.asarray(NUMBERS)[rung].T
    key_ball, key_noise, key_level, key_kick_off = jax.random.split(key, 4)
    u = jax.random.uniform(key_ball, (3, num), jnp.float32)
    noise = jax.random.uniform(key_noise, (2, 10, 2, num), jnp.float32, minval=-1.0)
    small = row[0] < 10
    ball = jnp.stack([row[3] + (row[4] - row[3]) * u[0], (0.8 * u[1] - 0.4) * jnp.where(small, 0.6, 1.0)])
    near = ball + np.float32([[[[-0.05], [0]]], [[[0.15], [0]]]]) + 0.2 * noise
    home = FORMATION[1:, :, None] * np.float32([1, -1])[:, None, None, None]
    home = home + np.float32([0.15, -0.15])[:, None, None, None] * np.float32([[1], [0]]) + ball * np.float32([[0.5], [0.2]])
    anywhere = env.sample_level(key_level, (num,))[:40].reshape(2, 10, 2, num)
    spots = jnp.where(small, near, jnp.where(u[2] < 0.7, home + 0.05 * noise, anywhere))
    spots = jnp.clip(spots, -np.float32([[0.95], [0.4]]), np.float32([[0.95], [0.4]]))
    state = env.reset_to_level(jnp.concatenate([spots.reshape(40, num), ball]).reshape(LEVEL_SIZE, num))
    _, kick_off = env.reset_env(key_kick_off, env.default_params, (num,))
    begins = ~small & (u[2] < 0.2)
    state = jax.tree.map(lambda now, other: jnp.where(begins, other, now), state, kick_off)
    place = np.arange(11)[:, None]
    return send_off(state, jnp.stack([place > row[0], jnp.where(place == 0, row[2] == 0, place > row[1])]))


# --- playing: B matches side by side, the learner on the left


class Rivals(NamedTuple):
    """Who plays on the right."""

    teams: Team  # (G, ...): each for B / G matches
    bots: Bot  # (B,)
    is_team: jax.Array  # (B,) bool: a team, not a bot


def by_groups(teams: Team, whole, own) -> jax.Array:
    """G teams, each for B / G matches: views (126, B), (43, 10, B) -> logits (19, 10, B)."""
    grouped = lambda x: x.reshape(*x.shape[:-1], teams.whole.shape[0], -1)
    logits = jax.vmap(apply_team, (0, 1, 2), 2)(teams, grouped(whole), grouped(own))
    return logits.reshape(*logits.shape[:2], -1)


def rivals_act(key, rivals: Rivals, state: FootballState) -> jax.Array:
    """Actions (10, B)."""
    key_team, key_bot = jax.random.split(key)
    by_team, _ = sample_actions(key_team, by_groups(rivals.teams, *views(state, 1)))
    both = Bot(*(jnp.stack([x, x]) for x in rivals.bots))
    return jnp.where(rivals.is_team, by_team, bot_actions(key_bot, state, both)[10:])


def world_params(rivals: Rivals, num_steps: int) -> FootballParams:
    """Bots play with their own skill."""
    right = jnp.where(rivals.is_team, 1.0, rivals.bots.skill)
    return FootballParams(jnp.stack([jnp.ones_like(right), right]), num_steps)


def crowding(state: FootballState) -> jax.Array:
    """Tens of pairs of a team's players within 5 m of each other (2, B)."""
    x, y, on = state.x[:, 1:], state.y[:, 1:], state.active[:, 1:]
    near = (x[:, :, None] - x[:, None]) ** 2 + (y[:, :, None] - y[:, None]) ** 2 < 25.0
    return ((near & on[:, :, None] & on[:, None]).sum((1, 2)) - on.sum(1)) / 20.0


def players_out(state: FootballState) -> jax.Array:
    """A team's players beyond the lines (2, B)."""
    out = (jnp.abs(state.x[:, 1:]) > HALF_LENGTH) | (jnp.abs(state.y[:, 1:]) > HALF_WIDTH)
    return (out & state.active[:, 1:]).sum(1)


def team_reward(config: Config, state: FootballState, info: dict, rings) -> jax.Array:
    """The left team's (B,), zero-sum; `rings` (2, B): the world's checkpoint reward."""
    goal, completed, owned = (info[name].astype(jnp.float32) for name in ("goal", "completed", "owned"))
    owned = owned * (state.mode == NORMAL)
    each = goal + config.checkpoint_coef * rings + config.pass_coef * completed + config.hold_coef * owned
    each = each - config.crowd_coef * crowding(state) - config.out_coef * players_out(state)
    return each[0] - each[1]


class TeamStep(NamedTuple):
    """What the learner's team saw, did and got, (T, ..., B)."""

    whole: jax.Array  # (126,)
    own: jax.Array  # (43, 10)
    active: jax.Array  # (10,) bool
    task: jax.Array  # (3,): what the critic knows of the opponent and the rung
    action: jax.Array  # (10,) int8
    log_prob: jax.Array  # (10,)
    value: jax.Array
    reward: jax.Array
    done: jax.Array  # bool


def rollout(key, config: Config, env: Football, params: dict, rivals: Rivals, rung, start: FootballState):
    """`horizon` steps; a level that ends begins again -> TeamStep, the value of what comes next (B,), and how many levels of each
    match ended, were won, were lost (3, B). Time is no end: players see no clock, and the value of what comes next counts."""
    world = world_params(rivals, config.horizon)
    task = jnp.stack([rivals.is_team, jnp.where(rivals.is_team, 0.0, rivals.bots.skill), rung / TOP]).astype(jnp.float32)

    def step(carry, key):
        state, count = carry
        key_act, key_rival, key_env = jax.random.split(key, 3)
        whole, own = views(state)
        active = state.active[0, 1:]
        action, log_prob = sample_actions(key_act, apply_team(params["actor"], whole, own))
        actions = jnp.concatenate([action, rivals_act(key_rival, rivals, state)])
        _, state, _, terminated, info = env.step_env(key_env, state, actions, world)
        extra, rings = checkpoints(state, info["goal"].astype(jnp.float32))
        reward, value = team_reward(config, state, info, extra), critic(params["critic"], whole, active, task)
        count = count + jnp.stack([terminated | (state.time >= config.horizon), info["goal"][0], info["goal"][1]])
        state = jax.tree.map(lambda first, now: jnp.where(terminated, first, now), start, state._replace(rings=rings))
        return (state, count), TeamStep(whole, own, active, task, action.astype(jnp.int8), log_prob, value, reward, terminated)

    count = jnp.zeros((3, *start.time.shape), jnp.int32)
    (state, count), steps = jax.lax.scan(step, (start, count), jax.random.split(key, config.horizon))
    last = critic(params["critic"], views(state)[0], state.active[0, 1:], task)
    return steps, last, count


# --- learning


def surrogate(log_ratio, adv, active, clip_eps: float, joint: bool):
    """PPO's clipped loss of a team, and the share of ratios that are clipped. log_ratio, active (10, ...), adv (...).

    Joint (the paper's JRPO): the team's ratio is the product of its players'. Those who take no part do not count.
    """
    weight = active.astype(jnp.float32)
    if joint:
        log_ratio, weight = (log_ratio * weight).sum(0, keepdims=True), np.float32(1)
    else:
        weight = weight / weight.sum(0)
    ratio = jnp.exp(log_ratio)
    least = jnp.minimum(ratio * adv, jnp.clip(ratio, 1 - clip_eps, 1 + clip_eps) * adv)
    outside = jnp.abs(ratio - 1) > clip_eps
    return -(weight * least).sum(0).mean(), (weight * outside).sum(0).mean()


def loss_fn(params: dict, config: Config, ent_coef, step: TeamStep, adv, target):
    """The loss of one step of B matches, and diagnostics."""
    joint, on = config.ratio == "joint", step.active.astype(jnp.float32)
    log_probs = jax.nn.log_softmax(apply_team(params["actor"], step.whole, step.own), axis=0)
    log_prob = jnp.where(np.arange(NUM_ACTIONS)[:, None, None] == step.action, log_probs, 0.0).sum(0)
    policy_loss, clipped = surrogate(log_prob - step.log_prob, adv, step.active, config.clip_eps, joint)
    value_loss = 0.5 * ((critic(params["critic"], step.whole, step.active, step.task) - target) ** 2).mean()
    each = -(jnp.exp(log_probs) * log_probs).sum(0) * on
    entropy = each.sum() / on.sum()
    bonus = each.sum(0).mean() if joint else entropy
    loss = policy_loss + config.vf_coef * value_loss - ent_coef * bonus
    return loss, {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy, "clip_fraction": clipped}


def learn_from(key, config: Config, tx, ent_coef, params: dict, opt_state, steps: TeamStep, last):
    """PPO's passes over a rollout -> params, opt_state, mean diagnostics. A minibatch is some of the time steps; the gradients of
    its steps are taken one after another, so that what a step needs stays in the processor's cache."""
    adv, target = gae(steps.reward, steps.value, steps.done, last, config.gamma, config.gae_lambda)
    adv = (adv - adv.mean()) / (adv.std() + 1e-5)

    def minibatch(carry, index):
        params, opt_state = carry

        def gradient(i):
            step, *rest = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), (steps, adv, target))
            return jax.grad(loss_fn, has_aux=True)(params, config, ent_coef, step, *rest)

        grads, info = jax.tree.map(lambda x: x.mean(0), jax.lax.map(gradient, index))
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), info | {"grad_norm": optax.global_norm(grads)}

    orders = jax.vmap(lambda key: jax.random.permutation(key, config.horizon))(jax.random.split(key, config.num_epochs))
    orders = orders.reshape(config.num_epochs * config.num_minibatches, -1)
    (params, opt_state), info = jax.lax.scan(minibatch, (params, opt_state), orders)
    return params, opt_state, jax.tree.map(jnp.mean, info)


# --- the league


def opponent_weights(born, points, generalise) -> jax.Array:
    """With what weight each checkpoint (M,) is drawn: all alike, or in the generalise stage by the points it takes."""
    return jnp.where(generalise, (1.0 - points) ** 2, 1.0) * (born > 0)


def draw_rivals(key, config: Config, state: State, t):
    """-> each match's rung (B,), Rivals, and each group's place in the league (G,), -1 for the newest self."""
    key_match, key_slot, key_newest = jax.random.split(key, 3)
    num, groups = config.num_matches, config.num_groups
    u = jax.random.uniform(key_match, (5, num), jnp.float32)
    lowest = jnp.where(state.rung == TOP, WHOLE_TEAMS, 0)
    older = lowest + (u[1] * (state.rung + 1 - lowest)).astype(jnp.int32)
    rung = jnp.where(u[0] < config.newest_rung, state.rung, older)
    top = rung == TOP
    any_but_easy = 1 + (u[2] * (len(NAMES) - 1)).astype(jnp.int32)
    at_top = jnp.where(u[4] < 0.5, NAMES.index("hard"), any_but_easy)
    bot = jnp.where(top, at_top, jnp.asarray(NUMBERS)[rung, 5].astype(jnp.int32))
    generalise = t >= config.generalise_from * config.num_updates
    weight = opponent_weights(state.born, state.points, generalise)
    slot = jax.random.categorical(key_slot, jnp.log(weight + 1e-9), shape=(groups,))
    newest_share = jnp.where(generalise, 1 / (1 + config.league_size), config.newest_share)
    newest = jax.random.uniform(key_newest, (groups,), jnp.float32) < newest_share
    slot = jnp.where(newest | (state.born.max() == 0), -1, slot)
    choose = lambda league, now: jnp.where((slot < 0).reshape(-1, *[1] * now.ndim), now, league[slot])
    teams = jax.tree.map(choose, state.league_params, state.params["actor"])
    is_team = top & (u[3] >= config.bot_share)
    return rung, Rivals(teams, Bot(*jnp.asarray(BOT_NUMBERS)[bot].T), is_team), slot


def keep_score(config: Config, state: State, rung, is_team, slot, count, t) -> tuple[State, dict]:
    """The running means, and the next rung where this one is mastered or its time is over."""
    here = (rung == state.rung) & (count[0] > 0)
    ended, won, lost = (count * here).sum(1)
    rate = jnp.stack([won, lost]).astype(jnp.float32) / jnp.maximum(ended, 1)
    rates = 0.8 * state.rates + 0.2 * rate
    mastered = (rates[0] >= jnp.asarray(NUMBERS)[state.rung, 6]) & (rates[0] >= config.climb_at * rates.sum())
    late = (TOP * (t + 1) / (config.ladder_share * config.num_updates)).astype(jnp.int32)
    new_rung = jnp.minimum(jnp.maximum(state.rung + mastered, late), TOP)
    by_slot = (slot[:, None] == jnp.arange(config.league_size)).astype(jnp.float32)
    _, won, lost = (count * is_team).reshape(3, config.num_groups, -1).sum(2) @ by_slot
    points = jnp.where(won + lost > 0, 0.9 * state.points + 0.1 * won / jnp.maximum(won + lost, 1), state.points)
    state = state._replace(rung=new_rung, rates=jnp.where(new_rung > state.rung, 0.0, rates), points=points)
    return state, {"rung": state.rung.astype(jnp.float32), "won": rate[0], "lost": rate[1]}


def keep_checkpoint(config: Config, state: State, t) -> State:
    """The newest team joins the league when it is time."""
    every = config.num_updates // config.league_size
    joins = ((t + 1) % every == 0) & (jnp.arange(config.league_size) == t // every)
    put = lambda old, new: jnp.where(joins.reshape(-1, *[1] * (old.ndim - 1)), new, old)
    return state._replace(
        league_params=jax.tree.map(put, state.league_params, state.params["actor"]),
        born=put(state.born, t + 1),
        points=put(state.points, 0.5),
    )


# --- training


def make_train(config: Config) -> Train:
    """TiZero as pure functions of one seed."""
    env = Football(max_steps_in_episode=config.horizon)
    grad_steps = config.num_updates * config.num_epochs * config.num_minibatches
    schedule = optax.linear_schedule(config.lr, config.lr / 10, grad_steps)
    tx = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optax.adam(schedule, eps=1e-5))
    size = config.league_size

    def init(key):
        key, key_actor, key_critic = jax.random.split(key, 3)
        actor = init_team(key_actor, config.hidden)
        actor = actor._replace(last_bias=actor.last_bias.at[0].set(config.idle_bias))
        params = {"actor": actor, "critic": init_critic(key_critic, config.hidden)}
        league = jax.tree.map(lambda x: jnp.zeros((size, *x.shape), jnp.float32), actor)
        born, points = jnp.zeros(size, jnp.int32), jnp.full(size, 0.5, jnp.float32)
        return State(params, tx.init(params), league, born, points, jnp.int32(0), jnp.zeros(2, jnp.float32), key)

    def update(state: State, t):
        key, key_rivals, key_level, key_play, key_learn = jax.random.split(state.key, 5)
        rung, rivals, slot = draw_rivals(key_rivals, config, state, t)
        start, bots, is_team = spread_matches((begin_levels(key_level, env, rung), rivals.bots, rivals.is_team))
        rivals = Rivals(rivals.teams, bots, is_team)
        steps, last, count = rollout(key_play, config, env, state.params, rivals, rung, start)
        ent_coef = config.ent_coef * (1.0 - 0.9 * t / config.num_updates)
        params, opt_state, info = learn_from(key_learn, config, tx, ent_coef, state.params, state.opt_state, steps, last)
        state = state._replace(params=params, opt_state=opt_state, key=key)
        state, scores = keep_score(config, state, rung, is_team, slot, count, t)
        env_steps = (t + 1) * config.num_matches * config.horizon
        info |= scores | {"reward": steps.reward.sum(0).mean(), "env_steps": env_steps}
        return keep_checkpoint(config, state, t), info

    return Train(init, update, partial(evaluate, config), config.num_updates)


def spread_matches(tree):
    """Spreads the matches, the last axis, over devices."""
    return jax.tree.map(lambda x: shard_batch(x, x.ndim - 1), tree)


# --- evaluation


def play_on(key, env: Football, teams: Team, rivals: Rivals, start: FootballState, num_steps: int):
    """`num_steps` steps of teams (G, ...) against their rivals -> the last state, goals (2, B) int32, and who scored first
    (2, B) bool."""
    params = world_params(rivals, env.max_steps)

    def step(carry, key):
        state, goals, first = carry
        key_act, key_rival, key_env = jax.random.split(key, 3)
        action, _ = sample_actions(key_act, by_groups(teams, *views(state)))
        actions = jnp.concatenate([action, rivals_act(key_rival, rivals, state)])
        _, state, _, _, info = env.step_env(key_env, state, actions, params)
        first = jnp.where(first.any(0), first, info["goal"])
        return (state, goals + info["goal"], first), None

    none = jnp.zeros((2, start.time.shape[0]), jnp.int32)
    keys = jax.random.split(key, num_steps)
    return jax.lax.scan(step, (start, none, none > 0), keys)[0]


def evaluate(config: Config, state: State) -> dict:
    """The newest team against every bot and every checkpoint, and the checkpoints against each other, in levels like MADRID's:
    everyone anywhere, the first goal decides. A film of it against the hard bot."""
    env = Football(max_steps_in_episode=config.horizon)
    size, num = config.league_size, config.eval_matches
    left, right = np.triu_indices(size, 1)
    left = np.concatenate([np.full(len(NAMES) + size, size), left])
    right = np.concatenate([np.full(len(NAMES), size), np.arange(size), right])
    everyone = jax.tree.map(lambda x, new: jnp.concatenate([x, new[None]]), state.league_params, state.params["actor"])
    pick = lambda who: jax.tree.map(lambda x: x[who], everyone)
    group = np.repeat(np.arange(len(left)), num)
    bots = jnp.asarray(BOT_NUMBERS[np.minimum(group, len(NAMES) - 1)].T)
    bots, is_team = spread_matches((Bot(*bots), jnp.asarray(group >= len(NAMES))))
    rivals = Rivals(pick(right), bots, is_team)
    key_level, key_play, key_film = jax.random.split(jax.random.fold_in(state.key, 0), 3)
    start = spread_matches(env.reset_to_level(env.sample_level(key_level, (len(group),))))
    _, _, first = play_on(key_play, env, pick(left), rivals, start, config.horizon)
    first = first.reshape(2, len(left), num).sum(2, dtype=jnp.float32)
    share = first[0] / jnp.maximum(first.sum(0), 1)  # of the levels that were decided
    share = jnp.where(first.any(0), share, 0.5)
    there = state.born > 0
    against = jnp.where(there, share[len(NAMES) : len(NAMES) + size], jnp.nan)
    table = jnp.full((size, size), jnp.nan, jnp.float32).at[np.triu_indices(size, 1)].set(share[len(NAMES) + size :])
    table = jnp.where(jnp.isnan(table), 1.0 - table.T, table)
    table = jnp.where(there & there[:, None], table, jnp.nan)
    scalars = {f"share_{name}": share[i] for i, name in enumerate(NAMES)}
    scalars |= {f"won_{name}": first[0, i] / num for i, name in enumerate(NAMES)}
    scalars |= {f"lost_{name}": first[1, i] / num for i, name in enumerate(NAMES)}
    order = jnp.argsort(jnp.where(there, state.born, 2**30))
    return scalars | {
        "share_league": jnp.nanmean(against),
        "against_checkpoints": against[order],
        "league": league_picture(table[order][:, order]),
        "league_table": table[order][:, order],
        "match": film_match(key_film, config, state.params["actor"]),
    }


def league_picture(table) -> jax.Array:
    """Who beats whom (M, M): the row's share against the column, red 0, white a half, green 1, grey where there is none."""
    share = jnp.repeat(jnp.repeat(table, 24, 0), 24, 1)[..., None]
    red, white, green = (np.float32(c) for c in ([200, 60, 50], [245, 245, 245], [50, 150, 70]))
    colour = jnp.where(share < 0.5, red + 2 * share * (white - red), white + (2 * share - 1) * (green - white))
    return jnp.where(jnp.isnan(share), 150.0, colour).astype(jnp.uint8)


def against_bots(team: Team, bots: list[str], num: int):
    """What `play_on` takes for `num` matches of a team against each of these bots, one bot after the other."""
    teams = jax.tree.map(lambda x: x[None], team)
    numbers = np.repeat(np.float32([BOTS[name] for name in bots]), num, axis=0)
    return teams, Rivals(teams, Bot(*jnp.asarray(numbers.T)), jnp.zeros(len(numbers), bool))


def film_match(key, config: Config, team: Team) -> jax.Array:
    """`film_steps` from a kick-off against the hard bot, every third step: (film_steps / 3, H, W, 3) uint8."""
    env = Football(end_on_score=False)
    key_start, key_play = jax.random.split(key)
    _, state = env.reset_env(key_start, env.default_params, (1,))

    def frame(state, key):
        state, _, _ = play_on(key, env, *against_bots(team, ["hard"], 1), state, 3)
        return state, env.render(jax.tree.map(lambda x: x[..., 0], state))

    return jax.lax.scan(frame, state, jax.random.split(key_play, config.film_steps // 3))[1]


# --- what a run leaves: its league, and whole matches of its last team


def write_results(config: Config, folder: Path) -> None:
    """Writes FOLDER/league.npz (of the first seed; league_SEED.npz of the others), plays matches and prints what came of them."""
    path, meta = newest_good(folder / "checkpoints")
    seeds = jnp.arange(config.seed, config.seed + config.num_seeds)
    states = load(path, jax.eval_shape(jax.vmap(lambda seed: make_train(config).init(jax.random.key(seed))), seeds))
    about = dict(updates=meta["update"], env_steps=meta["update"] * config.num_matches * config.horizon)
    about |= dict(command=command_of(config), commit=code_commit())
    for lane in range(config.num_seeds):
        write_league(folder, lane, jax.tree.map(lambda x, lane=lane: x[lane], states), about | {"seed": config.seed + lane})
    if config.final_matches:
        team = jax.tree.map(lambda x: jnp.asarray(x[0]), states.params["actor"])
        results = whole_matches(config, team)
        write_atomically(folder / "matches.json", lambda file: file.write(json.dumps(results, indent=1).encode()))
        for bot, r in results.items():
            outcome = f"{r['won']} won, {r['drawn']} drawn, {r['lost']} lost, {r['scored']}:{r['conceded']} goals"
            print(f"{config.final_matches} whole matches against the {bot} bot: {outcome}")


def command_of(config: Config) -> str:
    """The command that makes such a run."""
    usual = as_dict({"cpu": CPU, "paper": PAPER}[config.preset])
    changed = {k: v for k, v in as_dict(config).items() if v != usual[k] and k not in NOT_COMPARED}
    flags = [f"--{name.replace('_', '-')} {value}" for name, value in changed.items()]
    return " ".join(["python algos/tizero.py", f"--preset {config.preset}", *flags])


def write_league(folder: Path, lane: int, state: State, about: dict) -> None:
    """The checkpoints of one seed, the earliest first."""
    order = [i for i in np.argsort(state.born) if state.born[i]]
    if order:
        teams = jax.tree.map(lambda x: np.asarray(x)[order], state.league_params)
        name = f"league_{about['seed']}.npz" if lane else "league.npz"
        save_league(folder / name, teams, [f"update {state.born[i]}" for i in order], about)


def whole_matches(config: Config, team: Team, bots=("easy", "medium", "hard")) -> dict:
    """`final_matches` matches of match_steps steps, from kick-off, against each bot: how they ended, and the goals."""
    env, num = Football(end_on_score=False, max_steps_in_episode=config.match_steps), config.final_matches
    key_start, key_play = jax.random.split(jax.random.key(config.seed))

    @jax.jit
    def go(team):
        _, state = env.reset_env(key_start, env.default_params, (num * len(bots),))
        return play_on(key_play, env, *against_bots(team, bots, num), state, config.match_steps)[1]

    results = {}
    for name, (ours, theirs) in zip(bots, np.asarray(go(team)).reshape(2, len(bots), num).swapaxes(0, 1), strict=True):
        won, lost = int((ours > theirs).sum()), int((ours < theirs).sum())
        results[name] = dict(won=won, drawn=num - won - lost, lost=lost, scored=int(ours.sum()), conceded=int(theirs.sum()))
    return results


def main(config: Config) -> None:
    """Trains, then writes the league and plays whole matches."""
    folder = run(config, make_train, highlights=("rung", "won"))
    if folder and is_main():
        write_results(config, folder)


if __name__ == "__main__":
    main(cli(Config, __doc__, {"cpu": CPU, "paper": PAPER}))
