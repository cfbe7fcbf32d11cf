"""The planar robots: the equations of motion against independent ones, contacts, what agents see, and long random runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs import planar
from envs.planar import (
    DT,
    ROBOTS,
    Planar,
    PlanarParams,
    PlanarState,
    chain,
    factorise,
    joint_distances,
    make_tree,
    mass_matrix,
    spread_force,
)

NUM = 64
STILL = PlanarParams(reset_noise=0.0)


@functools.cache
def world(robot):
    """A robot and its step, compiled once for a batch of NUM."""
    env = Planar(robot)
    return env, jax.jit(functools.partial(env.step_env, None))


@functools.cache
def starts(robot, noise):
    env = world(robot)[0]
    keys = jax.random.split(jax.random.key(0), NUM)
    return jax.jit(jax.vmap(env.reset_env, (0, None), -1))(keys, PlanarParams(reset_noise=noise))[1]


def no_action(env):
    return jnp.zeros((env.num_agents, env.num_actions, NUM))


def random_state(robot, seed):
    """One state in the air with random angles and velocities, numpy."""
    rng, num = np.random.default_rng(seed), len(ROBOTS[robot]().rods)
    return PlanarState(np.array([0.3, 5.0]), rng.normal(0, 1, num), rng.normal(0, 1, 2), rng.normal(0, 3, num), np.int32(0))


# --- equations of motion


@pytest.mark.parametrize("robot", ROBOTS)
def test_energy_is_that_of_the_moving_rods(robot):
    """Kinetic energy from the mass matrix = that of rods whose ends are moved along for a moment."""
    env, state, dt = Planar(robot), random_state(robot, 1), 1e-6
    with jax.enable_x64():
        moved = state._replace(pos=state.pos + dt * state.vel, angle=state.angle + dt * state.spin)
        ends, later = (np.asarray(env.places(s, env.tree.ends)).reshape(2, -1, 2) for s in (state, moved))
        energy = float(env.energy(PlanarState(*map(jnp.asarray, state)), gravity=0.0))
    speed = (later - ends).mean(2) / dt
    mass = np.array([rod.mass for rod in env.robot.rods])
    lengths = np.array([np.subtract(*rod.ends) for rod in env.robot.rods])
    inertia = mass * ((lengths**2).sum(1) / 12 + np.array([rod.radius for rod in env.robot.rods]) ** 2 / 4)
    np.testing.assert_allclose(energy, 0.5 * (mass * (speed**2).sum(0)).sum() + 0.5 * (inertia * state.spin**2).sum(), rtol=1e-4)
    np.testing.assert_allclose((mass * ends.mean(2)).sum(1) / mass.sum(), state.pos, atol=1e-5)
    np.testing.assert_allclose((mass * speed).sum(1) / mass.sum(), state.vel, atol=1e-3)
    np.testing.assert_allclose(np.hypot(*(ends[..., 1] - ends[..., 0])), np.hypot(*lengths.T), rtol=1e-5)  # joints are exact


@pytest.mark.parametrize("robot", ROBOTS)
def test_factors_of_the_mass_matrix(robot):
    """L' D L is the matrix, L^-T f solves it, and the matrix is positive definite."""
    tree, state = make_tree(ROBOTS[robot]()), random_state(robot, 2)
    mass = mass_matrix(tree, list(zip(np.sin(state.angle), np.cos(state.angle), strict=True)))
    lower, inverse = factorise(tree, mass)
    num = len(inverse)
    dense, factor = np.zeros((num, num)), np.eye(num)
    for (i, j), x in mass.items():
        dense[i, j] = dense[j, i] = x
    for (i, j), x in lower.items():
        factor[i, j] = x
    np.testing.assert_allclose(factor.T @ np.diag(1 / np.array(inverse)) @ factor, dense, atol=1e-12)
    assert np.linalg.eigvalsh(dense).min() > 0
    force = np.random.default_rng(0).normal(size=num)
    spread = spread_force(tree, lower, dict(enumerate(force)))
    np.testing.assert_allclose([spread[i] for i in range(num)], np.linalg.solve(factor.T, force), atol=1e-10)
    foot = ROBOTS[robot]().feet[0]
    alone = {i: force[i] for i in [2 + foot, *chain(tree, 2 + foot)]}
    spread = spread_force(tree, lower, alone)
    full = np.linalg.solve(factor.T, [alone.get(i, 0.0) for i in range(num)])
    np.testing.assert_allclose([spread.get(i, 0.0) for i in range(num)], full, atol=1e-10)


