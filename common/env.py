"""The environment interface: gymnax 1.0's signature without importing gymnax (its import starts the XLA backend).

Worlds written on this base run unchanged in gymnax code, its wrappers included.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from common.runs.config import require


class Environment:
    """A world as pure functions. Subclasses define `reset_env`, `step_env`, `get_obs`, the two spaces and `num_actions`."""

    @property
    def default_params(self):
        """Numbers that may differ between calls without a recompile (a pytree with `max_steps_in_episode`)."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """The world's name."""
        return type(self).__name__

    def reset(self, key: jax.Array, params=None):
        """-> obs, state."""
        return self.reset_env(key, self.default_params if params is None else params)

    def step(self, key: jax.Array, state, action, params=None):
        """One step with auto-reset -> obs, state, reward, terminated, truncated, info.

        `info["final_observation"]` is the observation before the reset.
        """
        params = self.default_params if params is None else params
        key_step, key_reset = jax.random.split(key)
        obs, state, reward, terminated, info = self.step_env(key_step, state, action, params)
        truncated = self.is_truncated(state, params)
        info = {**info, "terminated": terminated, "truncated": truncated, "final_observation": obs}
        _, fresh = self.reset_env(key_reset, params)
        state = select(terminated | truncated, fresh, state)
        return self.get_obs(state, params), state, reward, terminated, truncated, info  # one view, where nobody reads the final one

    def is_truncated(self, state, params) -> jax.Array:
        """Whether the time limit is reached."""
        return state.time >= params.max_steps_in_episode


def select(condition: jax.Array, on_true, on_false):
    """Leaf-wise `where` of two pytrees by one scalar condition."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), on_true, on_false)


def in_32_bits(tree):
    """A pytree of numbers of another library as JAX has them without JAX_ENABLE_X64, none of them weakly typed."""
    kinds = {"float64": "float32", "int64": "int32"}
    return jax.tree.map(lambda x: jax.lax.convert_element_type(x, kinds.get(str(x.dtype), x.dtype)), tree)


class BankState(NamedTuple):
    """The state of an environment that takes its levels from a bank."""

    env: Any
    index: jax.Array  # int32: the place in the bank of the level being played


def reset_from_bank(env, bank, params):
    """Starts the first level of `bank`, a level pytree with a leading axis R -> obs, BankState."""
    state = env.reset_to_level(jax.tree.map(lambda x: x[0], bank), params)
    return env.get_obs(state, params), BankState(state, jnp.int32(0))


def step_from_bank(env, key, state: BankState, action, bank, params):
    """One step; where the episode ends (for either reason) the bank's next level begins, in turn.

    -> obs, BankState, reward, done. A bank of one level replays that level.
    """
    _, env_state, reward, terminated, _ = env.step_env(key, state.env, action, params)
    done = terminated | env.is_truncated(env_state, params)
    index = (state.index + done) % jax.tree.leaves(bank)[0].shape[0]
    fresh = env.reset_to_level(jax.tree.map(lambda x: x[index], bank), params)
    env_state = select(done, fresh, env_state)
    return env.get_obs(env_state, params), BankState(env_state, index), reward, done


def begin_evolution(state):
    """A new state of evosax's in 32 bits, its best solution 0 until there is one: JAX_DEBUG_NANS takes its NaN for a fault."""
    return in_32_bits(state.replace(best_solution=jnp.zeros_like(state.best_solution)))


def _of_one(space):
    """A space of observations without its leading axis of agents."""
    from gymnax.environments import spaces  # on use only: gymnax starts the backend when it is imported

    if isinstance(space, spaces.Dict):
        return spaces.Dict({name: _of_one(part) for name, part in space.spaces.items()})
    return spaces.Box(space.low, space.high, space.shape[1:], space.dtype)


class DictView:
    """JaxMARL's interface to a world with a stacked agent axis: observations, actions and rewards in dicts keyed by agent."""

    def __init__(self, env: Environment):
        self.env, self.num_agents = env, env.num_agents
        self.agents = [f"agent_{i}" for i in range(env.num_agents)]

    def action_space(self, agent: str | None = None):
        """An agent's, in gymnax's terms."""
        return self.env.action_space()

    def observation_space(self, agent: str | None = None):
        """An agent's: the world's without the axis of agents."""
        return _of_one(self.env.observation_space())

    def _split(self, tree) -> dict:
        return {name: jax.tree.map(lambda x, i=i: x[i], tree) for i, name in enumerate(self.agents)}

    def reset(self, key: jax.Array, params=None):
        """-> obs dict, state."""
        obs, state = self.env.reset(key, params)
        return self._split(obs), state

    def step(self, key: jax.Array, state, actions: dict, params=None):
        """One step with auto-reset -> obs, state, rewards, dones (with `__all__`), info; all but state are dicts."""
        stacked = jnp.stack([actions[name] for name in self.agents])
        obs, state, reward, terminated, truncated, info = self.env.step(key, state, stacked, params)
        dones = dict.fromkeys([*self.agents, "__all__"], terminated | truncated)
        return self._split(obs), state, self._split(reward), dones, info


def shipped(name: str, maker: str) -> Path:
    """A file of envs/data, also for a method that was copied out of this repository. Raises UsageError where it is not there;
    maker: the command that makes one."""
    found = find_spec("envs")
    paths = [Path(folder) / "data" / name for folder in (found.submodule_search_locations if found else ())]
    there = [path for path in paths if path.is_file()]
    require(bool(there), f"envs/data/{name} is not there; {maker} makes it")
    return there[0]
