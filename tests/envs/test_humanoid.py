"""The planar humanoid: tasks against the world's own rewards, what it senses against poses by hand, servos, ground and ends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs import planar
from envs.humanoid import (
    CONTROL_DT,
    CROUCHING,
    HIGH,
    JOINTS,
    LOW,
    PARTS,
    REST,
    REST_ACTION,
    SOLES,
    STANDING,
    STEPS,
    TASKS,
    Humanoid,
    HumanoidParams,
    HumanoidState,
    split,
)

NUM = 16
STILL = HumanoidParams(reset_noise=0.0)
FEET = (5, 8)


@functools.cache
def world():
    """The humanoid and its step, compiled once for a batch of NUM."""
    env = Humanoid()
    return env, jax.jit(lambda state, action: env.step_env(None, state, action, STILL))


@functools.cache
def starts(noise=0.0):
    env = world()[0]
    keys = jax.random.split(jax.random.key(0), NUM)
    return jax.jit(jax.vmap(env.reset_env, (0, None), -1))(keys, HumanoidParams(reset_noise=noise))[1]


@functools.cache
def random_states():
    """States that random actions reach, one after another: standing, falling, lying (..., 24 * NUM)."""
    env, step = world()
    state, found = starts(0.03), []
    for t in range(48):
        action = jax.random.uniform(jax.random.fold_in(jax.random.key(1), t // 4), (12, NUM), jnp.float32, -1.3, 1.3)
        state = step(state, action)[1]
        found += [state] * (t % 2)
    return jax.tree.map(lambda *x: jnp.concatenate(x, -1), *found)


def rest(num=NUM):
    return jnp.tile(REST_ACTION[:, None], (1, num))


def lift(state, height=5.0):
    return state._replace(pos=state.pos.at[1].add(height))


def frozen(task=None, **changes):
    """A world in which a step changes nothing but these fields of the state."""
    env = Humanoid(task)
    env.simulate = lambda state, action, params: state._replace(**changes)
    return env


# --- tasks


@pytest.mark.parametrize("task", TASKS)
def test_tasks_are_the_worlds_rewards(task):
    """Of observations that were standardised and are so no more, in whatever states random actions lead to."""
    env, state = world()[0], random_states()
    obs = env.get_obs(state).T
    mean, std = obs.mean(0), obs.std(0) + 0.01
    found = TASKS[task](split((obs - mean) / std * std + mean))
    expected = Humanoid(task).reward(state)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.01 and expected.shape == (24 * NUM,)
    same_obs, _, reward, *_ = frozen(task).step_env(None, state, jnp.zeros((12, 24 * NUM)), STILL)
    np.testing.assert_array_equal(reward, expected)
    np.testing.assert_array_equal(same_obs, obs.T)


def moving(vx=0.0, vz=0.0, gyro=0.0, tilt=0.0, height=1.0):
    """Named observations of a pelvis that moves like this in its own frame; tilt: how far it leans back."""
    parts = {name: np.zeros((1, size), np.float32) for name, size in PARTS.items()}
    found = {"velocimeter": [vx, vz], "gyro": [gyro], "world_zaxis": [np.sin(tilt), np.cos(tilt)], "body_height": [height]}
    return parts | {name: np.float32([x]) for name, x in found.items()}


@pytest.mark.parametrize(
    ("task", "seen", "expected"),
    [
        ("speed", moving(3, -4), 5),
        ("forward", moving(2, 1), 2),
        ("forward", moving(2, 0, tilt=np.pi / 3), 1),
        ("forward", moving(2, 0, tilt=np.pi), -2),
        ("backward", moving(-2, 1), 2),
        ("jump", moving(1, 3), 3),
        ("jump", moving(1, 3, tilt=np.pi / 2), 1),
        ("jump", moving(1, -3), 0),
        ("rotate", moving(gyro=-3), 3),
        ("rotate", moving(gyro=2), -2),
        ("crouch", moving(height=CROUCHING), 1),
        ("crouch", moving(height=CROUCHING + 0.1), np.exp(-1)),
        ("crouch", moving(height=CROUCHING, tilt=np.pi / 3), 0.5),
        ("crouch", moving(height=CROUCHING, tilt=np.pi), 0),
        ("stand", moving(height=STANDING), 1),
        ("stand", moving(0.3, height=STANDING), np.exp(-1)),
        ("stand", moving(height=STANDING - 0.1), np.exp(-1)),
        ("stand", moving(height=STANDING, tilt=2), 0),
    ],
)
def test_what_each_task_is_worth(task, seen, expected):
    np.testing.assert_allclose(TASKS[task](seen), [expected], atol=1e-4)


def test_unknown_tasks_are_no_rewards_and_none_is_nothing():
    state = starts()
    assert not np.asarray(frozen().step_env(None, state, rest(), STILL)[2]).any()
    with pytest.raises(KeyError):
        Humanoid("fly").reward(state)


# --- what it feels


def com_by_hand():
    """The centre of mass of the upright body, above the pelvis, and the whole mass: rod by rod."""
    rods = [(10, 0, 0), (18, 0, 0.275), (4.5, 0, 0.62), (4, 0, 0.28), (3.4, 0, -0.02)]  # kg, x, z; pairs as one
    rods += [(16, 0, -0.31), (7, 0, -0.725), (2.2, 0.055, -0.98)]
    mass, x, z = np.array(rods).T
    return np.array([(mass * x).sum(), (mass * z).sum()]) / mass.sum(), mass.sum()


def posed(tilt, height, velocity, spin, bend=None):
    """The upright body, tilted (rad) as a whole, its pelvis at a height and moving; `bend`: angle and spin of its right forearm, of
    no weight here."""
    offset, _ = com_by_hand()
    sin, cos = np.sin(tilt), np.cos(tilt)
    offset = np.array([cos * offset[0] - sin * offset[1], sin * offset[0] + cos * offset[1]])
    angle, spins = np.full(13, tilt, np.float32), np.full(13, spin, np.float32)
    vel = np.array(velocity) + spin * np.array([-offset[1], offset[0]])
    state = HumanoidState(np.array([0.3, height]) + offset, angle, vel, spins, np.int32(0), np.zeros(12), np.zeros(11), np.zeros(2))
    if bend:
        angle[12] += bend[0]
        spins[12] += bend[1]
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.int32 if x.dtype == np.int32 else jnp.float32), state)


def test_the_parts_of_an_observation_are_one_after_the_other():
    env = Humanoid()
    obs = jnp.arange(2 * 56.0).reshape(2, 56)
    parts = split(obs)
    assert list(parts) == list(PARTS) and env.obs_size == sum(PARTS.values()) == 56
    assert {name: x.shape for name, x in parts.items()} == {name: (2, size) for name, size in PARTS.items()}
    np.testing.assert_array_equal(jnp.concatenate(list(parts.values()), -1), obs)
    assert env.get_obs(posed(0.1, 1, (0, 0), 0)).shape == env.observation_space().shape == (56,)
    assert env.action_space().shape == (12,) == (env.num_actions,)


def test_it_weighs_65_kg_and_stands_at_its_height():
    env, state = Humanoid(), starts()
    offset, mass = com_by_hand()
    assert env.tree.mass == pytest.approx(mass) and 65 < mass < 65.5
    np.testing.assert_allclose(env.tree.moments.sum(0) / mass, offset, atol=1e-6)
    top = np.asarray(env.places(state, env.tree.ends))[1].max() + env.robot.rods[2].radius
    assert top == pytest.approx(1.75, abs=0.02)
    np.testing.assert_allclose(env.torso(state)[0][1], STANDING, atol=0.03)


def test_a_tilted_moving_body_feels_it_in_its_own_frame():
    """Leaning back by 0.5 rad, moving at (1.2, 0.7) m/s, turning at 0.8 rad/s: by hand."""
    tilt, (x, z) = 0.5, (1.2, 0.7)
    seen = split(Humanoid().get_obs(posed(tilt, 1.4, (x, z), 0.8)))
    sin, cos = np.sin(tilt), np.cos(tilt)
    np.testing.assert_allclose(seen["velocimeter"], [x * cos + z * sin, z * cos - x * sin], atol=1e-5)
    np.testing.assert_allclose(seen["world_zaxis"], [sin, cos], atol=1e-6)
    np.testing.assert_allclose(seen["body_height"], [1.4], atol=1e-5)
    np.testing.assert_allclose(seen["gyro"], [0.8], atol=1e-6)
    hand, foot = (0, 0.1 + 0.32 - 0.28 - 0.32), (0.17, -0.1 - 0.42 - 0.41 - 0.05)
    np.testing.assert_allclose(seen["end_effectors_pos"], [*hand, *hand, *foot, *foot], atol=1e-5)
    np.testing.assert_allclose(seen["joints_pos"], np.zeros(12), atol=1e-6)
    np.testing.assert_allclose(seen["joints_vel"], np.zeros(12), atol=1e-6)


def test_a_bent_arm_is_felt_by_its_joint_and_its_hand_alone():
    """The right forearm at a right angle, forwards: the hand is in front of the elbow. That is the last joint, the second hand."""
    env = Humanoid()
    straight, bent = (split(env.get_obs(posed(0.3, 1.2, (0, 0), 0, bend))) for bend in ((0, 0), (np.pi / 2, 2)))
    np.testing.assert_allclose(bent["joints_pos"], [*[0] * 11, np.pi / 2], atol=1e-5)
    np.testing.assert_allclose(bent["joints_vel"], [*[0] * 11, 2], atol=1e-5)
    np.testing.assert_allclose(bent["end_effectors_pos"][2:4], [0.32, 0.1 + 0.32 - 0.28], atol=1e-5)
    np.testing.assert_allclose(
        np.delete(bent["end_effectors_pos"], [2, 3]), np.delete(straight["end_effectors_pos"], [2, 3]), atol=1e-5
    )


def test_what_the_state_holds_is_passed_on():
    state = starts()._replace(act=jnp.full((12, NUM), 0.3), push=jnp.arange(11.0 * NUM).reshape(11, NUM), accel=jnp.ones((2, NUM)))
    seen = split(world()[0].get_obs(state).T)
    np.testing.assert_array_equal(seen["actuator_activation"], state.act.T)
    np.testing.assert_array_equal(seen["touch"], state.push[:SOLES].T)
    np.testing.assert_array_equal(seen["accelerometer"], state.accel.T)


def test_it_does_not_know_where_it_is():
    env, state = world()[0], random_states()
    obs = np.asarray(env.get_obs(state))
    np.testing.assert_allclose(env.get_obs(state._replace(pos=state.pos.at[0].add(3.0))), obs, atol=2e-5)
    higher = np.asarray(env.get_obs(lift(state, 1.0))) - obs
    place = list(split(np.arange(56))["body_height"])
    np.testing.assert_allclose(higher[place], 1, atol=1e-5)
    np.testing.assert_allclose(np.delete(higher, place, 0), 0, atol=2e-5)


# --- standing, falling


@functools.cache
def stood():
    """0.5 s under the command of rest: every state and whether it fell."""
    _, step = world()
    state, found = starts(), []
    for _ in range(17):
        _, state, _, terminated, info = step(state, rest())
        found.append((state, terminated | info["fallen"]))
    return found


def test_it_stands_still_under_the_command_of_rest():
    """On both feet, which bear its weight, and feels gravity."""
    env = world()[0]
    assert not np.array([fallen for _, fallen in stood()]).any()
    state = stood()[-1][0]
    assert abs(env.torso(state)[0][1] - env.torso(starts())[0][1]).max() < 0.02
    assert np.abs(state.vel).max() < 0.1 and np.abs(state.angle[0]).max() < 0.1
    push = np.mean([state.push for state, _ in stood()[5:]], 0)
    np.testing.assert_allclose(push[:SOLES].sum(0), 1, atol=0.1)
    assert (push[0:2].sum(0) > 0.3).all() and (push[2:4].sum(0) > 0.3).all() and not push[SOLES:].any()
    accel = np.mean([state.accel for state, _ in stood()[5:]], 0)
    np.testing.assert_allclose(accel[1], 9.81, atol=0.5)
    np.testing.assert_allclose(accel[0], 0, atol=0.8)
    np.testing.assert_allclose(state.act, rest(), atol=1e-4)


def test_any_point_but_a_sole_ends_an_episode():
    """Of each point that touches, alone: what is pushed there. When turning over it may touch, and yet is told."""
    env, num = Humanoid(), len(Humanoid().robot.touching)
    assert [rod for rod, _ in env.robot.touching[:SOLES]] == [FEET[0], FEET[0], FEET[1], FEET[1]]
    assert not {rod for rod, _ in env.robot.touching[SOLES:]} & set(FEET) and env.robot.feet == FEET
    state = jax.tree.map(lambda x: x[..., :num], starts())
    run = lambda task: frozen(task, push=0.01 * jnp.eye(num)).step_env(None, state, rest(num), STILL)[3:]
    expected = np.arange(num) >= SOLES
    for task in (None, *TASKS):
        terminated, info = run(task)
        np.testing.assert_array_equal(info["fallen"], expected)
        np.testing.assert_array_equal(terminated, expected & (task != "rotate"))
    assert not frozen().step_env(None, state._replace(push=jnp.zeros((num, num))), rest(num), STILL)[3].any()


def test_a_body_that_lies_on_the_ground_has_fallen():
    env, step = world()
    state = starts()
    tilt = jnp.where(jnp.arange(NUM) % 2 == 0, 1.5, 0.0)
    lying = jax.vmap(lambda *x: env.begin(*x, STILL)[1], -1, -1)(state.angle + tilt, state.vel, state.spin)
    state, fallen = lying, np.zeros(NUM, bool)
    for _ in range(8):
        _, state, _, terminated, info = step(state, rest())
        np.testing.assert_array_equal(info["fallen"], terminated)
        fallen |= terminated
    np.testing.assert_array_equal(fallen, tilt > 0)
    assert (state.push >= 0).all() and (state.time == 8).all()
    assert not step(lift(lying), rest())[3].any()


def test_starts_stand_on_the_ground_up_to_noise():
    env = world()[0]
    for noise in (0.0, 0.03):
        state = starts(noise)
        np.testing.assert_allclose(env.depths(state).max(0), 0, atol=1e-5)
        joints = jnp.stack([state.angle[i] - state.angle[rod.parent] for i, rod in enumerate(env.robot.rods[1:], 1)])
        assert (np.abs(joints - REST[:, None]) <= 5 * noise + 1e-6).all()
        assert (np.ptp(joints, axis=1) > noise).all() == (noise > 0) and (np.ptp(state.vel, axis=1) > 10 * noise).all() == (
            noise > 0
        )
        inside = np.clip(joints, LOW[:, None], HIGH[:, None])
        np.testing.assert_allclose((state.act + 1) / 2 * (HIGH - LOW)[:, None] + LOW[:, None], inside, atol=1e-5)
    assert len(JOINTS) == 12 and (LOW < REST).any() and (LOW <= REST).all() and (REST <= HIGH).all()


def test_bad_actions_are_taken_for_the_nearest_good_ones():
    _, step = world()
    state = starts()
    wild = rest().at[3].set(7.0).at[4].set(-jnp.inf).at[5].set(jnp.nan)
    tame = rest().at[3].set(1.0).at[4].set(-1.0).at[5].set(0.0)
    for a, b in zip(jax.tree.leaves(step(state, wild)), jax.tree.leaves(step(state, tame)), strict=True):
        np.testing.assert_array_equal(a, b)


# --- physics


def test_in_the_air_only_gravity_changes_the_momentum():
    """Whatever the servos do, and they do much; a body at rest in the air feels no weight."""
    _, step = world()
    state = lift(starts(0.03), 9.0)
    state = state._replace(vel=state.vel.at[0].set(1.5).at[1].set(0.5))
    first = state
    for t in range(12):
        action = jax.random.uniform(jax.random.fold_in(jax.random.key(3), t // 3), (12, NUM), minval=-1)
        state = step(state, action)[1]
        assert not state.push.any()
    assert np.abs(state.spin).max() > 5
    np.testing.assert_allclose(state.vel[0], 1.5, rtol=1e-4)
    np.testing.assert_allclose(state.vel[1], 0.5 - 9.81 * 12 * CONTROL_DT, rtol=1e-4)
    np.testing.assert_allclose(state.pos[0] - first.pos[0], 1.5 * 12 * CONTROL_DT, rtol=1e-3)
    floating = step(lift(starts(), 9.0), rest())[1]
    np.testing.assert_allclose(floating.accel, 0, atol=0.3)


def test_commands_go_through_a_filter_of_30_ms():
    _, step = world()
    state = lift(starts())
    after = step(state, rest().at[11].set(1.0))[1]
    share = (after.act[11] - state.act[11]) / (1 - state.act[11])
    np.testing.assert_allclose(share, 1 - np.exp(-1), rtol=1e-4)  # a step is as long as the filter's time
    np.testing.assert_allclose(after.act[:11], state.act[:11], atol=1e-6)


def test_the_accelerometer_is_what_changes_the_pelvis_speed():
    """Its mean over a step in the pelvis' frame at the end of it, gravity included."""
    env, step = world()
    state = starts(0.03)
    for t in range(6):
        before, state = state, step(state, jax.random.uniform(jax.random.key(t), (12, NUM), minval=-1))[1]
    x, z = (np.asarray(env.torso(state)[1]) - np.asarray(env.torso(before)[1])) / CONTROL_DT
    turned = np.exp(-1j * np.asarray(state.angle[0])) * (x + 1j * (z + 9.81))
    np.testing.assert_allclose(state.accel, np.clip([turned.real, turned.imag], -100, 100), rtol=1e-3, atol=1e-2)


