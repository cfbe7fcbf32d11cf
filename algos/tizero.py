"""TiZero: eleven-a-side football by self-play (Lin et al., 2302.07515), the agents that MADRID (2401.13460) looks for faults in.

Ten players share one network, and PPO takes the product of their probability ratios as one, the joint ratio, with the team's
advantage. Training climbs a ladder of scenarios: few attackers before an empty goal, then a keeper, then 3v3, 5v5 and 11v11 against
better and better bots; at its top the team plays itself and its earlier selves, the league, first mostly the newest ("challenge"),
then those that are hardest to beat ("generalise"). The league is MADRID's set of references.

Run:     python algos/tizero.py         (--ratio independent for PPO's ratio of each player)

Paper:   --preset paper

Expect:  TODO

The league is in league.npz (envs/football_team.py reads it).

Differs from the paper (2302.07515, whose training code is not public; what is known of its settings):
 1. TODO
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

from common.checkpoint import load, newest_good, write_atomically
from common.config import RunConfig, cli, require, require_multiple, require_range
from common.devices import shard_batch
from common.files import code_commit, new_or_newest
from common.nn import orthogonal
from common.ppo import gae
from common.run import Train, run
from envs.football import Football, FootballParams, checkpoints, send_off
from envs.football_bots import BOTS, Bot, bot_actions
from envs.football_state import FORMATION, LEVEL_SIZE, FootballState
from envs.football_team import WHOLE_VIEW, Team, apply_team, init_team, sample_actions, save_league, views


@dataclass(frozen=True)
class Config(RunConfig):
    """TiZero's settings; the defaults are the paper's as far as they are known."""

    num_updates: int = 400
    """Updates per seed: each plays num_matches levels, again and again, for `horizon` steps and learns from them."""
    num_matches: int = 256
    """Matches side by side."""
    horizon: int = 128
    """Steps of a level, 0.1 s each; a goal ends it before."""
    hidden: int = 64
    """Width of the players' two hidden layers, and of the critic's."""

    ratio: Literal["joint", "independent"] = "joint"
    """joint: the product of the team's ratios is clipped as one. independent: each player's."""
    lr: float = 1e-3
    """Adam's learning rate at the start; it falls to a tenth."""
    gamma: float = 0.995
    """Discount."""
    gae_lambda: float = 0.95
    """GAE's decay."""
    num_epochs: int = 2
    """PPO's passes over what was played."""
    num_minibatches: int = 8
    """Parts of a pass, of whole time steps."""
    clip_eps: float = 0.2
    """PPO's clipping."""
    ent_coef: float = 0.003
    """Weight of the team's entropy."""
    vf_coef: float = 0.5
    """Weight of the critic's loss."""
    max_grad_norm: float = 0.5
    """Gradients are clipped to this norm."""

    checkpoint_coef: float = 0.3
    """Reward for the world's checkpoints (0.1 each), the other team's subtracted, as are all below."""
    pass_coef: float = 0.01
    """Reward for a pass that arrives."""
    hold_coef: float = 1e-4
    """Reward for a step with the ball."""
    crowd_coef: float = 1e-3
    """Reward lost in a step for each pair of team-mates within 3 m of each other, relative to 10."""
    out_coef: float = 1e-3
    """Reward lost for a ball played out."""

    ladder_share: float = 0.5
    """The part of training after which the ladder's top is reached at the latest."""
    climb_at: float = 0.65
    """The share of decided levels to win before the next rung."""
    generalise_from: float = 0.75
    """The part of training after which opponents are drawn by how hard they are to beat."""
    newest_share: float = 0.8
    """Share of the league's matches against the newest self, until then."""
    bot_share: float = 0.3
    """Share of the ladder's top that bots play."""
    num_groups: int = 16
    """Groups of matches that share an opponent of the league."""
    league_size: int = 8
    """Checkpoints kept, at equal distances in training."""
    eval_matches: int = 128
    """Levels played against each opponent at evaluations."""

    def __post_init__(self):
        super().__post_init__()

    @property
    def split_size(self) -> int:
        return self.num_groups