def test_acceleration_is_that_of_lagrange():
    """Without motors, dampers and ground, one step changes the velocities as d/dt dT/dv - dT/dq = -dV/dq says (by autodiff)."""
    robot = ROBOTS["cheetah"]()
    rods = tuple(rod._replace(damping=0.0, stiffness=0.0, torque=0.0) for rod in robot.rods)
    robot = robot._replace(rods=rods, armature=0.0)
    tree, state = make_tree(robot), random_state("cheetah", 3)
    with jax.enable_x64():
        q = jnp.concatenate([jnp.array([0.3, 5.0]), jnp.asarray(state.angle)])
        v = jnp.concatenate([jnp.asarray(state.vel), jnp.asarray(state.spin)])

        def dense(q):
            mass = mass_matrix(tree, list(zip(jnp.sin(q[2:]), jnp.cos(q[2:]), strict=True)))
            lower = (
                jnp.zeros((len(q), len(q))).at[tuple(np.array(list(mass)).T)].set(jnp.stack(list(map(jnp.asarray, mass.values()))))
            )
            return lower + jnp.tril(lower, -1).T

        def height(q):
            return q[1] - sum(
                planar._swing((jnp.sin(a), jnp.cos(a)), u)[0] for a, u in zip(q[2:], tree.moments / tree.mass, strict=True)
            )

        momentum_rate = jax.jvp(lambda q: dense(q) @ v, (q,), (v,))[1]
        pull = jax.grad(lambda q: 0.5 * v @ dense(q) @ v - 9.81 * tree.mass * height(q))(q)
        expected = jnp.linalg.solve(dense(q), pull - momentum_rate)
        angles = list(zip(jnp.sin(q[2:]), jnp.cos(q[2:]), strict=True))
        force = planar.forces(robot, tree, q[2:], angles, v[2:], [0.0] * 6, 9.81)
        got = jnp.linalg.solve(dense(q), jnp.stack([force[i] for i in range(len(q))]))
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("robot", ["walker", pytest.param("quad", marks=pytest.mark.slow)])
def test_free_fall_and_momentum(robot):
    """In the air the centre of mass falls by g t^2 / 2 whatever the limbs do, and motors change neither momentum."""
    env, step = world(robot)
    state = starts(robot, 0.3)
    state = state._replace(pos=state.pos.at[1].add(9.0), vel=state.vel.at[0].set(1.5))
    action = jax.random.uniform(jax.random.key(1), no_action(env).shape, minval=-1)
    first, momentum = state, angular_momentum(env, state)
    for _ in range(20):
        state = step(state, action, STILL)[1]
    np.testing.assert_allclose(first.pos[1] - state.pos[1], 0.5 * 9.81 * (20 * DT) ** 2, rtol=0.01)
    np.testing.assert_allclose(state.vel[0], 1.5, rtol=1e-4)
    np.testing.assert_allclose(state.vel[1], -9.81 * 20 * DT, rtol=1e-4)
    rms = lambda x: float(jnp.sqrt((x**2).mean()))
    assert rms(angular_momentum(env, state) - momentum) < 0.2 * rms(momentum)


def angular_momentum(env, state):
    """About the centre of mass, (N,): of the rods, without the motors' rotors."""
    angles = list(zip(jnp.sin(state.angle), jnp.cos(state.angle), strict=True))
    mass = mass_matrix(env.tree._replace(motors=np.zeros_like(env.tree.motors)), angles)
    v = [*env.torso(state)[1], *state.spin]
    full = lambda i: sum(m * v[b if a == i else a] for (a, b), m in mass.items() if i in (a, b))
    offset = state.pos - env.torso(state)[0]
    about_torso = sum(full(2 + b) for b in range(len(angles)))
    return about_torso - env.tree.mass * (offset[0] * state.vel[1] - offset[1] * state.vel[0])


