"""An expert for CoinRun: the best of some plans on the true dynamics, as pure functions of the state. For data, and a bound."""

import jax
import jax.numpy as jnp
import numpy as np

from envs.coinrun import CoinRun, EnvParams, EnvState

KEYS = np.array([8, 7, 4, 5, 2, 1, 6], np.int32)  # the expert's, the preferred first: right and jump, right, ...
SHARES = np.array([0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1])  # of each in plans
NUM_PLANS, HOLD, SEGMENTS = 64, 4, 4  # plans; steps that a key is held; keys in a plan, which reaches little further than is seen
MARGIN = 1.0  # cells: what a plan must gain to be worth a key less preferred


def make_plans() -> tuple[np.ndarray, np.ndarray]:
    """Which of KEYS each plan begins with (NUM_PLANS,), and its keys (NUM_PLANS, HOLD * SEGMENTS).

    First each key held, then random plans, which are the same at every state.
    """
    plans = np.random.default_rng(0).choice(len(KEYS), (NUM_PLANS, SEGMENTS), p=SHARES)
    plans[: len(KEYS)] = np.arange(len(KEYS))[:, None]
    return plans[:, 0], KEYS[plans].repeat(HOLD, axis=1)


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


def make_expert(env: CoinRun):
    """-> policy(key, state, params) -> action: the key preferred of those that the best plans begin with.

    It is a function of the state, and changes its mind for something only: so it can be cloned.
    """
    first, plans = make_plans()
    begins = jnp.asarray(first == np.arange(len(KEYS))[:, None])  # (keys, plans)

    def policy(key, state: EnvState, params: EnvParams) -> jax.Array:
        values = jax.vmap(lambda plan: score(env, state, params, plan))(jnp.asarray(plans))
        best = jnp.where(begins, values, -jnp.inf).max(1)
        return jnp.asarray(KEYS)[(best >= best.max() - MARGIN).argmax()]

    return policy