@functools.cache
def one_substep():
    """One substep of the humanoid towards angles (12, N), compiled."""
    env = Humanoid()
    return env, jax.jit(lambda moving, command: planar.substep(env.robot, env.tree, moving, command, 0.0)[0])


def test_a_servo_pushes_no_harder_than_its_motor_can():
    """From rest, far from where it is to be: the first substep turns joints as twice as far a target does; near it, less."""
    _, substep = one_substep()
    state = lift(starts())
    spin_for = lambda far: np.asarray(substep(tuple(state[:4]), REST[:, None] + far * jnp.ones((12, NUM)))[3])
    small, far, further = spin_for(0.02), spin_for(2.0), spin_for(4.0)
    np.testing.assert_array_equal(far, further)
    assert (np.abs(far).max(0) > 1).all() and np.abs(far - small).max() > 0.5
    np.testing.assert_allclose(spin_for(-2.0), -far, atol=1e-4)


def test_servos_want_where_the_joint_is_to_be_after_the_step():
    """By hand for a waist and an elbow: a spring's torque, cut at the motor's; inertia only while it is a spring."""
    env = Humanoid()
    angle, spin = jnp.zeros((13, 3)), jnp.zeros((13, 3)).at[1].set(2.0)
    command = jnp.zeros((12, 3)).at[0].set(jnp.array([0.1, 0.9, -0.9])).at[11].set(jnp.array([0.1, 0.1, 2.0]))
    torques, inertias = planar.servos(env.robot, env.tree, angle, spin, command)
    h = CONTROL_DT / STEPS
    assert env.tree.h == h and sorted(torques) == sorted(inertias) == list(range(1, 13))
    np.testing.assert_allclose(torques[1], [500 * (0.1 - 2 * h), 200, -200], rtol=1e-5)
    np.testing.assert_allclose(inertias[1], [h * h * 500, 0, 0], rtol=1e-5)
    np.testing.assert_allclose(torques[12], [6, 6, 40], rtol=1e-5)
    np.testing.assert_allclose(inertias[12], [h * h * 60, h * h * 60, 0], rtol=1e-5)


