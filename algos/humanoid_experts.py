"""Experts of the planar humanoid: policies that follow commands; their noisy rollouts are H-GAP's data (as MoCapAct, 2208.07363).

H-GAP (2312.02682) learns from MoCapAct, in which 2589 policies each track a snippet of motion capture. Here two policies are
trained by PPO (1707.06347): `gaits` walks, runs, walks backwards, stands, crouches and hops as it is told by a speed, a height and
a clock; `dive` throws itself forwards onto its hands and struggles to get over its head (rewarded for turning, it does not learn
to roll). What they do is drawn inside jit by envs/humanoid_skills.py.

Run:     python algos/humanoid_experts.py gaits
         python algos/humanoid_experts.py dive --num-updates 240
         python algos/humanoid_experts.py pack --load runs/humanoid_experts/1 runs/humanoid_experts/2   (both, as the shipped file)
Paper:   --preset paper: 150 million steps, as many as a MoCapAct expert
Expect:  falls nearly gone, speed followed within 0.3 m/s; videos/skills.gif shows what each command makes it do

Differs from MoCapAct (its own way in brackets):
 1. Rewards say what a gait is: which foot is in the air when by a clock (after 2011.01387), arms that swing, a trunk that
    is upright (the distance from a clip of motion capture).
 2. One policy has all gaits, by commands that change about every 100 steps (a policy for each snippet).
 3. The body is planar, with 12 joints (56).
 4. Networks of 2 x 128 units (3 x 1024), and 20 million steps (150 million, each).
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tyro.conf import Positional

from common.nn import dense, init_dense
from common.ppo import gae
from common.runs import RunConfig, Train, cli, require, require_multiple, require_range, run, shard_batch
from common.runs.earlier import find_run, read_state
from common.runs.loop import faults_in_one_line
from envs.humanoid import STANDING, Humanoid, HumanoidState, forward, near, split
from envs.humanoid_skills import FEATURES, FILE, Command, act, command_features, new_command, phase, save_skills, timed

CHANCES = {"gaits": (0.5, 0.1, 0.2, 0.2, 0.0), "dive": (0.0, 0.0, 0.0, 0.0, 1.0)}  # of each skill
SWING = 0.4  # share of the cycle that a foot is in the air


@dataclass(frozen=True)
class Config(RunConfig):
    """Settings of the experts' training."""

    may_grow = ("num_updates",)
    compiler_options = {"xla_disable_hlo_passes": "fusion"}  # which repeats so much of the physics that it takes twice as long
    stage: Positional[Literal["gaits", "dive", "pack"]] = "gaits"
    """Which expert to train; or `pack`: write the policies of finished runs as the file that is shipped, or as --out."""
    load: tuple[str, ...] = ()
    """The runs whose policies `pack` writes, in any order."""
    num_envs: int = 1024
    """Humanoids that are simulated side by side."""
    num_steps: int = 24
    """Steps of each of them in an update."""
    hidden: int = 128
    """Units of each of the two hidden layers of the policy and of the value function."""
    lr: float = 1e-3
    """Adam's learning rate at the start."""
    target_kl: float = 0.015
    """The learning rate falls where policies move more than this between updates, and rises where less."""
    gamma: float = 0.97
    """Discount."""
    gae_lambda: float = 0.95
    """Decay of advantages."""
    clip_eps: float = 0.2
    """PPO's clipping."""
    ent_coef: float = 0.005
    """Weight of the entropy."""
    num_epochs: int = 4
    """Passes over an update's steps."""
    num_minibatches: int = 4
    """Parts in which each pass takes them."""
    init_std: float = 0.3
    """Standard deviation of actions at the start."""
    eval_steps: int = 200
    """Steps of an evaluation."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_envs", "num_steps", "hidden", "num_epochs", "num_minibatches", "eval_steps"):
            require(getattr(self, name) >= 1, f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        require_range(self, 0, 1, "gamma", "gae_lambda", "clip_eps", "ent_coef", "init_std", "lr", "target_kl")
        require_multiple(self, "num_envs", "num_minibatches")

    @property
    def split_size(self) -> int:
        return self.num_envs // self.num_minibatches


PAPER = Config(num_envs=4096, num_updates=1530, hidden=1024, eval_every=100, save_every=100, preset="paper")
CPU = replace(PAPER, num_envs=1024, num_updates=800, hidden=128, eval_every=200, save_every=100, preset="cpu")


class State(NamedTuple):
    """All of one seed's run."""

    params: dict  # actor, critic, log_std
    norm: dict  # count (), mean, square (56,): of observations
    opt_state: Any
    lr: jax.Array
    world: HumanoidState  # (..., N)
    command: Command  # (N,)
    key: jax.Array


