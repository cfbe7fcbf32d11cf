"""The environment interface: gymnax 1.0's signature without importing gymnax (its import starts the XLA backend).

Worlds written on this base run unchanged in gymnax code, its wrappers included.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


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
        fresh = self.reset_env(key_reset, params)
        obs, state = select(terminated | truncated, fresh, (obs, state))
        return obs, state, reward, terminated, truncated, info

    def is_truncated(self, state, params) -> jax.Array:
        """Whether the time limit is reached."""
        return state.time >= params.max_steps_in_episode


def select(condition: jax.Array, on_true, on_false):
    """Leaf-wise `where` of two pytrees by one scalar condition."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), on_true, on_false)


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