def test_limp_servos_bring_no_energy():
    """Each told to be where it will be anyway, in the air: never more energy than at the start, and dampers take much of it."""
    env, substep = one_substep()
    state = lift(starts())._replace(spin=jax.random.normal(jax.random.key(0), (13, NUM)))
    hinged = lambda x: jnp.stack([x[i] - x[rod.parent] for i, rod in enumerate(env.robot.rods[1:], 1)])
    energy = [np.asarray(env.energy(state, 0.0))]
    for _ in range(30):
        moved = substep(tuple(state[:4]), hinged(state.angle) + env.tree.h * hinged(state.spin))
        state = state._replace(**dict(zip(("pos", "angle", "vel", "spin"), moved, strict=True)))
        energy.append(np.asarray(env.energy(state, 0.0)))
    assert (np.max(energy, 0) < 1.002 * energy[0]).all() and (energy[-1] < 0.7 * energy[0]).all()


def test_many_points_are_resolved_as_few_are():
    """The loop over points gives the velocities and impulses that writing them out gives, of bodies that touch in several ways."""
    env = Humanoid()
    state = jax.tree.map(lambda x: x[..., ::6], random_states())
    assert len(env.robot.touching) > planar.MANY
    angles = list(zip(jnp.sin(state.angle), jnp.cos(state.angle), strict=True))
    height = env.torso(state)[0][1]
    inertias = planar.servos(env.robot, env.tree, state.angle, state.spin, jnp.zeros((12, len(height))))[1]
    lower, inverse = planar.factorise(env.tree, planar.mass_matrix(env.tree, angles, inertias))
    u = list(jax.random.normal(jax.random.key(0), (15, len(height))))
    many = jax.jit(lambda u: planar.resolve_many(env.robot, env.tree, height, angles, lower, inverse, u))(u)
    few = planar.resolve_contacts(
        planar.contact_points(env.robot, env.tree, height, angles, lower, inverse), inverse, u, env.tree.h
    )
    for a, b in zip(many, few, strict=True):
        np.testing.assert_allclose(jnp.stack(a), jnp.stack(b), rtol=1e-4, atol=1e-4)
    touched = np.stack(few[1]) > 1e-3
    assert touched.any(0).mean() > 0.3 and touched.any(1).sum() >= 8 and (touched.sum(0) > 2).any()