# --- networks


def init_net(key, n_in: int, n_out: int, hidden: int, gain: float) -> list[dict]:
    """An MLP of two hidden layers."""
    keys = jax.random.split(key, 3)
    sizes = ((n_in, hidden, 2**0.5), (hidden, hidden, 2**0.5), (hidden, n_out, gain))
    return [init_dense(key, *size) for key, size in zip(keys, sizes, strict=True)]


def policy_of(params, norm) -> dict:
    """The actor as envs/humanoid_skills.py has it."""
    std = jnp.sqrt(jnp.maximum(norm["square"] - norm["mean"] ** 2, 1e-4))
    return {"mean": norm["mean"], "std": std, "layers": params["actor"]}


def value_of(params, norm, obs, command) -> jax.Array:
    """(..., 56), commands (...) -> (...)."""
    policy = policy_of(params, norm)
    seen = jnp.clip((obs - policy["mean"]) / policy["std"], -5, 5)
    h = jnp.concatenate([seen, command_features(command)], axis=-1)
    for layer in params["critic"][:-1]:
        h = jnp.tanh(dense(layer, h))
    return dense(params["critic"][-1], h)[..., 0]


def log_prob(mean, log_std, action) -> jax.Array:
    """Of an action (..., 12) under a normal distribution, up to a constant."""
    return (-0.5 * ((action - mean) * jnp.exp(-log_std)) ** 2 - log_std).sum(-1)


# --- rewards. Axes of the world: (..., N); of observations: (N, 56)


def expected_contact(command: Command) -> jax.Array:
    """Which feet should bear weight (2, N) bool: those not in their swing; hopping, both swing at once."""
    both = phase(command) + jnp.where(command.skill == 3, 0.0, 0.5)
    swinging = jnp.stack([phase(command), both % 1]) < SWING
    moving = (command.skill == 3) | ((command.skill == 0) & (jnp.abs(command.speed) > 0.2))
    return ~(swinging & moving)


def gait_reward(world: HumanoidState, command: Command, seen: dict) -> jax.Array:
    """How well it does as told, (N,), about 1 at best."""
    turn = 2 * np.float32(np.pi) * phase(command)
    bounce = jnp.where(command.skill == 3, 0.12 * jnp.sin(np.float32(np.pi) * jnp.minimum(phase(command) / SWING, 1)), 0.0)
    contact = jnp.stack([world.push[0:2].sum(0), world.push[2:4].sum(0)]) > 0.02
    joints, lean, height = seen["joints_pos"], -0.06 * command.speed, seen["body_height"][:, 0]
    swing = 0.5 * timed(command) * (command.skill == 0) * jnp.sin(turn)
    shoulders = near(joints[:, 8], swing, 0.4) + near(joints[:, 10], -swing, 0.4)
    elbows = near(joints[:, 9], 0.5, 0.5) + near(joints[:, 11], 0.5, 0.5)
    error = forward(seen) - command.speed
    return (
        0.35 * near(error, 0, 0.4)
        - 0.05 * jnp.minimum(jnp.abs(error), 3)
        + 0.2 * near(height, command.height + bounce, 0.1)
        - jnp.where(command.skill == 2, 3.0, 1.0) * jnp.abs(height - command.height - bounce)
        + jnp.where(bounce > 0, jnp.clip((height - STANDING) / 0.12, -0.5, 1) + 0.3 * jnp.clip(world.vel[1], -1, 1), 0)
        + 0.1 * (near(world.angle[0], lean, 0.25) + near(world.angle[1], lean, 0.25))
        + 0.25 * (contact == expected_contact(command)).mean(0, dtype=jnp.float32)
        + 0.05 * (shoulders + elbows) / 2
        + 0.05 * near(joints[:, 1], 0, 0.3)
    )


