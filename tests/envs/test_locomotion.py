"""MuJoCo's robots through MJX: against MuJoCo's own engine, what agents see and move, and long random runs."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

mujoco = pytest.importorskip("mujoco")
pytest.importorskip("mujoco.mjx")

from envs.locomotion import TASKS, Locomotion  # noqa: E402
from envs.planar import PlanarParams  # noqa: E402

NUM = 16
RUN = ("halfcheetah_6x1", "ant_4x2")  # the robots that are simulated here: each costs a compilation


@functools.cache
def world(robot):
    """A robot, a run of T steps under actions (T, agents, A, NUM), compiled once for each T, and its starts."""
    env, params = Locomotion(robot), PlanarParams()

    def one(state, action):
        _, state, reward, terminated, info = env.step_env(None, state, action, params)
        return state, (state, reward, terminated, info["contact"])

    starts = jax.vmap(env.reset_env, (0, None), -1)(jax.random.split(jax.random.key(0), NUM), params)[1]
    return env, jax.jit(functools.partial(jax.lax.scan, one)), starts


@functools.cache
def random_run(robot):
    """100 steps of random actions -> actions, states, rewards, terminated, contacts."""
    env, run, starts = world(robot)
    actions = jax.random.uniform(jax.random.key(1), (100, env.num_agents, env.num_actions, NUM), minval=-1)
    return actions, *run(starts, actions)[1]


def host_run(env, qpos, qvel, actions):
    """The same robot in MuJoCo's own engine: positions after every step."""
    data = mujoco.MjData(env.model.host)
    data.qpos[:], data.qvel[:] = qpos, qvel
    motors = [mujoco.mj_id2name(env.model.host, mujoco.mjtObj.mjOBJ_JOINT, j) for j in env.model.host.actuator_trnid[:, 0]]
    joints = [env.model.host.joint(j).name for j in range(env.model.host.njnt)][-env.num_joints :]
    places = []
    for action in actions:
        of = {joints[j]: action[a, i] for a, own in enumerate(env.agents) for i, j in enumerate(own)}
        low, high = env.model.host.actuator_ctrlrange.T
        data.ctrl[:] = low + (np.array([of[name] for name in motors]) + 1) / 2 * (high - low)
        mujoco.mj_step(env.model.host, data, env.robot.frames)
        places.append(data.qpos.copy())
    return np.array(places)


def errors(robot, steps):
    """How far positions are from those of MuJoCo's own engine after some steps from each of 16 places of a random run."""
    env, _, _ = world(robot)
    actions, states, *_ = jax.tree.map(np.asarray, random_run(robot))
    found = []
    for i in range(NUM):
        at = 5 * i
        later = slice(at + 1, at + 1 + steps)
        expected = host_run(env, states.qpos[at, :, i], states.qvel[at, :, i], actions[later, ..., i])
        found.append(np.abs(states.qpos[later, :, i] - expected).max())
    return found