def test_single_steps_vmap_and_trailing_batches_agree():
    """Auto-reset at the time limit included."""
    env, step = world()
    state, action = starts(0.03), jax.random.uniform(jax.random.key(5), (12, NUM), minval=-1)
    batched = step(state, action)
    params = HumanoidParams(max_steps_in_episode=1)
    auto = jax.jit(jax.vmap(env.step, (None, -1, -1, None), -1))
    obs, fresh, reward, terminated, truncated, info = auto(jax.random.key(6), state, action, params)
    np.testing.assert_allclose(info["final_observation"], batched[0], atol=1e-3)
    np.testing.assert_array_equal(terminated, batched[3])
    assert truncated.all() and (fresh.time == 0).all() and not np.asarray(reward).any()
    np.testing.assert_allclose(split(obs.T)["joints_pos"], np.tile(REST, (NUM, 1)), atol=0.2)


def test_types_do_not_depend_on_x64():
    with jax.enable_x64():
        env = Humanoid("stand")
        key, num = jax.eval_shape(lambda: jax.random.key(0)), jax.ShapeDtypeStruct((12,), jnp.float32)
        obs, state = jax.eval_shape(lambda key: env.reset_env(key, env.default_params), key)
        found = jax.eval_shape(lambda state, action: env.step_env(None, state, action, env.default_params), state, num)
    types = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]
    assert types(found[:2]) == types((obs, state))
    assert not {x.dtype for x in jax.tree.leaves(found)} & {np.dtype("int64"), np.dtype("float64")}


def test_pictures_show_every_limb_and_follow_it():
    """Seen from its right: legs and arms of the right side are in front."""
    env = world()[0]
    state = jax.tree.map(lambda x: x[..., 0], starts())
    render = jax.jit(env.render)
    image = np.asarray(render(state))
    shown = lambda image, colour: (image == planar.COLOURS[colour]).all(-1)
    assert image.shape == (*planar.PIXELS, 3) and image.dtype == np.uint8
    assert [shown(image, colour).sum() > 20 for colour in (0, 1, 2, 4, 5)] == [True, True, True, False, False]
    apart = state._replace(angle=state.angle.at[3:6].add(0.8).at[9:11].add(1.0))
    assert all(shown(np.asarray(render(apart)), colour).sum() > 20 for colour in set(env.colours))
    moved = np.asarray(render(state._replace(pos=state.pos + jnp.array([0.25, 0]))))
    assert (shown(moved, 0) == shown(image, 0)).all() and (moved != image).any()