def dive_reward(world: HumanoidState, seen: dict) -> jax.Array:
    """Turning over forwards, and getting ahead, (N,)."""
    return jnp.clip(-world.spin[0], -2, 5) / 5 + 0.2 * jnp.clip(world.vel[0], -1, 2)


def effort(world: HumanoidState, action, seen: dict) -> jax.Array:
    """What abrupt commands and fast joints cost, (N,)."""
    return 0.3 * ((action - world.act.T) ** 2).mean(-1) + 0.0004 * (seen["joints_vel"] ** 2).mean(-1)


# --- training


def make_train(config: Config) -> Train:
    """PPO as pure functions of one seed."""
    require(config.stage != "pack", "pack: trains nothing")
    env, tx = Humanoid("rotate" if config.stage == "dive" else None), optax.inject_hyperparams(optax.adam)(config.lr)
    params_env, chances = env.default_params, CHANCES[config.stage]
    fresh = jax.vmap(lambda key: env.reset_env(key, params_env)[1], out_axes=-1)
    draw = jax.vmap(lambda key: new_command(key, chances))

    def init(key):
        key, key_actor, key_critic, key_world, key_command = jax.random.split(key, 5)
        n_in = env.obs_size + FEATURES
        params = {
            "actor": init_net(key_actor, n_in, env.num_actions, config.hidden, 0.01),
            "critic": init_net(key_critic, n_in, 1, config.hidden, 1.0),
            "log_std": jnp.full(env.num_actions, np.log(config.init_std), jnp.float32),
        }
        zeros = jnp.zeros(env.obs_size, jnp.float32)
        norm = {"count": jnp.float32(1e-2), "mean": zeros, "square": zeros + 1}
        world = fresh(jax.random.split(key_world, config.num_envs))
        command = draw(jax.random.split(key_command, config.num_envs))
        return State(params, norm, tx.init(params), jnp.float32(config.lr), world, command, key)

    def move(key, world, command, action):
        """One step of all -> world, command, reward, done."""
        key_fresh, key_when, key_what = jax.random.split(key, 3)
        num = command.skill.shape[0]
        obs, moved, _, over, _ = env.step_env(None, world, action.T, params_env)
        seen = split(obs.T)
        reward = dive_reward(moved, seen) if config.stage == "dive" else gait_reward(moved, command, seen)
        reward = 0.1 * (reward - effort(world, action, seen))
        renew, again = jax.random.uniform(key_when, (2, num), jnp.float32)
        over |= again < (1 / 120 if config.stage == "dive" else 1 / 1000)
        start = fresh(jax.random.split(key_fresh, num))
        world = jax.tree.map(lambda x, y: jnp.where(over, x, y), start, moved)
        told = draw(jax.random.split(key_what, num))
        command = command._replace(clock=command.clock + 1)
        return world, jax.tree.map(lambda x, y: jnp.where(over | (renew < 0.01), x, y), told, command), reward, over

    def collect(state: State):
        """`num_steps` steps of all -> world, command, (obs, command, action, log_prob, reward, done) (T, N, ...)."""
        policy = policy_of(state.params, state.norm)

        def step(carry, key):
            world, command = carry
            obs = env.get_obs(world).T
            mean, log_std = act(policy, obs, command), state.params["log_std"]
            key_act, key_move = jax.random.split(key)
            action = mean + jnp.exp(log_std) * jax.random.normal(key_act, mean.shape, jnp.float32)
            world, told, reward, done = move(key_move, world, command, action)
            return (world, told), (obs, command, action, log_prob(mean, log_std, action), reward, done)

        return jax.lax.scan(step, (state.world, state.command), jax.random.split(state.key, config.num_steps))

    def update(state: State, t):
        key, key_play, key_learn = jax.random.split(state.key, 3)
        (world, command), traj = collect(state._replace(key=key_play))
        obs, told, action, logp, reward, done = traj
        value = value_of(state.params, state.norm, obs, told)
        last = value_of(state.params, state.norm, env.get_obs(world).T, command)
        adv, target = gae(reward, value, done, last, config.gamma, config.gae_lambda)
        batch = obs, told, action, logp, value, adv, target
        params, opt_state, info = learn(config, tx, key_learn, state, batch)
        norm = follow(state.norm, obs)
        lr = jnp.clip(state.lr * jnp.where(info["approx_kl"] > config.target_kl, 1 / 1.1, 1.1), 1e-5, 2e-3)
        seen = split(obs)
        walking = told.skill == 0
        error = jnp.where(walking, jnp.abs(forward(seen) - told.speed), 0).sum() / jnp.maximum(walking.sum(), 1)
        info |= {"reward": 10 * reward.mean(), "ends": done.mean(dtype=jnp.float32), "speed_error": error}
        info |= {"turning": -seen["gyro"].mean(), "std": jnp.exp(params["log_std"]).mean(), "lr": lr}
        steps = (t + 1).astype(jnp.float32) * (1e-6 * config.num_envs * config.num_steps)
        return State(params, norm, opt_state, lr, world, command, key), info | {"env_steps_m": steps}

    return Train(init, update, lambda state: evaluate(config, state), config.num_updates)


