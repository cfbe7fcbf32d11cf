"""The CMU humanoid: tasks by hand, what it senses against dm_control's own walker, its physics against MuJoCo's own engine."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs.cmu_humanoid import (
    CMU_TASKS,
    FRAMES,
    MAY_LIE,
    OBS_PARTS,
    TIMESTEP,
    CmuHumanoid,
    CmuState,
    build,
    feel,
    load_model,
    simplify,
)
from envs.humanoid import split

OF_WALKER = {name: f"sensors_{name}" for name in ("accelerometer", "gyro", "torque", "touch", "velocimeter")}
STEPS, NUM = 40, 2
WIDE = {np.dtype(name) for name in ("int64", "uint64", "float64")}


@functools.cache
def world():
    """The humanoid, dm_control's walker, and its physics on the reduced model in MuJoCo's own engine."""
    pytest.importorskip("mujoco.mjx")
    pytest.importorskip("dm_control")
    walker, physics = build()
    simplify(physics.model.ptr, load_model().feet)
    return CmuHumanoid(), walker, physics


def seen_by_walker(walker, physics):
    """What dm_control's walker observes in its physics, by name."""
    return {name: np.array(getattr(walker.observables, OF_WALKER.get(name, name))(physics)).ravel() for name in OBS_PARTS}


def put(physics, state, i):
    """Sets MuJoCo's own engine to the i-th of some states."""
    data = physics.data
    data.qpos[:], data.qvel[:], data.act[:] = state.qpos[:, i], state.qvel[:, i], state.act[:, i]
    data.qacc_warmstart[:] = state.warmstart[:, i]


def random_states(num, seed=0):
    """Bent and turned in all ways at all heights, moving."""
    env, rng = world()[0], np.random.default_rng(seed)
    host = env.model.host
    low, high = host.jnt_range[1:].T[..., None]
    qpos = np.concatenate([rng.normal(size=(3, num)), rng.normal(size=(4, num)), rng.uniform(low, high, (host.nv - 6, num))])
    qpos[2] = rng.uniform(0, 1.4, num)
    qpos[3:7] /= np.linalg.norm(qpos[3:7], axis=0)
    rest = rng.normal(size=(host.nv, num)), rng.uniform(-1, 1, (host.na, num)), np.zeros((host.nv, num)), np.zeros((19, num))
    return CmuState(*(np.asarray(x, np.float32) for x in (qpos, *rest)), np.zeros(num, np.int32))


@functools.cache
def look():
    return jax.jit(world()[0].look)


# --- tasks


def reward(task, velocity=(2.0, 3.0, 5.0), up=(0.0, 1.0, 0.0), spin=(7.0, 8.0, 9.0)):
    parts = {"velocimeter": jnp.array(velocity), "world_zaxis": jnp.array(up), "gyro": jnp.array(spin)}
    return float(CMU_TASKS[task](parts))


def test_tasks_by_hand():
    """Upright; leaning forward by 3:4, to a side by 4:3, on its head, on its side."""
    np.testing.assert_allclose(reward("speed"), 38**0.5, rtol=1e-6)
    rotations = [reward(f"rotate_{axis}") for axis in "xyz"]
    assert rotations == [7, 8, 9]
    assert [reward("forward"), reward("backward"), reward("shift_left"), reward("jump")] == [5, -5, 2, 3]
    ahead, side, head, lying = (0.0, 0.8, 0.6), (0.8, 0.6, 0.0), (0.0, -1.0, 0.0), (1.0, 0.0, 0.0)
    np.testing.assert_allclose([reward("forward", up=up) for up in (ahead, side, head, lying)], [4, 5, -5, 0], rtol=1e-6)
    np.testing.assert_allclose([reward("shift_left", up=up) for up in (ahead, side, head, lying)], [2, 1.2, -2, 0], rtol=1e-6)
    np.testing.assert_allclose([reward("jump", up=up) for up in (ahead, side, head)], [5.4, 3.4, 0], rtol=1e-6)
    assert reward("forward", up=(0.0, 0.0, -1.0)) == reward("shift_left", up=(0.0, 0.0, -1.0)) == 0


