"""An expert for CoinRun: random shooting on the true dynamics. Pure functions of the state, for data and as an upper bound."""

import jax
import jax.numpy as jnp
import numpy as np

from envs.coinrun import CoinRun, EnvParams, EnvState

KEYS = np.array([8, 8, 8, 7, 7, 4, 5, 2, 1, 6], np.int32)  # what plans are made of: mostly to the right
NUM_PLANS, HOLD, SEGMENTS = 40, 4, 6  # plans a move; steps that a key is held; keys in a plan


def sample_plans(key) -> jax.Array:
    """(NUM_PLANS, HOLD * SEGMENTS) int32: always right, always right and jump, and random ones."""
    plans = jnp.asarray(KEYS)[jax.random.randint(key, (NUM_PLANS, SEGMENTS), 0, len(KEYS))]
    plans = plans.at[:2].set(np.array([[7], [8]], np.int32))
    return jnp.repeat(plans, HOLD, axis=1)


def score(env: CoinRun, state: EnvState, params: EnvParams, plan) -> jax.Array:
    """How far right a plan (T,) gets; a coin is worth more than any way, more if soon, and death less than any, less if soon."""

    def step(carry, action):
        state, value, going = carry
        _, after, reward, terminated, _ = env.step_env(None, state, action, params)
        end = jnp.where(reward > 0, 1000.0, -1000.0) * (1 - 0.01 * (after.time - start.time))
        value = jnp.where(going, jnp.where(terminated, end, after.x), value)
        return (after, value, going & ~terminated), None

    start = state
    (_, value, _), _ = jax.lax.scan(step, (state, state.x, jnp.bool_(True)), plan)
    return value


def make_planner(env: CoinRun):
    """-> plan(key, state, params) -> (HOLD * SEGMENTS,) int32: the best of NUM_PLANS plans."""

    def plan(key, state: EnvState, params: EnvParams) -> jax.Array:
        plans = sample_plans(key)
        values = jax.vmap(lambda plan: score(env, state, params, plan))(plans)
        return plans[values.argmax()]

    return plan


def make_expert(env: CoinRun):
    """-> policy(key, state, params) -> action: the first key of a plan made anew at every step."""
    plan = make_planner(env)
    return lambda key, state, params: plan(key, state, params)[0]