def follow(norm: dict, obs) -> dict:
    """Running means of observations and of their squares."""
    count = norm["count"] + 1
    share = jnp.maximum(1 / count, 0.002)
    mean, square = obs.mean((0, 1)), (obs**2).mean((0, 1))
    return {
        "count": count,
        "mean": norm["mean"] + share * (mean - norm["mean"]),
        "square": norm["square"] + share * (square - norm["square"]),
    }


def learn(config: Config, tx, key, state: State, batch):
    """PPO's epochs over an update's steps (1707.06347, Eq. 7), in groups of humanoids -> params, opt_state, info."""

    def loss(params, group):
        obs, told, action, old, value, adv, target = group
        mean = act(policy_of(params, state.norm), obs, told)
        ratio = jnp.exp(log_prob(mean, params["log_std"], action) - old)
        adv = (adv - adv.mean()) / (adv.std() + 1e-5)
        gain = jnp.minimum(ratio * adv, jnp.clip(ratio, 1 - config.clip_eps, 1 + config.clip_eps) * adv).mean()
        error = (value_of(params, state.norm, obs, told) - target) ** 2
        entropy = params["log_std"].sum()
        info = {"value_loss": error.mean(), "approx_kl": (ratio - 1 - jnp.log(ratio)).mean()}
        return -gain + 0.5 * error.mean() - config.ent_coef * entropy, info

    def step(carry, group):
        params, opt_state = carry
        grads, info = jax.grad(loss, has_aux=True)(params, jax.tree.map(shard_steps, group))
        scale = jnp.minimum(1.0, 1.0 / jnp.maximum(optax.global_norm(grads), 1e-9))
        updates, opt_state = tx.update(jax.tree.map(lambda g: g * scale, grads), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), info

    def epoch(carry, key):
        groups = jax.random.permutation(key, config.num_envs).reshape(config.num_minibatches, -1)
        split_up = jax.tree.map(lambda x: jnp.moveaxis(x[:, groups], 1, 0), batch)
        return jax.lax.scan(step, carry, split_up)

    opt_state = state.opt_state._replace(hyperparams=state.opt_state.hyperparams | {"learning_rate": state.lr})
    carry, info = jax.lax.scan(epoch, (state.params, opt_state), jax.random.split(key, config.num_epochs))
    return *carry, jax.tree.map(jnp.mean, info)


