"""Our worlds in code of gymnax 1.0 that was written for its own: the RolloutWrapper of gymnax.experimental, and gymnax.wrappers'
LogWrapper, StickyActionWrapper, FlattenObservationWrapper, LegacyStepAPIWrapper, GymnaxToGymWrapper, GymnaxToDmEnvWrapper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs.maze import EnvParams, Maze
from envs.maze_editor import MazeEditor

FORWARD = 2
LIMIT = EnvParams(30)


def maze():
    return Maze(5, 5, num_walls=3)


def editor():
    return MazeEditor(4, 5, num_walls=6, noise_dim=3)


def walk(params, obs, key):
    """A policy: turns or goes forward, as often as the parameters say."""
    return jax.random.choice(key, jnp.array([0, 1, FORWARD]), p=jax.nn.softmax(params))


def test_rollout_wrapper_on_the_maze():
    """A population of two policies, 32 episodes each: one only turns, the other walks and sometimes finds the goal."""
    from gymnax.experimental import RolloutWrapper

    rollouts = RolloutWrapper(walk, env=maze(), env_params=LIMIT, num_env_steps=60)
    policies = jnp.array([[9.0, 0.0, -99.0], [0.0, 0.0, 1.0]])
    keys = jax.random.split(jax.random.key(0), 32)
    obs, action, reward, _, done, total = jax.tree.map(np.asarray, rollouts.population_rollout(keys, policies))
    assert obs.image.shape == (2, 32, 60, 5, 5, 3) and action.shape == reward.shape == done.shape == (2, 32, 60)
    assert (total[0] == 0).all() and (total[1] > 0).any()
    np.testing.assert_array_equal(done[0], np.broadcast_to(np.arange(60) % 30 == 29, (32, 60)))  # the time limit, twice
    first = np.cumsum(done, -1) - done == 0
    np.testing.assert_allclose(total[..., 0], (reward * first).sum(-1), rtol=1e-6)


def test_rollout_wrapper_on_the_editor():
    """An episode of a designer that draws at random: 6 walls, the goal, the agent; a number that none of its steps is paid."""
    from gymnax.experimental import RolloutWrapper

    obs, action, _, after, done, total = RolloutWrapper(env=editor()).batch_rollout(jax.random.split(jax.random.key(1), 3), None)
    assert (total == 0).all() and done.shape == (3, 8) and (np.asarray(done) == (np.arange(8) == 7)).all()
    inside = np.asarray(obs.image)[:, :, 1:-1, 1:-1, 0]
    assert inside.shape == (3, 8, 4, 5)
    walls = (inside == 2).sum((2, 3))
    for actions, counts in zip(np.asarray(action), walls, strict=True):
        assert counts[:7].tolist() == [len(set(actions[:t].tolist())) for t in range(7)]
    assert (np.asarray(after.time)[:, -1] == 0).all()  # it began anew


@pytest.mark.parametrize("world", [maze, editor])
def test_log_wrapper_around_sticky_actions(world):
    """gymnax's own scan: the lengths and returns of the episodes that ended, told by the wrapper, are those of the steps."""
    from gymnax.wrappers import LogWrapper, StickyActionWrapper

    params = LIMIT if world is maze else world().default_params
    env = LogWrapper(StickyActionWrapper(world(), 0.25))

    @jax.jit
    def play(key):
        def step(carry, key):
            key_act, key_step = jax.random.split(key)
            action = env.action_space(params).sample(key_act)
            _, state, reward, terminated, truncated, info = env.step(key_step, carry, action, params)
            return state, (reward, terminated | truncated, info["returned_episode_lengths"], info["returned_episode_returns"])

        key_reset, key_steps = jax.random.split(key)
        return jax.lax.scan(step, env.reset(key_reset, params)[1], jax.random.split(key_steps, 100))[1]

    reward, done, lengths, returns = map(np.asarray, play(jax.random.key(2)))
    ends = np.flatnonzero(done)
    starts = np.array([0, *ends[:-1] + 1])
    assert len(ends) >= 3
    np.testing.assert_array_equal(lengths[ends], ends + 1 - starts)
    np.testing.assert_allclose(returns[ends], [reward[a : b + 1].sum() for a, b in zip(starts, ends, strict=True)], atol=1e-6)


def test_flatten_observation_wrapper():
    """It takes worlds with one array to see, so the image is picked first, by a wrapper as gymnax's are written."""
    from gymnax.wrappers import FlattenObservationWrapper
    from gymnax.wrappers.purerl import GymnaxWrapper

    class ImageOnly(GymnaxWrapper):
        def observation_space(self, params):
            return self._env.observation_space(params).spaces["image"]

        def reset(self, key, params=None):
            obs, state = self._env.reset(key, params)
            return obs.image, state

        def step(self, key, state, action, params=None):
            obs, state, *rest, info = self._env.step(key, state, action, params)
            return obs.image, state, *rest, info | {"final_observation": info["final_observation"].image}

    env, key = FlattenObservationWrapper(ImageOnly(maze())), jax.random.key(3)
    obs, state = env.reset(key, LIMIT)
    expected, _ = maze().reset(key, LIMIT)
    np.testing.assert_array_equal(obs, expected.image.ravel())
    obs, *_, info = env.step(key, state, 0, LIMIT)
    assert obs.shape == info["final_observation"].shape == env.observation_space(LIMIT).shape == (75,)


def test_other_interfaces():
    """The same steps through gymnasium's interface, dm_env's and gymnax's old one: the limit ends an episode of turns."""
    from gymnax.wrappers import GymnaxToDmEnvWrapper, GymnaxToGymWrapper, LegacyStepAPIWrapper

    limit = EnvParams(3)
    gym = GymnaxToGymWrapper(maze(), limit, seed=0)
    obs, _ = gym.reset(seed=1)
    assert gym.action_space.n == 7 and set(gym.observation_space.spaces) == {"image", "direction"} and obs.image.shape == (5, 5, 3)
    ends = [gym.step(0)[2:4] for _ in range(4)]
    assert [(bool(a), bool(b)) for a, b in ends] == [(False, False), (False, False), (False, True), (False, False)]

    dm, old = GymnaxToDmEnvWrapper(maze()), LegacyStepAPIWrapper(maze())
    timestep, (_, state), dones = dm.reset(jax.random.key(4), limit), old.reset(jax.random.key(4), limit), []
    for t in range(3):
        key = jax.random.key(t)
        timestep = dm.step(key, timestep, 1, limit)
        obs, state, reward, done, _ = old.step(key, state, 1, limit)
        jax.tree.map(np.testing.assert_array_equal, (timestep.observation, timestep.reward), (obs, reward))
        assert timestep.discount == 1
        dones.append(bool(done))
    assert dones == [False, False, True]