PAPER = Config(preset="paper")
CPU = replace(PAPER, preset="cpu", log_every=5, eval_every=50, save_every=50)


class State(NamedTuple):
    """All of one seed's run."""

    params: dict  # actor: Team; critic
    opt_state: Any
    league_params: Team  # (M, ...): checkpoints
    born: jax.Array  # (M,) int32: after how many updates; 0: none yet
    points: jax.Array  # (M,): the learner's share of points against each, a running mean; a level without a goal counts half
    rung: jax.Array  # () int32: of the ladder
    won: jax.Array  # (2,): running means on the rung: levels won, lost
    key: jax.Array


# --- networks


def init_critic(key, hidden: int) -> dict:
    keys = jax.random.split(key, 3)
    sizes = [(hidden, WHOLE_VIEW + 10), (hidden, hidden), (1, hidden)]
    return {
        f"w{i}": orthogonal(k, size, 2**0.5 if i < 2 else 1.0) for i, (k, size) in enumerate(zip(keys, sizes, strict=True))
    } | {f"b{i}": jnp.zeros((size[0], 1)) for i, size in enumerate(sizes)}


def critic(params, whole, active) -> jax.Array:
    """(128, B), (10, B) -> (B,)."""
    x = jnp.concatenate([whole, active.astype(jnp.float32)])
    x = jnp.tanh(params["w0"] @ x + params["b0"])
    x = jnp.tanh(params["w1"] @ x + params["b1"])
    return (params["w2"] @ x + params["b2"])[0]


# --- the ladder


class Rung(NamedTuple):
    attackers: int
    defenders: int
    keeper: bool
    ball: tuple[float, float]  # x from, to
    bot: str
    goals: float  # share of levels to win


LADDER = [
    Rung(3, 0, False, (0.5, 0.85), "easy", 0.6),
    Rung(3, 0, True, (0.5, 0.85), "easy", 0.4),
    Rung(3, 3, True, (0.3, 0.85), "easy", 0.25),
    Rung(5, 5, True, (0.0, 0.85), "easy", 0.2),
    Rung(5, 5, True, (0.0, 0.85), "medium", 0.15),
    Rung(10, 10, True, (0.2, 0.9), "easy", 0.15),
    Rung(10, 10, True, (0.0, 0.9), "medium", 0.1),
    Rung(10, 10, True, (-0.9, 0.9), "medium", 0.1),
    Rung(10, 10, True, (-0.9, 0.9), "hard", 0.05),
    Rung(10, 10, True, (-0.9, 0.9), "hard", 2.0),
]
TOP = len(LADDER) - 1
NAMES = list(BOTS)
TABLE = np.array([(r.attackers, r.defenders, r.keeper, *r.ball, NAMES.index(r.bot), r.goals) for r in LADDER], np.float32)
BOT_TABLE = np.array([list(BOTS[name]) for name in NAMES], np.float32)