# --- contacts


@pytest.mark.parametrize("robot", ["hopper", *(pytest.param(x, marks=pytest.mark.slow) for x in ROBOTS if x != "hopper")])
def test_random_runs_stay_sound(robot):
    """1000 random steps of 64 robots: finite, feet not deep in the ground, and the ground never pulls."""
    env, step = world(robot)

    def random_step(state, t):
        key = jax.random.fold_in(jax.random.key(2), t // 3)
        action = jax.random.uniform(key, no_action(env).shape, minval=-1.5, maxval=1.5)
        action = jnp.where(t % 200 > 100, jnp.sign(action), action)
        obs, after, reward, *_ = step(state, action, STILL)
        depth, pull = env.depths(after).max(0), state.vel[1] - 9.81 * DT - after.vel[1]
        return after, (depth.max(), (depth > 0.03).mean(), pull.max(), (obs, reward))

    state, (depth, deep, pull, seen) = jax.jit(lambda state: jax.lax.scan(random_step, state, jnp.arange(1000)))(starts(robot, 0.1))
    for x in jax.tree.leaves((state, seen)):
        assert np.isfinite(x).all()
    deepest, deep, pull = depth.max(), deep.mean(), pull.max()
    assert np.abs(state.pos[1]).max() < 10 and np.abs(state.pos[0]).max() < 1000 * DT * 15
    assert deep < 0.01 and deepest < 0.12  # after a jump of several metres the hopper lands hard
    assert pull < 1e-3


@pytest.mark.parametrize("robot", ROBOTS)
def test_passive_robots_lose_energy(robot):
    """Dropped from 0.3 m with limp motors: no more energy than at the start at any time, and less in the end."""
    env, step = world(robot)
    state = starts(robot, 0.02)  # within the joints' limits: their springs are not counted
    state = state._replace(pos=state.pos.at[1].add(0.3))
    energy = [env.energy(state)]
    for _ in range(60):
        state = step(state, no_action(env), STILL)[1]
        energy.append(env.energy(state))
    energy = np.array(energy)
    assert (energy.max(0) < energy[0] + 0.01 * np.abs(energy[0])).all()
    assert (energy[-1] < 0.95 * energy[0]).all()


def test_standing_still():
    """The cheetah rests on its springs: it bears its weight, on both feet, and hardly moves."""
    env, step = world("cheetah")
    state = starts("cheetah", 0.0)
    for _ in range(60):
        _, state, reward, terminated, info = step(state, no_action(env), STILL)
    assert info["contact"].all() and not terminated.any()
    assert np.abs(state.vel).max() < 0.02 and np.abs(reward).max() < 0.05
    assert -0.001 < float(env.depths(state).max()) < 0.01
    lifted = state._replace(pos=state.pos.at[1].add(1.0))
    assert not step(lifted, no_action(env), STILL)[4]["contact"].any()


def test_gliding_stops_by_friction():
    """A quad that slides at 2 m/s on stiff legs is slowed by at most FRICTION g."""
    env, step = world("quad")
    state = starts("quad", 0.0)
    state = state._replace(vel=state.vel.at[0].set(2.0))
    speeds = [2.0]
    for _ in range(40):
        state = step(state, no_action(env), STILL)[1]
        speeds.append(float(state.vel[0, 0]))
    slowing = -np.diff(speeds[:5]) / DT
    assert 0 < slowing.mean() < planar.FRICTION * 9.81 * 1.6  # legs that give let the normal force swing about the weight
    assert abs(speeds[-1]) < 0.3


def test_legs_that_do_the_same_stay_together():
    env, step = world("walker")
    state = starts("walker", 0.0)
    key = jax.random.key(3)
    for t in range(6):
        leg = jax.random.uniform(jax.random.fold_in(key, t), (1, 3, NUM), minval=-1)
        state = step(state, jnp.concatenate([leg, leg]), STILL)[1]
    apart = np.abs(state.angle[1:4] - state.angle[4:]).max(0)  # contacts are solved one after another, in turns of to and fro
    assert np.median(apart) < 0.02 and np.percentile(apart, 90) < 0.1
    assert np.abs(state.angle[1:4]).max(0).mean() > 0.3


@pytest.mark.parametrize("robot", ["walker", "cheetah"])
def test_many_points_are_resolved_as_few_are(robot):
    """Point by point in a loop, or written out: the same velocities and impulses; some touch, some slip, some are in the air."""
    env = Planar(robot)
    state = starts(robot, 0.3)
    height = env.torso(state)[0][1] - 0.02
    angles = list(zip(jnp.sin(state.angle), jnp.cos(state.angle), strict=True))
    lower, inverse = factorise(env.tree, mass_matrix(env.tree, angles))
    inverse, u = [x + 0 * height for x in inverse], list(2 * jax.random.normal(jax.random.key(0), (len(inverse), NUM)))
    many = jax.jit(lambda u: planar.resolve_many(env.robot, env.tree, height, angles, lower, inverse, u))(u)
    points = planar.contact_points(env.robot, env.tree, height, angles, lower, inverse)
    few = planar.resolve_contacts(points, inverse, u, env.tree.h)
    for a, b in zip(many, few, strict=True):
        np.testing.assert_allclose(jnp.stack(a), jnp.stack(b), rtol=1e-4, atol=1e-4)
    normal, friction = np.stack(few[1]), np.stack(few[2])
    slips = np.abs(np.abs(friction) - planar.FRICTION * normal) < 1e-6
    assert (normal == 0).any() and ((normal > 0) & slips).any() and ((normal > 0) & ~slips).any()


# --- servos


def servo_hopper(gain, h=0.004):
    """A hopper whose motors hold angles, and its tree in substeps of h."""
    robot = ROBOTS["hopper"]()
    robot = robot._replace(rods=tuple(rod._replace(gain=gain * (i > 0), torque=30.0) for i, rod in enumerate(robot.rods)))
    return robot, make_tree(robot, h)


def in_the_air(num):
    """At rest, upright."""
    return jnp.zeros((2, num)).at[1].set(9.0), jnp.zeros((4, num)), jnp.zeros((2, num)), jnp.zeros((4, num))


def steps_of(robot, tree, num_steps):
    """Substeps in the air without gravity, compiled."""
    step = lambda _, moving, command: planar.substep(robot, tree, moving, command, 0.0)[0]
    return jax.jit(lambda moving, command: jax.lax.fori_loop(0, num_steps, lambda i, moving: step(i, moving, command), moving))


def test_servos_bring_joints_to_the_angles_that_are_commanded():
    """And change no momentum."""
    robot, tree = servo_hopper(200.0)
    command = jnp.array([[0.5, -0.3], [-1.0, -0.2], [0.3, 0.1]])
    pos, angle, vel, spin = steps_of(robot, tree, 1500)(in_the_air(2), command)
    np.testing.assert_allclose(jnp.diff(angle, axis=0), command, atol=0.01)
    np.testing.assert_allclose(spin, 0, atol=0.02)
    np.testing.assert_allclose(vel, 0, atol=1e-4)
    np.testing.assert_allclose(pos, [[0, 0], [9, 9]], atol=1e-3)


def test_a_servo_at_its_limit_is_a_motor_with_all_its_torque():
    """However far its target is; nearer to it, it is a spring that pushes less."""
    robot, tree = servo_hopper(200.0)
    motor, _ = servo_hopper(0.0)
    sign = jnp.array([[1.0], [-1.0], [1.0]])
    servo, torque = steps_of(robot, tree, 1), steps_of(motor, tree, 1)
    far = servo(in_the_air(3), sign * jnp.array([1.0, 2.0, 0.1]))[3]
    full = torque(in_the_air(3), sign * jnp.array([30.0, 30.0, 20.0]))[3]
    np.testing.assert_allclose(far[:, :2], full[:, :2], rtol=1e-5)
    assert (np.abs(full[1:, 0]) > 0.01).all()
    assert (np.abs(far[:, 2]) < np.abs(full[:, 2])).all()  # the spring gives way within the step


def test_a_tree_is_for_substeps_of_its_own():
    """A fall of 0.1 s in substeps of either length; dampers and springs are as stiff as the substep is long."""
    for h, num in ((0.002, 50), (0.01, 10)):
        robot, tree = servo_hopper(0.0, h)
        assert tree.h == h
        damped = [rod.damping * h + rod.stiffness * h * h + robot.armature for rod in robot.rods[1:]]
        np.testing.assert_allclose(tree.motors, tree.hinges.T @ np.diag(damped) @ tree.hinges)
        fall = lambda _, moving, robot=robot, tree=tree: planar.substep(robot, tree, moving, jnp.zeros(3), 9.81)[0]
        start = tuple(x[..., 0] for x in in_the_air(1))
        pos, _, vel, _ = jax.jit(lambda num=num, fall=fall, start=start: jax.lax.fori_loop(0, num, fall, start))()
        np.testing.assert_allclose(vel[1], -0.981, rtol=1e-4)
        np.testing.assert_allclose(9 - pos[1], 0.5 * 9.81 * 0.1 * (0.1 + h), rtol=1e-3)
    assert make_tree(robot).h == planar.H == DT / planar.SUBSTEPS


# --- rewards, ends, agents


def test_rewards_and_ends():
    env, step = world("hopper")
    state = starts("hopper", 0.0)
    tilt = jnp.where(jnp.arange(NUM) % 2 == 0, 0.6, 0.0)
    state = state._replace(angle=state.angle + tilt, pos=state.pos.at[1].add(0.8))  # tilted beyond the 0.4 rad allowed
    action = jnp.full_like(no_action(env), 0.2)
    _, after, reward, terminated, _ = step(state, action, STILL)
    assert (terminated == (tilt > 0)).all()
    advance = env.torso(after)[0][0] - env.torso(state)[0][0]
    np.testing.assert_allclose(reward, advance / DT + 1.0 - 1e-3 * 3 * 0.04, rtol=1e-5, atol=6e-5)
    assert (after.time == 1).all()


def test_motors_and_gravity_are_parameters():
    env, step = world("cheetah")
    state, action = starts("cheetah", 0.0), jnp.full_like(no_action(Planar("cheetah")), 0.7)
    weak = step(state, action, STILL._replace(strength=jnp.array([1.0, 1, 1, 0, 0, 0])))[1]
    full = step(state, action, STILL._replace(strength=jnp.ones(6)))[1]
    none = step(state, jnp.zeros_like(action), STILL._replace(strength=jnp.ones(6)))[1]
    assert np.abs(full.spin - none.spin)[5:].min() > np.abs(weak.spin - none.spin)[5:].max()
    light = step(state._replace(pos=state.pos + 3), jnp.zeros_like(action), STILL._replace(gravity=1.0, strength=jnp.ones(6)))[1]
    np.testing.assert_allclose(light.vel[1], -DT, rtol=1e-4)


def test_distances_in_the_tree():
    cheetah = joint_distances(make_tree(ROBOTS["cheetah"]()).hinges)
    np.testing.assert_array_equal(cheetah[0], [0, 1, 2, 1, 2, 3])
    np.testing.assert_array_equal(cheetah[2], [2, 1, 0, 3, 4, 5])
    quad = joint_distances(make_tree(ROBOTS["quad"]()).hinges)
    np.testing.assert_array_equal(quad[0], [0, 1, 1, 2, 1, 2, 1, 2])


def joints_seen(env, agent):
    return [f - 5 for f in env.features[agent] if 5 <= f < 5 + env.num_joints]


def test_agents_see_what_is_near():
    assert [joints_seen(Planar("cheetah", 0), i) for i in range(6)] == [[0], [1], [2], [3], [4], [5]]
    assert [joints_seen(Planar("cheetah", 1), i) for i in (0, 1, 2)] == [[0, 1, 3], [1, 0, 2], [2, 1]]
    assert [joints_seen(Planar("cheetah", 2), i) for i in (0, 2)] == [[0, 1, 2, 3, 4], [2, 0, 1]]
    assert joints_seen(Planar("walker", 1), 1) == [3, 4, 5, 0]
    assert joints_seen(Planar("quad", 1), 0) == [0, 1, 2, 4, 6]
    for robot in ROBOTS:
        everything, whole = Planar(robot, -1), Planar(robot, single=True)
        assert all(sorted(seen) == list(range(everything.num_features)) for seen in everything.features)
        assert (
            whole.num_agents == 1 and whole.num_actions == whole.num_joints and whole.features == [list(range(whole.num_features))]
        )
    assert {name: (Planar(name).num_agents, Planar(name).num_actions) for name in ROBOTS} == {
        "cheetah": (6, 1), "walker": (2, 3), "hopper": (3, 1), "quad": (4, 2),
    }  # fmt: skip


def test_observations_hold_the_features_seen_and_zeros():
    env = Planar("cheetah", 1)
    state = jax.tree.map(jnp.asarray, random_state("cheetah", 4))
    obs, features = np.asarray(env.get_obs(state)), np.asarray(env.all_features(state))
    assert obs.shape == (6, env.obs_size) == (6, 11)
    (x, z), vel = env.torso(state)
    np.testing.assert_allclose(features[:5], [z, state.angle[0], *vel, state.spin[0] / 10], rtol=1e-5)
    np.testing.assert_allclose(features[5:8], np.diff(np.asarray(state.angle)[:4]), rtol=1e-5)
    np.testing.assert_allclose(features[11], (state.spin[1] - state.spin[0]) / 10, rtol=1e-5)
    np.testing.assert_allclose(features[14], (state.spin[4] - state.spin[0]) / 10, rtol=1e-5)
    np.testing.assert_array_equal(obs[2], [*features[:5], features[7], features[6], features[13], features[12], 0, 0])
    bent = state._replace(angle=state.angle.at[6].add(0.3))  # the front foot: seen by agents 4 and 5 alone
    assert np.flatnonzero((np.asarray(env.get_obs(bent))[:, 5:] != obs[:, 5:]).any(1)).tolist() == [4, 5]


def test_single_steps_vmap_and_trailing_batches_agree():
    """And a run is the same when it is made again; auto-reset at the time limit."""
    env, step = world("hopper")
    state, action = starts("hopper", 0.1), jax.random.uniform(jax.random.key(5), (3, 1, NUM), minval=-1)
    batched = step(state, action, STILL)
    again = step(state, action, STILL)
    assert all((x == y).all() for x, y in zip(jax.tree.leaves(batched), jax.tree.leaves(again), strict=True))
    params = PlanarParams(max_steps_in_episode=1)
    auto = jax.jit(jax.vmap(env.step, (None, -1, -1, None), -1))
    obs, fresh, reward, terminated, truncated, info = auto(jax.random.key(6), state, action, params)
    np.testing.assert_allclose(info["final_observation"], batched[0], atol=1e-4)
    np.testing.assert_allclose(reward, batched[2], atol=1e-4)
    assert truncated.all() and (fresh.time == 0).all() and np.abs(obs[0, 0] - 1.25).max() < 0.2


def test_pictures():
    env = world("walker")[0]
    state = jax.tree.map(lambda x: x[..., 0], starts("walker", 0.0))
    image = np.asarray(jax.jit(env.render)(state))
    assert image.shape == (72, 144, 3) and image.dtype == np.uint8
    ground = image[(image == 150).all(-1) | (image == 110).all(-1)]
    assert len(ground) > 0.1 * 72 * 144 and (image[-1] != image[0]).any()
    torso = (image == planar.COLOURS[0]).all(-1)
    rows, columns = np.nonzero(torso)
    assert torso.sum() > 20 and abs(columns.mean() - 71.5) < 2 and rows.max() < 45
    moved = np.asarray(jax.jit(env.render)(state._replace(pos=state.pos + jnp.array([0.25, 0]))))
    assert (moved != image).any() and (
        (moved == planar.COLOURS[0]).all(-1) == torso
    ).all()  # the picture follows; the ground does not
