"""Skills of the planar humanoid: policies that follow commands, and the noisy demonstrations that H-GAP learns from.

MoCapAct's recipe (2208.07363), by which H-GAP's data were made, at a small scale: a policy for each skill is trained by
reinforcement learning (there by tracking a clip of motion capture, here by algos/humanoid_experts.py, on commands), then it is
rolled out with noise of standard deviation 0.1 on its actions. What it is commanded changes now and then, and is not recorded.
"""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common.env import shipped
from common.nn import dense
from envs.humanoid import CROUCHING, REST_ACTION, STANDING, Humanoid

FILE = "humanoid_skills.npz"  # in envs/data
SKILLS = ("walk", "stand", "crouch", "hop", "dive")
PERIOD = 20  # control steps of a cycle of the clock that times steps and hops
FASTEST, SLOWEST = 2.5, -1.2  # commanded speed, m/s
NOISE = 0.1  # of demonstrations' actions


class Command(NamedTuple):
    """What a policy is told to do; any batch axes."""

    skill: jax.Array  # int32: which of SKILLS
    speed: jax.Array  # m/s, ahead
    height: jax.Array  # of the pelvis, m
    clock: jax.Array  # int32: control steps


def new_command(key, chances) -> Command:
    """Draws one command; `chances` (5,) of each skill."""
    key_skill, key_speed, key_height, key_clock = jax.random.split(key, 4)
    skill = jax.random.categorical(key_skill, jnp.log(jnp.asarray(chances, jnp.float32) + 1e-9)).astype(jnp.int32)
    speed = jax.random.uniform(key_speed, (), jnp.float32, SLOWEST, FASTEST)
    low = jax.random.uniform(key_height, (), jnp.float32, CROUCHING - 0.1, STANDING)
    walking, hopping, crouching = skill == 0, skill == 3, skill == 2
    speed = jnp.where(walking, speed, jnp.where(hopping, 0.4 * speed, 0.0))
    clock = jax.random.randint(key_clock, (), 0, PERIOD, jnp.int32)
    return Command(skill, speed, jnp.where(crouching, low, STANDING).astype(jnp.float32), clock)


def phase(command: Command) -> jax.Array:
    """Of the cycle, in [0, 1)."""
    return (command.clock % PERIOD) / np.float32(PERIOD)


def timed(command: Command) -> jax.Array:
    """Whether the clock counts: when walking and hopping, 1, else 0."""
    return ((command.skill == 0) | (command.skill == 3)).astype(jnp.float32)


def command_features(command: Command) -> jax.Array:
    """What a policy sees of its command, (..., 6)."""
    turn, on = 2 * np.float32(np.pi) * phase(command), timed(command)
    hop, dive = (command.skill == 3).astype(jnp.float32), (command.skill == 4).astype(jnp.float32)
    height = (command.height - STANDING) * 5
    return jnp.stack([command.speed, height, hop, dive, on * jnp.sin(turn), on * jnp.cos(turn)], axis=-1)


FEATURES = 6


def act(params, obs, command: Command) -> jax.Array:
    """The mean action (..., 12) of a policy for observations (..., 56) and commands (...)."""
    seen = jnp.clip((obs - params["mean"]) / params["std"], -5, 5)
    h = jnp.concatenate([seen, command_features(command)], axis=-1)
    for layer in params["layers"][:-1]:
        h = jnp.tanh(dense(layer, h))
    return REST_ACTION + dense(params["layers"][-1], h)


# --- files


def save_skills(path: Path, policies: dict, about: str) -> None:
    """Writes policies by name, float16, and a line on where they come from."""
    arrays = {"about": np.array(about)}
    for name, params in policies.items():
        for place, x in jax.tree_util.tree_leaves_with_path(params):
            arrays[f"{name}/{jax.tree_util.keystr(place, simple=True, separator='/')}"] = np.asarray(x, np.float16)
    np.savez_compressed(path, **arrays)


def load_skills(path: Path | None = None) -> dict:
    """Policies by name, those that are shipped without a path. Raises OSError or KeyError where the file is not such a file."""
    policies, path = {}, path or shipped(FILE, "python algos/humanoid_experts.py pack")
    with np.load(path, allow_pickle=False) as file:
        for name in file.files:
            if name != "about":
                policy, *place = name.split("/")
                policies.setdefault(policy, {})["/".join(place)] = file[name].astype(np.float32)
    return {name: nested(flat) for name, flat in policies.items()}