def begin(key, env: Football, rung) -> FootballState:
    """A level of each match's rung (B,)."""
    num = rung.shape[0]
    keys = jax.random.split(key, 5)
    row = jnp.asarray(TABLE)[rung].T
    u = jax.random.uniform(keys[0], (4, num))
    ball_x, ball_y = row[3] + (row[4] - row[3]) * u[0], 0.8 * u[1] - 0.4
    anywhere = env.sample_level(keys[1], (num,)).reshape(21, 2, num)
    small = row[0] < 10
    ball_y = jnp.where(small, 0.6 * ball_y, ball_y)
    noise = jax.random.uniform(keys[2], (2, 10, 2, num), minval=-1.0)
    near_x = jnp.stack([ball_x - 0.05 + 0.2 * noise[0, :, 0], ball_x + 0.15 + 0.2 * noise[1, :, 0]])
    near_y = ball_y + 0.2 * noise[:, :, 1]
    home = FORMATION[1:, :, None]
    shift = 0.15 + 0.5 * ball_x
    home_x = jnp.stack([home[:, 0] + shift, -home[:, 0] + shift - 0.3]) + 0.05 * noise[:, :, 0]
    home_y = jnp.stack([home[:, 1], -home[:, 1]]) + 0.05 * noise[:, :, 1] + 0.2 * ball_y
    ordered = u[2] < 0.3
    pick = lambda near, home, i: jnp.where(small, near, jnp.where(ordered, home, anywhere[:20, i].reshape(2, 10, num)))
    x, y = pick(near_x, home_x, 0), pick(near_y, home_y, 1)
    spots = jnp.stack([x, y], axis=2).reshape(20, 2, num)
    spots = jnp.clip(spots, -jnp.array([0.95, 0.4])[:, None], jnp.array([0.95, 0.4])[:, None])
    level = jnp.concatenate([spots, jnp.stack([ball_x, ball_y])[None]])
    state = env.reset_to_level(level.reshape(LEVEL_SIZE, num))
    number = np.arange(11)[:, None]
    out = jnp.stack([number > row[0], jnp.where(number == 0, row[2] == 0, number > row[1])])
    return send_off(state, out)


# --- playing


class Rivals(NamedTuple):
    """Who plays right in each of B matches."""

    team: Team  # (G, ...): each for B / G matches
    bot: Bot  # (B,)
    is_team: jax.Array  # (B,) bool


def rivals_act(key, rivals: Rivals, state: FootballState, left) -> jax.Array:
    """(10, B)."""
    key_team, key_bot = jax.random.split(key)
    whole, own = views(state, left, 1)
    groups = rivals.team.whole.shape[0]
    split = lambda x: x.reshape(*x.shape[:-1], groups, -1)
    logits = jax.vmap(apply_team, (0, 1, 2), 2)(rivals.team, split(whole), split(own))
    by_team, _ = sample_actions(key_team, logits.reshape(*logits.shape[:2], -1))
    both = Bot(*(jnp.stack([x, x]) for x in rivals.bot))
    return jnp.where(rivals.is_team, by_team, bot_actions(key_bot, state, both)[10:])


def skills(rivals: Rivals) -> jax.Array:
    right = jnp.where(rivals.is_team, 1.0, rivals.bot.skill)
    return jnp.stack([jnp.ones_like(right), right])


class Step(NamedTuple):
    """What the learner's team saw, did and got: (T, ..., B)."""

    whole: jax.Array
    own: jax.Array
    active: jax.Array
    action: jax.Array
    log_prob: jax.Array
    value: jax.Array
    reward: jax.Array
    done: jax.Array


def crowding(state: FootballState) -> jax.Array:
    """Pairs of a team's players within 3 m (2, B), by 10."""
    x, y, on = state.x[:, 1:], state.y[:, 1:], state.active[:, 1:]
    near = (x[:, :, None] - x[:, None]) ** 2 + (y[:, :, None] - y[:, None]) ** 2 < 9.0
    return ((near & on[:, :, None] & on[:, None]).sum((1, 2)) - on.sum(1)) / 20.0


def rewards(config: Config, state: FootballState, info, extra) -> jax.Array:
    """The left team's (B,)."""
    goal, passed, owned = (info[name].astype(jnp.float32) for name in ("goal", "completed", "owned"))
    out = info["restart"].astype(jnp.float32)[::-1] - goal
    each = goal + config.checkpoint_coef * extra + config.pass_coef * passed + config.hold_coef * owned
    each = each - config.crowd_coef * crowding(state) - config.out_coef * out
    return each[0] - each[1]