def test_parts_of_an_observation():
    """The order of H-GAP's code; rewards of many at once."""
    sizes = [56, 15, 1, 12, 56, 56, 3, 3, 6, 10, 3, 3]
    assert list(OBS_PARTS.values()) == sizes and sum(sizes) == CmuHumanoid.obs_size == 224
    names = [OF_WALKER.get(name, name) for name in OBS_PARTS]
    assert names == sorted(names)  # as dictionaries of observations are in MoCapAct's code
    parts = split(jnp.broadcast_to(jnp.arange(224.0), (4, 5, 224)), OBS_PARTS)
    assert {name: x.shape for name, x in parts.items()} == {name: (4, 5, size) for name, size in OBS_PARTS.items()}
    assert jnp.concatenate(list(parts.values()), -1)[0, 0].tolist() == list(range(224))
    assert all(task(parts).shape == (4, 5) for task in CMU_TASKS.values())


def test_without_dm_control(monkeypatch):
    pytest.importorskip("mujoco")
    monkeypatch.setitem(sys.modules, "dm_control", None)
    with pytest.raises(ModuleNotFoundError, match="needs dm_control .*pip install 'nightjax") as error:
        build()
    assert "\n" not in str(error.value)


# --- what it senses


def test_observations_are_those_of_dm_controls_walker():
    """In any state, each in its place; what is felt is that of the engine's own sensors."""
    env, walker, physics = world()
    states = random_states(16)
    felt = []
    expected = {name: [] for name in OBS_PARTS}
    for i in range(16):
        put(physics, states, i)
        physics.data.ctrl[:] = 0
        physics.forward()
        felt.append(feel(physics.model.ptr, physics.data.sensordata, np))
        for name, x in seen_by_walker(walker, physics).items():
            expected[name].append(x)
    obs, _ = look()(states._replace(felt=np.array(felt).T))
    assert obs.shape == (224, 16) and obs.dtype == jnp.float32
    assert np.any(expected["touch"]) and np.std(expected["torque"]) > 0.05  # something is felt at all
    for name, x in split(obs.T, OBS_PARTS).items():
        np.testing.assert_allclose(x, expected[name], rtol=1e-4, atol=2e-5, err_msg=name)


def test_left_is_left_and_ahead_is_ahead():
    """At a start its left hand and foot are at its left, its head on top; velocity is seen along these axes."""
    env = world()[0]
    _, start = env.reset_env(jax.random.key(0), env.default_params._replace(reset_noise=0.0))
    obs = look()(jax.tree.map(lambda x: np.stack([x] * 16, -1), start))[0][:, 0]
    limbs = np.array(split(obs, OBS_PARTS)["appendages_pos"]).reshape(5, 3)
    assert (limbs[[1, 3], 0] > 0).all() and (limbs[[0, 2], 0] < 0).all()
    assert limbs[4, 1] > 0.5 and (limbs[2:4, 1] < -0.8).all()
    np.testing.assert_allclose(obs[-3:], [0, 0.989, -0.151], atol=1e-3)  # leaning forward a little
    axes = world()[2].model.ptr.body("walker/root")  # the root's frame is that of its free joint
    assert not axes.pos.any() and axes.quat.tolist() == [1, 0, 0, 0]