def test_physics_is_that_of_mujocos_own_engine():
    """In the plane to rounding. In space MJX turns a contact's pyramid of friction otherwise: most places agree, not all."""
    assert max(errors("halfcheetah_6x1", 4)) < 1e-4
    assert np.median(errors("ant_4x2", 1)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("robot", RUN)
def test_random_runs(robot):
    """Finite, feet on the ground now and then, rewards that add up to the way made."""
    env, run, starts = world(robot)
    actions, states, reward, _, contact = random_run(robot)
    assert all(np.isfinite(x).all() for x in (states.qpos, states.qvel, reward))
    assert (contact.mean((0, 2)) > 0).all() and (contact.mean((0, 2)) < 1).all()
    way = states.qpos[-1, 0] - starts.qpos[0]
    control = (np.asarray(actions).reshape(100, -1, NUM) ** 2).sum((0, 1))
    total = way / (env.model.host.opt.timestep * env.robot.frames) + 100 * env.robot.alive - env.robot.control_cost * control
    np.testing.assert_allclose(reward.sum(0), total, rtol=1e-3, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("robot", RUN)
def test_without_motors_it_comes_to_rest_on_the_ground(robot):
    """It has lost its energy, and is no deeper in the ground than 3 cm."""
    env, run, starts = world(robot)
    _, (states, *_, contact) = run(starts, jnp.zeros((100, env.num_agents, env.num_actions, NUM)))
    assert np.abs(states.qvel[-1]).max() < 0.3
    ends = jax.jit(jax.vmap(lambda qpos: env.geom_ends(kinematics(env, qpos)), -1))(states.qpos[-1])
    lowest = ends[..., 2].min(-1) - env.model.host.geom_size[:, 0]
    lowest = lowest[:, env.model.host.geom_type != 0]
    assert lowest.min() > -0.03 and (lowest.min(1) < 0.02).all()
    assert contact[-1].any(0).all()


def kinematics(env, qpos):
    """MJX's data for one place of the robot."""
    from mujoco import mjx

    model, data = env.on_device()
    return mjx.kinematics(model, data.replace(qpos=qpos))


@pytest.mark.slow
def test_free_fall():
    """Lifted by 5 m from rest, its centre of mass falls by g t (t + h) / 2: Euler's method's g t^2 / 2, with steps of h."""
    env, run, starts = world("ant_4x2")
    host, steps = env.model.host, 12
    still = jnp.zeros((100, env.num_agents, env.num_actions, NUM))
    rest = run(starts, still)[0]
    starts = rest._replace(qpos=rest.qpos.at[2].add(5.0), qvel=jnp.zeros_like(rest.qvel))
    _, (states, *_) = run(starts, still)
    middle = jax.jit(lambda qpos: (host.body_mass[:, None] * kinematics(env, qpos).xipos).sum(0) / host.body_mass.sum())
    falls = middle(starts.qpos[:, 0])[2] - middle(states.qpos[steps - 1, :, 0])[2]
    time = steps * host.opt.timestep * env.robot.frames
    np.testing.assert_allclose(falls, 0.5 * 9.81 * time * (time + host.opt.timestep), rtol=0.01)


@pytest.mark.parametrize("robot", TASKS)
def test_shares_of_the_robot(robot):
    """Every joint belongs to one agent; the agents see the root, their own joints first, and neighbours in the tree."""
    env, single = Locomotion(robot), Locomotion(robot, single=True)
    assert sorted(j for own in env.agents for j in own) == list(range(env.num_joints)) == list(single.agents[0])
    for own, seen in zip(env.agents, env.features, strict=True):
        root, rest = seen[: env.num_root], seen[env.num_root :]
        assert root == list(range(env.num_root)) and rest[: len(own)] == [env.num_root + j for j in own]
        assert rest[len(rest) // 2 :] == [f + env.num_joints for f in rest[: len(rest) // 2]]
    assert all(len(seen) == env.num_features for seen in Locomotion(robot, -1).features)
    assert len(single.features) == 1 and len(single.features[0]) == env.num_features
    obs, state = env.reset_env(jax.random.key(0), env.default_params)
    assert obs.shape == (env.num_agents, env.obs_size)
    np.testing.assert_array_equal(np.asarray(obs[0, : env.num_root]), env.all_features(state)[: env.num_root])


def test_what_an_agent_sees_follows_the_tree():
    """By hand: a shin of the half-cheetah sees thigh and foot; a leg of the ant sees the other hips, not their ankles."""
    joints = lambda env, agent: [f - env.num_root for f in env.features[agent] if env.num_root <= f < env.num_root + env.num_joints]
    cheetah, ant, blind = Locomotion("halfcheetah_6x1"), Locomotion("ant_4x2"), Locomotion("ant_4x2", 0)
    assert joints(cheetah, 1) == [1, 0, 2] and joints(cheetah, 0) == [0, 1, 3]
    assert joints(ant, 1) == [2, 3, 0, 4, 6] and joints(blind, 1) == [2, 3]


def test_picture():
    env = Locomotion("halfcheetah_6x1")
    state = env.reset_env(jax.random.key(0), PlanarParams(reset_noise=0.0))[1]
    image = np.asarray(jax.jit(env.render)(state))
    assert image.shape == (72, 144, 3) and image.dtype == np.uint8
    from envs.planar import COLOURS

    for colour in COLOURS:
        assert (image == colour).all(-1).any()


@pytest.mark.slow
def test_mix_me_plays_it():
    """A hopper that is pushed over earns its reward up to the fall, and nothing after it."""
    from algos.mix_me import CPU, init_teams, make_team, play

    config = replace(CPU, robot="hopper_3x1", hidden=4, episode_length=60)
    team = make_team(config)
    teams = init_teams(jax.random.key(0), team, 4)
    episode = jax.jit(functools.partial(play, config, recorded=(0, 1, 2, 3)))(teams, jax.random.key(1))
    down = (episode.record.qpos[:, 1] < 0.7) | (np.abs(episode.record.qpos[:, 2]) > 0.2)
    steps = np.where(down.any(0), down.argmax(0) + 1, 60)
    assert down.any()
    way = np.array([episode.record.qpos[n - 1, 0, i] for i, n in enumerate(steps)])
    np.testing.assert_allclose(episode.fitness, steps + way / 0.008, atol=60 * 3e-3 + 0.05 / 0.008)
    assert ((episode.descriptor >= 0) & (episode.descriptor <= 1)).all() and (episode.descriptor > 0).any()