def rollout(key, config: Config, env: Football, params, rivals: Rivals, start: FootballState):
    """-> Step, the last values, and sums over finished levels per match: levels, won, lost (3, B)."""
    env_params = FootballParams(skills(rivals), config.horizon)

    def step(carry, key):
        state, count = carry
        key_act, key_rival, key_env = jax.random.split(key, 3)
        left = 1.0 - state.time / config.horizon
        whole, own = views(state, left)
        action, log_prob = sample_actions(key_act, apply_team(params["actor"], whole, own))
        active = state.active[0, 1:]
        value = critic(params["critic"], whole, active)
        actions = jnp.concatenate([action, rivals_act(key_rival, rivals, state, left)])
        _, state, _, terminated, info = env.step_env(key_env, state, actions, env_params)
        extra, rings = checkpoints(state, info["goal"].astype(jnp.float32))
        state = state._replace(rings=rings)
        reward = rewards(config, state, info, extra)
        done = terminated | (state.time >= config.horizon)
        count = count + jnp.stack([done, info["goal"][0], info["goal"][1]])
        state = jax.tree.map(lambda old, new: jnp.where(done, old, new), start, state)
        return (state, count), Step(whole, own, active, action.astype(jnp.int8), log_prob, value, reward, done)

    count = jnp.zeros((3, start.time.shape[0]), jnp.int32)
    (state, count), steps = jax.lax.scan(step, (start, count), jax.random.split(key, config.horizon))
    last = critic(params["critic"], views(state, 1.0 - state.time / config.horizon)[0], state.active[0, 1:])
    return steps, last, count


# --- learning


def policy_loss(log_ratio, adv, active, clip_eps: float, joint: bool):
    """Clipped surrogate; log_ratio, active (10, ...), adv (...)."""
    on = active.astype(jnp.float32)
    if joint:
        log_ratio, weight = (log_ratio * on).sum(0), jnp.ones_like(adv)
    else:
        weight = on / on.sum(0)
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - clip_eps, 1 + clip_eps)
    loss = -(weight * jnp.minimum(ratio * adv, clipped * adv)).sum() / adv.size
    return loss, (weight * (jnp.abs(ratio - 1) > clip_eps)).sum() / adv.size


def loss_fn(params, config: Config, step: Step, adv, target):
    """One time step of B matches."""
    logits = apply_team(params["actor"], step.whole, step.own)
    log_probs = jax.nn.log_softmax(logits, axis=0)
    kind = np.arange(19)[:, None, None]
    log_prob = jnp.where(kind == step.action, log_probs, 0.0).sum(0)
    surrogate, clipped = policy_loss(log_prob - step.log_prob, adv, step.active, config.clip_eps, config.ratio == "joint")
    value = critic(params["critic"], step.whole, step.active)
    value_loss = 0.5 * ((value - target) ** 2).mean()
    on = step.active.astype(jnp.float32)
    each = -(jnp.exp(log_probs) * log_probs).sum(0) * on
    entropy = each.sum() / on.sum()
    bonus = each.sum(0).mean() if config.ratio == "joint" else entropy
    loss = surrogate + config.vf_coef * value_loss - config.ent_coef * bonus
    return loss, {"loss": loss, "value_loss": value_loss, "entropy": entropy, "clip_fraction": clipped}


def learn(key, config: Config, tx, params, opt_state, steps: Step, adv, target):
    adv = (adv - adv.mean()) / (adv.std() + 1e-5)
    rows = config.horizon // config.num_minibatches

    def minibatch(carry, index):
        params, opt_state = carry

        def row(total, i):
            pick = lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
            step = jax.tree.map(pick, steps)
            (_, info), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, config, step, pick(adv), pick(target))
            return jax.tree.map(jnp.add, total, (grads, info)), None

        like = jax.eval_shape(lambda: jax.value_and_grad(loss_fn, has_aux=True)(params, config, jax.tree.map(lambda x: x[0], steps), adv[0], target[0]))
        (_, info), grads = like
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (grads, info))
        (grads, info), _ = jax.lax.scan(row, zero, index)
        grads, info = jax.tree.map(lambda x: x / rows, (grads, info))
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), info | {"grad_norm": optax.global_norm(grads)}

    order = jax.vmap(lambda k: jax.random.permutation(k, config.horizon))(jax.random.split(key, config.num_epochs))
    order = order.reshape(config.num_epochs * config.num_minibatches, rows)
    (params, opt_state), info = jax.lax.scan(minibatch, (params, opt_state), order)
    return params, opt_state, jax.tree.map(jnp.mean, info)


