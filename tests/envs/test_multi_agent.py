"""What every world with several players promises: shapes, types, determinism, auto-reset, spaces, JaxMARL's dict view."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.env import DictView
from envs.coin_game import CoinGame
from envs.in_the_matrix import InTheMatrix
from envs.matrix_games import InfiniteMatrixGame, MatrixGame, n_player, two_player

WORLDS = {
    "ipd": MatrixGame(two_player("ipd"), 6),
    "tragedy5": MatrixGame(n_player("tragedy", 5), 6),
    "infinite": InfiniteMatrixGame(two_player("imp"), max_steps_in_episode=6),
    "coin_game": CoinGame(max_steps_in_episode=6),
    "in_the_matrix": InTheMatrix(max_steps_in_episode=6),
    "in_the_matrix4": InTheMatrix("imp", 4, False, max_steps_in_episode=6),
}


def actions_of(env, key, *shape):
    if isinstance(env, InfiniteMatrixGame):
        return jax.random.normal(key, (*shape, 2, 5))
    return jax.random.randint(key, (*shape, env.num_agents), 0, env.num_actions)


def episodes(env, seed):
    """Eight games side by side for 14 steps with auto-reset -> every output."""

    @jax.jit
    def play(key):
        key_reset, key_act, key_step = jax.random.split(key, 3)
        obs, state = jax.vmap(env.reset)(jax.random.split(key_reset, 8))

        def body(state, inputs):
            key, actions = inputs
            obs, state, *rest = jax.vmap(env.step)(jax.random.split(key, 8), state, actions)
            return state, (obs, state, *rest)

        _, trace = jax.lax.scan(body, state, (jax.random.split(key_step, 14), actions_of(env, key_act, 14, 8)))
        return obs, state, trace

    return jax.tree.map(np.array, play(jax.random.key(seed)))


@pytest.mark.parametrize("name", WORLDS)
def test_episodes(name):
    env = WORLDS[name]
    first_obs, first_state, (obs, state, reward, terminated, truncated, info) = episodes(env, 0)
    assert reward.shape == (14, 8, env.num_agents) and reward.dtype == np.float32
    assert terminated.shape == (14, 8) and not terminated.any()
    expected = np.zeros(14, bool)
    expected[[5, 11]] = True  # an episode of six steps, then the next
    np.testing.assert_array_equal(truncated, expected[:, None].repeat(8, 1))
    np.testing.assert_array_equal(state.time[:, 0], [1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 0, 1, 2])
    integers = [x for x in jax.tree.leaves(state) if np.issubdtype(x.dtype, np.integer)]
    assert integers and all(x.dtype == np.int32 for x in integers)
    for x, first in zip(jax.tree.leaves(obs), jax.tree.leaves(first_obs), strict=True):
        assert x.shape[2] == env.num_agents and x.shape[1:] == first.shape and x.dtype == first.dtype
        assert np.isfinite(x).all()
    seen = jax.tree.map(np.array, jax.jit(jax.vmap(jax.vmap(env.get_obs)))(state))
    jax.tree.map(np.testing.assert_array_equal, seen, obs)  # what is seen is a function of the state, after a reset too
    final = jax.tree.leaves(info["final_observation"])
    kept = ~truncated
    for x, y in zip(final, jax.tree.leaves(obs), strict=True):
        np.testing.assert_array_equal(x[kept], y[kept])


@pytest.mark.parametrize("name", WORLDS)
def test_the_same_key_gives_the_same_game(name):
    env = WORLDS[name]
    once, again, other = episodes(env, 1), episodes(env, 1), episodes(env, 2)
    jax.tree.map(np.testing.assert_array_equal, once, again)
    assert any((x != y).any() for x, y in zip(jax.tree.leaves(once), jax.tree.leaves(other), strict=True))


@pytest.mark.parametrize("name", WORLDS)
def test_dict_view(name):
    """The same game as the stacked one, in dicts."""
    env = WORLDS[name]
    view, key = DictView(env), jax.random.key(5)
    step_view, step = jax.jit(view.step), jax.jit(env.step)
    obs, state = view.reset(key)
    _, stacked_state = jax.jit(env.reset)(key)
    assert view.agents == [f"agent_{i}" for i in range(env.num_agents)] and list(obs) == view.agents
    for _ in range(6):
        actions = actions_of(env, key)
        by_name = {agent: actions[i] for i, agent in enumerate(view.agents)}
        obs, state, rewards, dones, _ = step_view(key, state, by_name)
        stacked, stacked_state, reward, *_ = step(key, stacked_state, actions)
    for i, agent in enumerate(view.agents):
        assert rewards[agent] == reward[i] and dones[agent]
        jax.tree.map(lambda x, y, i=i: np.testing.assert_array_equal(x, y[i]), obs[agent], stacked)
    assert dones["__all__"]
    agent, flat = view.agents[-1], jax.tree.leaves
    space = view.observation_space(agent)
    spaces = list(space.spaces.values()) if hasattr(space, "spaces") else [space]
    assert [(one.shape, one.dtype) for one in spaces] == [(x.shape, x.dtype) for x in flat(obs[agent])]
    assert all(bool(one.contains(x)) for one, x in zip(spaces, flat(obs[agent]), strict=True))
    assert view.action_space(agent).contains(by_name[agent])


@pytest.mark.parametrize("name", WORLDS)
def test_spaces(name):
    env = WORLDS[name]
    obs, _ = jax.jit(env.reset)(jax.random.key(0))
    space = env.observation_space()
    spaces = list(space.spaces.values()) if hasattr(space, "spaces") else [space]
    for x, one in zip(jax.tree.leaves(obs), spaces, strict=True):
        assert one.shape == x.shape and one.dtype == x.dtype and bool(one.contains(x))
    env.action_space()


def test_importing_starts_no_backend():
    """So that hosts can still be joined afterwards."""
    code = (
        "import envs.matrix_games, envs.coin_game, envs.in_the_matrix; import jax._src.xla_bridge as x; "
        "assert not x.backends_are_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_wide_batches_have_neither_gathers_nor_scatters():
    """Both are slow under vmap on CPU, and these steps run thousands at a time."""
    for name in ("ipd", "coin_game", "in_the_matrix"):
        env = WORLDS[name]
        states = jax.eval_shape(jax.vmap(env.reset), jax.random.split(jax.random.key(0), 4))[1]
        actions = jnp.zeros((4, env.num_agents), jnp.int32)
        text = str(jax.make_jaxpr(jax.vmap(lambda s, a, env=env: env.step(jax.random.key(0), s, a)))(states, actions))
        used = {word for word in ("gather", "scatter", "conv_general", "sort", "dynamic_slice") if f"= {word}" in text}
        assert not used, f"{name}: {used}"