def shard_steps(x) -> jax.Array:
    """Spreads steps (T, N, ...) over the devices that share a seed, by humanoid."""
    return shard_batch(x.swapaxes(0, 1)).swapaxes(0, 1)


# --- evaluation

SHOWN = {  # what the film shows -> skill, speed, height
    "gaits": ((1, 0.0, STANDING), (0, 1.2, STANDING), (0, 2.5, STANDING), (0, -1.0, STANDING), (2, 0.0, 0.65), (3, 0.0, STANDING)),
    "dive": ((4, 0.0, STANDING),) * 2,
}


def evaluate(config: Config, state: State) -> dict:
    """Every command from the same start: what it made of it, and a film."""
    env, policy = Humanoid("rotate" if config.stage == "dive" else None), policy_of(state.params, state.norm)
    skill, speed, height = (np.array(x) for x in zip(*SHOWN[config.stage], strict=True))
    num = len(skill)
    command = Command(np.int32(skill), np.float32(speed), np.float32(height), jnp.zeros(num, jnp.int32))
    keys = jax.random.split(jax.random.key(7), num)
    world = jax.vmap(lambda key: env.reset_env(key, env.default_params)[1], out_axes=-1)(keys)

    def step(carry, _):
        world, command, alive = carry
        _, moved, _, over, _ = env.step_env(None, world, act(policy, env.get_obs(world).T, command).T, env.default_params)
        world = jax.tree.map(lambda x, y: jnp.where(alive, x, y), moved, world)
        return (world, command._replace(clock=command.clock + 1), alive & ~over), (world, alive)

    _, (worlds, alive) = jax.lax.scan(step, (world, command, jnp.ones(num, bool)), None, config.eval_steps)
    seen = split(jnp.moveaxis(jax.vmap(env.get_obs)(worlds), 1, -1))
    error = jnp.abs((forward(seen) * alive).sum(0) / alive.sum(0, dtype=jnp.float32) - np.float32(speed))
    turned = (worlds.angle[0, 0] - worlds.angle[-1, 0]) / np.float32(2 * np.pi)
    images = jax.lax.map(jax.vmap(env.render, -1), jax.tree.map(lambda x: x[::2], worlds))  # (T, num, h, w, 3)
    rows = [jnp.concatenate([images[:, i], images[:, i + 1]], axis=2) for i in range(0, num, 2)]
    return {"upright_s": 0.03 * alive.sum(0, dtype=jnp.float32).mean(), "mean_speed_error": error.mean(), "turns": turned.mean(),
            "skills": jnp.concatenate(rows, axis=1)}  # fmt: skip


# --- command


def pack(config: Config) -> None:
    """Writes the policies of finished runs (of each the first seed's) to the file that is shipped, or to --out."""
    require(config.load, "pack: give the runs, --load RUN RUN")
    policies, about = {}, []
    for folder in config.load:
        found = find_run(Path(folder), Config, "the experts")
        trained, state = found.config, jax.tree.map(lambda x: x[0], read_state(found, make_train))
        policies[trained.stage] = policy_of(state.params, state.norm)
        about.append(f"{trained.stage}: --num-updates {found.update} --seed {trained.seed} --hidden {trained.hidden}")
    path = Path(config.out) if config.out else Path("envs") / "data" / FILE
    require(path.parent.is_dir(), f"pack: there is no folder {path.parent}: give --out FILE.npz, or run it in the repository")
    save_skills(path, policies, "; ".join(about))
    print(f"{', '.join(policies)}: {path}, {path.stat().st_size / 1000:.0f} kB")


def main(config: Config) -> None:
    """Trains an expert, or packs what was trained."""
    if config.stage == "pack":
        with faults_in_one_line():
            return pack(config)
    run(config, make_train, highlights=("reward", "ends", "speed_error"))


if __name__ == "__main__":
    main(cli(Config, __doc__, {"cpu": CPU, "paper": PAPER}))