def nested(flat: dict) -> dict:
    """A policy from its arrays by name."""
    num = 1 + max(int(name.split("/")[1]) for name in flat if name.startswith("layers/"))
    layers = [{part: flat[f"layers/{i}/{part}"] for part in ("w", "b")} for i in range(num)]
    return {"mean": flat["mean"], "std": flat["std"], "layers": layers}


# --- demonstrations


class Demonstrations(NamedTuple):
    """Episodes of N demonstrators, T steps each, one episode after the other."""

    obs: jax.Array  # (N, T, O)
    action: jax.Array  # (N, T, A): what was done, noise included
    left: jax.Array  # (N, T) int32: steps of the same episode from here on, this one included; 0: nothing is there
    fell: jax.Array  # (N, T) bool: more than feet touched the ground during the step


def demonstrate(key, policies: dict, num: int, blocks: int, block: int = 50, diving: float = 0.125):
    """`blocks` x `block` steps of `num` humanoids, the last `diving` of which dive -> Demonstrations, the worlds (..., blocks, N)
    in which blocks begin. A fall ends an episode, and the next begins where it stands up; so does one of diving now and then."""
    env, num_diving = Humanoid(), int(num * diving)
    dives = np.arange(num) >= num - num_diving
    chances = np.where(dives[:, None], np.eye(len(SKILLS))[SKILLS.index("dive")], np.array([0.5, 0.1, 0.2, 0.2, 0.0]))
    key_world, key_command, key_play = jax.random.split(key, 3)
    params, fresh = env.default_params, jax.vmap(lambda key: env.reset_env(key, env.default_params)[1], out_axes=-1)
    draw = lambda key: jax.vmap(new_command)(jax.random.split(key, num), jnp.asarray(chances, jnp.float32))
    first = num - num_diving

    def step(carry, key):
        world, command = carry
        key_noise, key_fresh, key_what, key_when = jax.random.split(key, 4)
        obs = env.get_obs(world).T
        parts = (("gaits", slice(0, first)), ("dive", slice(first, num)))
        mean = jnp.concatenate([act(policies[name], obs[s], jax.tree.map(lambda x, s=s: x[s], command)) for name, s in parts])
        action = jnp.clip(mean + NOISE * jax.random.normal(key_noise, mean.shape, jnp.float32), -1, 1)
        _, moved, _, _, info = env.step_env(None, world, action.T, params)
        renew, again = jax.random.uniform(key_when, (2, num), jnp.float32)
        over = jnp.where(dives, again < 1 / 120, info["fallen"])
        world = jax.tree.map(lambda x, y: jnp.where(over, x, y), fresh(jax.random.split(key_fresh, num)), moved)
        told, command = draw(key_what), command._replace(clock=command.clock + 1)
        command = jax.tree.map(lambda x, y: jnp.where(over | (renew < 0.01), x, y), told, command)
        return (world, command), (obs, action, over, info["fallen"])

    def play_block(carry, key):
        carry, steps = jax.lax.scan(step, carry, jax.random.split(key, block))
        return carry, (carry[0], steps)

    start = fresh(jax.random.split(key_world, num)), draw(key_command)
    _, (worlds, steps) = jax.lax.scan(play_block, start, jax.random.split(key_play, blocks))
    obs, action, over, fell = (jnp.moveaxis(x.reshape(-1, *x.shape[2:]), 1, 0) for x in steps)
    begun = jax.tree.map(lambda x, y: jnp.concatenate([x[None], y[:-1]]), start[0], worlds)
    return Demonstrations(obs, action, steps_left(over), fell), jax.tree.map(lambda x: jnp.moveaxis(x, 0, -2), begun)


def steps_left(over) -> jax.Array:
    """Where episodes end (N, T) bool -> how many steps of each are left, (N, T) int32."""
    count = lambda left, over: ((left := jnp.where(over, 0, left) + 1), left)
    return jax.lax.scan(count, jnp.zeros(len(over), jnp.int32), over.T, reverse=True)[1].T


def window_starts(left: np.ndarray, length: int) -> np.ndarray:
    """Demonstrator and step at which the windows of `length` steps begin that lie within one episode: (M, 2) int32."""
    return np.argwhere(left >= length).astype(np.int32)