def test_ends_where_dm_control_finds_a_contact():
    """Any geom but the feet's on the ground, in dm_control's whole model."""
    world()
    import mujoco

    walker, whole = build()
    model, data = whole.model.ptr, whole.data.ptr
    feet = {model.geom(geom.full_identifier).id for geom in walker.ground_contact_geoms}
    expected, num = [], 0
    batches = [random_states(16, seed) for seed in range(8)]
    for states in batches:
        for i in range(16):
            put(whole, states, i)
            mujoco.mj_kinematics(model, data)
            mujoco.mj_comPos(model, data)
            mujoco.mj_collision(model, data)
            pairs = [set(contact.geom.tolist()) for contact in data.contact]
            touching = {geom for pair in pairs if 0 in pair for geom in pair - {0}}
            expected.append(bool(touching - feet))
            num += bool(touching & feet) and not touching - feet
    assert 0.2 < np.mean(expected) < 0.8 and num > 0  # both, and some that stand
    found = np.concatenate([look()(states)[1] for states in batches])
    np.testing.assert_array_equal(found, expected)


def test_starts():
    """Just above the ground; only the root's velocity differs."""
    env = world()[0]
    starts = jax.vmap(env.reset_env, (0, None), -1)(jax.random.split(jax.random.key(1), 16), env.default_params)[1]
    assert not np.asarray(starts.qvel[6:]).any() and not np.asarray(starts.act).any() and not np.asarray(starts.time).any()
    assert 0.07 < np.std(starts.qvel[:6]) < 0.13
    obs, fallen = look()(starts)
    assert not fallen.any() and not split(obs.T, OBS_PARTS)["touch"].any()
    lowered = starts._replace(qpos=starts.qpos.at[2].add(-0.02))
    assert not look()(lowered)[1].any()  # stands
    assert look()(starts._replace(qpos=starts.qpos.at[2].add(-0.3)))[1].all()
    assert env.observation_space().shape == (224,) and env.action_space().shape == (56,)


@pytest.mark.slow
def test_picture():
    env = world()[0]
    state = env.reset_env(jax.random.key(0), env.default_params)[1]
    try:
        image = env.render(state)
    except Exception as error:  # whatever is missing: MuJoCo says it in many ways
        pytest.skip(f"no OpenGL: {error}")
    assert image.shape == (240, 320, 3) and image.dtype == np.uint8 and image.std() > 5


# --- physics