# --- training


def make_train(config: Config) -> Train:
    env = Football(max_steps_in_episode=config.horizon)
    steps_total = config.num_updates * config.num_epochs * config.num_minibatches
    tx = optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm), optax.adam(optax.linear_schedule(config.lr, config.lr / 10, steps_total), eps=1e-5)
    )
    size = config.league_size
    every = max(config.num_updates // size, 1)

    def init(key):
        key, key_actor, key_critic = jax.random.split(key, 3)
        params = {"actor": init_team(key_actor, config.hidden), "critic": init_critic(key_critic, config.hidden)}
        league = jax.tree.map(lambda x: jnp.zeros((size, *x.shape)), params["actor"])
        return State(params, tx.init(params), league, jnp.zeros(size, jnp.int32), jnp.full(size, 0.5), jnp.int32(0), jnp.zeros(2), key)

    def update(state: State, t):
        key, key_who, key_level, key_play, key_learn = jax.random.split(state.key, 5)
        rung, rivals, slot = draw_rivals(key_who, config, state, t)
        start = begin(key_level, env, rung)
        start, rivals_bot, is_team = jax.tree.map(lambda x: shard_batch(x, x.ndim - 1), (start, rivals.bot, rivals.is_team))
        rivals = rivals._replace(bot=rivals_bot, is_team=is_team)
        steps, last, count = rollout(key_play, config, env, state.params, rivals, start)
        adv, target = gae(steps.reward, steps.value, steps.done, last, config.gamma, config.gae_lambda)
        params, opt_state, info = learn(key_learn, config, tx, state.params, state.opt_state, steps, adv, target)
        state = state._replace(params=params, opt_state=opt_state, key=key)
        state, more = keep_score(config, state, rung, rivals, slot, count, t)
        due = ((t + 1) % every == 0) & (jnp.arange(size) == ((t + 1) // every - 1) % size)
        keep = lambda old, new: jnp.where(due.reshape(-1, *[1] * (old.ndim - 1)), new, old)
        state = state._replace(
            league_params=jax.tree.map(keep, state.league_params, params["actor"]),
            born=jnp.where(due, t + 1, state.born),
            points=jnp.where(due, 0.5, state.points),
        )
        info |= more | {"env_steps": (t + 1) * config.num_matches * config.horizon, "reward": steps.reward.sum(0).mean()}
        return state, info

    return Train(init, update, partial(evaluate, config), config.num_updates)


def draw_rivals(key, config: Config, state: State, t):
    """-> each match's rung (B,), Rivals, and the slot of the league of each group, -1 for the newest self (G,)."""
    keys = jax.random.split(key, 5)
    num, groups = config.num_matches, config.num_groups
    u = jax.random.uniform(keys[0], (4, num))
    rung = jnp.where(u[0] < 0.6, state.rung, (u[1] * (state.rung + 1)).astype(jnp.int32))
    top = rung == TOP
    is_team = top & (u[2] >= config.bot_share)
    bot = jnp.where(top, 1 + (u[3] * (len(NAMES) - 1)).astype(jnp.int32), jnp.asarray(TABLE)[rung, 5].astype(jnp.int32))
    bots = Bot(*jnp.asarray(BOT_TABLE)[bot].T)
    hard = t >= config.generalise_from * config.num_updates
    weight = jnp.where(hard, (1.0 - state.points) ** 2, 1.0) * (state.born > 0) + 1e-9
    slot = jax.random.categorical(keys[1], jnp.log(weight), shape=(groups,))
    newest = jax.random.uniform(keys[2], (groups,)) < jnp.where(hard, 0.3, config.newest_share)
    newest = newest | (state.born.max() == 0)
    slot = jnp.where(newest, -1, slot)
    choose = lambda league, new: jnp.where((slot < 0).reshape(-1, *[1] * (league.ndim - 1)), new, league[slot])
    team = jax.tree.map(choose, state.league_params, state.params["actor"])
    return rung, Rivals(team, bots, is_team), slot


def keep_score(config: Config, state: State, rung, rivals: Rivals, slot, count, t):
    levels, won, lost = count
    here = rung == state.rung
    sums = jnp.stack([levels, won, lost]) * here
    n = jnp.maximum(sums[0].sum(), 1)
    rate = sums[1:].sum(1) / n
    mean = 0.8 * state.won + 0.2 * rate
    row = jnp.asarray(TABLE)[state.rung]
    up = (mean[0] >= row[6]) & (mean[0] >= config.climb_at * mean.sum())
    forced = (TOP * t / (config.ladder_share * config.num_updates)).astype(jnp.int32)
    rung_new = jnp.clip(jnp.maximum(state.rung + up, forced), 0, TOP)
    moved = rung_new != state.rung
    group = lambda x: (x * rivals.is_team).reshape(config.num_groups, -1).sum(1)
    hot = slot[:, None] == jnp.arange(config.league_size)
    played = (group(levels)[:, None] * hot).sum(0)
    got = (group(0.5 * (levels + won - lost))[:, None] * hot).sum(0)
    points = jnp.where(played > 0, 0.9 * state.points + 0.1 * got / jnp.maximum(played, 1), state.points)
    state = state._replace(rung=rung_new, won=jnp.where(moved, 0.0, mean), points=points)
    return state, {"rung": state.rung * 1.0, "won": rate[0], "lost": rate[1]}


# --- evaluation


def contest(key, config: Config, team: Team, rivals: Rivals, env: Football, start: FootballState):
    """One level each: (2, B) bool, who scored. team (G, ...)."""
    env_params = FootballParams(skills(rivals), config.horizon)

    def step(carry, key):
        state, goals = carry
        key_act, key_rival, key_env = jax.random.split(key, 3)
        left = 1.0 - state.time / config.horizon
        action, _ = sample_actions(key_act, apply_team(team, *views(state, left)))
        actions = jnp.concatenate([action, rivals_act(key_rival, rivals, state, left)])
        _, state, _, _, info = env.step_env(key_env, state, actions, env_params)
        return (state, jnp.where(goals.any(0), goals, info["goal"])), None

    goals = jnp.zeros((2, start.time.shape[0]), bool)
    (_, goals), _ = jax.lax.scan(step, (start, goals), jax.random.split(key, config.horizon))
    return goals


def evaluate(config: Config, state: State) -> dict:
    env = Football(max_steps_in_episode=config.horizon)
    key_level, key_play = jax.random.split(jax.random.fold_in(state.key, 0))
    num = config.eval_matches
    names = NAMES
    which = jnp.repeat(jnp.arange(len(names)), num)
    start = env.reset_to_level(env.sample_level(key_level, (len(which),)))
    team = state.params["actor"]
    rivals = Rivals(jax.tree.map(lambda x: x[None], team), Bot(*jnp.asarray(BOT_TABLE)[which].T), jnp.zeros(len(which), bool))
    goals = contest(key_play, config, team, rivals, env, start).reshape(2, len(names), num).sum(-1)
    out = {}
    for i, name in enumerate(names):
        out[f"share_{name}"] = (goals[0, i] + 0.0) / jnp.maximum(goals[:, i].sum(), 1)
        out[f"goals_{name}"] = goals[0, i] / num
        out[f"conceded_{name}"] = goals[1, i] / num
    return out


if __name__ == "__main__":
    run(cli(Config, __doc__, {"cpu": CPU, "paper": PAPER}), make_train, highlights=("rung", "won"))