@functools.cache
def run():
    """STEPS steps of two robots under random actions -> actions, states from the start on, observations, rewards, terminated."""
    env, params = world()[0], world()[0].default_params
    step = jax.jit(lambda state, action: env.step_env(None, state, action, params)[:4])
    state = jax.vmap(env.reset_env, (0, None), -1)(jax.random.split(jax.random.key(0), NUM), params)[1]
    actions = np.repeat(np.random.default_rng(0).normal(0, 0.4, (STEPS // 5, 56, NUM)), 5, 0).clip(-1, 1).astype(np.float32)
    states, rest = [state], []
    for action in actions:
        obs, state, reward, terminated = step(states[-1], action)
        states.append(state)
        rest.append((obs, reward, terminated))
    return actions, *jax.tree.map(np.asarray, (states, *map(list, zip(*rest, strict=True)))), step


def host_step(physics, action):
    """A step as dm_control makes it: numbers that depend on places and speeds are those of its end."""
    import mujoco

    physics.data.ctrl[:] = action
    mujoco.mj_step1(physics.model.ptr, physics.data.ptr)
    physics.step(FRAMES)


@pytest.mark.slow
def test_a_step_is_that_of_dm_control():
    """What is seen and what is felt after a step from each state of a run, and rewards and ends.

    In the air to rounding. On the ground both engines stop short of the solution, at slightly different places: most agree.
    """
    env, walker, physics = world()
    actions, states, obs, rewards, terminated, _ = run()
    assert not any(x.any() for x in terminated[:5]) and terminated[-1].all()
    errors = {name: [] for name in OBS_PARTS}
    scale = {name: [] for name in OBS_PARTS}
    for t, i in np.ndindex(STEPS, NUM):
        put(physics, states[t], i)
        host_step(physics, actions[t, :, i])
        expected, found = seen_by_walker(walker, physics), split(obs[t][:, i], OBS_PARTS)
        for name in OBS_PARTS:
            errors[name].append(np.abs(found[name] - expected[name]).max())
            scale[name].append(np.abs(expected[name]).max())
        np.testing.assert_allclose(rewards[t][i], np.linalg.norm(expected["velocimeter"]), rtol=1e-2, atol=1e-3)
    for name in OBS_PARTS:
        error, size = np.array(errors[name]), np.max(scale[name])
        assert size > 0, name
        assert np.median(error) < 1e-4 * size, (name, np.median(error), size)
        if name != "touch":  # 0 or 1 of a force that may be near 0
            assert error.max() < 1e-2 * size, (name, error.max(), size)
    assert np.mean(np.array(errors["touch"]) > 0) < 0.1


@pytest.mark.slow
def test_in_the_air_it_is_dm_controls_whole_model():
    """Where nothing touches anything, what was left out and the solver's limits change nothing."""
    *_, step = run()
    walker, whole = build()
    whole.model.ptr.opt.timestep = TIMESTEP
    state = run()[1][0]
    state, actions = state._replace(qpos=state.qpos + np.eye(63, dtype=np.float32)[2][:, None]), np.full((3, 56, NUM), 0.1)
    put(whole, state, 0)
    for action in actions:
        obs, state, *_ = step(state, action.astype(np.float32))
        host_step(whole, action[:, 0])
        assert not whole.data.ncon
        expected = seen_by_walker(walker, whole)
        for name, x in split(obs[:, 0], OBS_PARTS).items():
            np.testing.assert_allclose(x, expected[name], rtol=1e-3, atol=1e-3, err_msg=name)


@pytest.mark.slow
def test_a_few_steps_in_a_row():
    """From the start on, without being set right: falling, landing on both feet."""
    _, _, physics = world()
    actions, states, *_ = run()
    for i in range(NUM):
        put(physics, states[0], i)
        for t in range(4):
            host_step(physics, actions[t, :, i])
            np.testing.assert_allclose(states[t + 1].qpos[:, i], physics.data.qpos, atol=1e-3)
            np.testing.assert_allclose(states[t + 1].qvel[:, i], physics.data.qvel, atol=2e-2)


@pytest.mark.slow
def test_what_is_not_finite_ends():
    """It stays where it was; the other robot goes on."""
    env = world()[0]
    actions, states, *_, step = run()
    state = states[3]._replace(qvel=np.where(np.arange(NUM) == 0, np.float32(3e38), states[3].qvel))
    obs, after, reward, terminated = step(state, actions[3])
    assert terminated.tolist() == [True, False]
    np.testing.assert_array_equal(after.qpos[:, 0], state.qpos[:, 0])
    np.testing.assert_allclose(after.qpos[:, 1], states[4].qpos[:, 1], atol=1e-5)
    assert np.isfinite(after.qvel).all() and after.time.tolist() == [4, 4]
    nothing = np.where(np.arange(NUM) == 0, np.nan, actions[3])
    assert np.isfinite(step(states[3], nothing)[0]).all()
    assert env.task not in MAY_LIE


@pytest.mark.slow
@pytest.mark.parametrize("task", ["jump", "rotate_x"])
def test_types(task):
    """None of 64 bits with JAX_ENABLE_X64, and the same after a step, with auto-reset too; one robot and many."""
    world()
    env, key = CmuHumanoid(task), jax.eval_shape(lambda: jax.random.key(0))
    types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    begin = lambda key: env.reset_env(key, env.default_params)
    with jax.enable_x64():
        first = jax.eval_shape(begin, key)
        action = jax.ShapeDtypeStruct((56,), jnp.float32)
        found = jax.eval_shape(lambda *args: env.step(*args), key, first[1], action)
    assert not {x.dtype for x in jax.tree.leaves((first, found))} & WIDE
    assert types(found[:2]) == types(first) == types(jax.eval_shape(begin, key))
    assert types(found[2]) == ((), jnp.float32) and types(found[3]) == ((), jnp.bool_)
