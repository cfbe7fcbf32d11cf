"""Multi-agent locomotion in MuJoCo's physics (MJX): the robots of Mix-ME (2311.01829), joints shared out among agents.

Needs the physics extra (`pip install -e '.[physics]'`). Robots are Gymnasium's models; rewards, ends and shares of joints are those
of Brax and JaxMARL's MABrax, from which the paper's tasks come: halfcheetah_6x1, walker2d_2x3, hopper_3x1, ant_4x2, humanoid_9|8.

obs      (agents, O) float: the root's place (height and pitch, or height and quaternion) and velocities; angle and speed of the
         agent's own joints and of those within `obs_distance` of one of its own in the kinematic tree (joints on one body are at
         distance 1), its own first; zeros up to the largest agent's O. Velocities in m/s and rad/s, clipped to +-10.
actions  (agents, A) in [-1, 1], the range of each motor; the last is unused by an agent with fewer than A joints
reward   speed x the root's velocity in x (m/s) + alive - control cost x the sum of controls^2
ends     the root is too low, too high or (walker, hopper) pitched too far; never for the half-cheetah
info     "contact" (feet,) bool: which feet were within their contact margin of the ground in any of the step's simulation steps

Differs from those tasks (their values in brackets):
 1. The tree gives what an agent sees (tables by hand, which for half-cheetah and walker are off by an index).
 2. Newton's solver, 6 iterations of 6 line searches, and Euler's method (humanoid: PGS; all but the half-cheetah: Runge-Kutta 4).
 3. A robot touches the ground only (hopper, walker and humanoid also themselves).
 4. The humanoid's speed is its root's (its centre of mass's), and it sees no inertias or forces.
 5. Every start has noise of the same size (the robots differ).

As in envs/planar.py, arrays may have one further axis behind those named, the same for state and action.
"""

import contextlib
import functools
import io
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from envs.planar import COLOURS, PIXELS, WINDOW, Legged, PlanarParams

ITERATIONS, LINE_SEARCHES = 6, 6
SLANT = (0.35, 0.2)  # of a picture: how far right and up a metre away from the viewer is drawn


class Task(NamedTuple):
    """A robot and what it is rewarded for."""

    model: str  # of Gymnasium's assets
    frames: int  # simulation steps in a step
    agents: tuple[tuple[int, ...], ...]  # the joints of each, in the order of the model's bodies
    feet: tuple[tuple[str, ...], ...]  # names of the geoms of each
    speed: float
    alive: float
    control_cost: float
    height: tuple[float, float]
    pitch: float
    offset: float  # what makes a step's reward positive, for the QD score


UPPER, LEGS = (0, 1, 2, *range(11, 17)), tuple(range(3, 11))
ANKLES = tuple((f"{name}_ankle_geom",) for name in ("left", "right", "third", "fourth"))
SHINS = tuple((f"{side}_shin1", f"{side}_foot") for side in ("right", "left"))
TASKS = {
    "halfcheetah_6x1": Task(
        "half_cheetah.xml", 5, tuple((j,) for j in range(6)), (("bfoot",), ("ffoot",)), 1.0, 0.0, 0.1, (-9.0, 9.0), 99.0, 9.231
    ),
    "walker2d_2x3": Task(
        "walker2d_v5.xml", 4, ((0, 1, 2), (3, 4, 5)), (("foot_geom",), ("foot_left_geom",)), 1.0, 1.0, 1e-3, (0.8, 2.0), 1.0, 1.413
    ),
    "hopper_3x1": Task("hopper.xml", 4, ((0,), (1,), (2,)), (("foot_geom",),), 1.0, 1.0, 1e-3, (0.7, 9.0), 0.2, 0.9),
    "ant_4x2": Task("ant.xml", 5, ((0, 1), (2, 3), (4, 5), (6, 7)), ANKLES, 1.0, 1.0, 0.5, (0.2, 1.0), 99.0, 3.24),
    "humanoid_9|8": Task("humanoid.xml", 5, (UPPER, LEGS), SHINS, 1.25, 5.0, 0.1, (1.0, 2.0), 99.0, 0.0),
}


class Body(NamedTuple):
    """A robot as MuJoCo's own code and as MJX have it."""

    host: Any
    device: Any
    data: Any  # MJX's state at rest
    margins: np.ndarray  # (G,): how far above the ground it begins to push each geom, m


@functools.cache
def load_model(name: str) -> Body:
    """A task's robot.

    Raises ModuleNotFoundError without the physics extra.
    """
    import gymnasium
    import mujoco

    with contextlib.redirect_stdout(io.StringIO()):  # where MJX says which of its other engines are missing
        from mujoco import mjx

    host = mujoco.MjModel.from_xml_path(str(Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets" / TASKS[name].model))
    host.opt.solver, host.opt.integrator = mujoco.mjtSolver.mjSOL_NEWTON, mujoco.mjtIntegrator.mjINT_EULER
    host.opt.iterations, host.opt.ls_iterations = ITERATIONS, LINE_SEARCHES
    ground = host.geom_type == mujoco.mjtGeom.mjGEOM_PLANE
    host.geom_contype[:], host.geom_conaffinity[:] = ground, ~ground
    buried, margins = mujoco.MjData(host), np.zeros(host.ngeom)
    buried.qpos[2 if host.jnt_type[0] == 0 else 1] -= 10  # everything touches
    mujoco.mj_forward(host, buried)
    margins[buried.contact.geom[:, 1]] = buried.contact.includemargin
    with jax.set_mesh(jax.sharding.Mesh(np.empty((), object), ())):  # MJX puts its arrays on one device: taken off it again
        device = mjx.put_model(host)
        device, data = jax.tree.map(np.asarray, (device, mjx.make_data(device)))
    return Body(host, device, data, margins)


class LocomotionState(NamedTuple):
    qpos: jax.Array  # (Q,): the root's, then the joints' angles, rad
    qvel: jax.Array  # (V,)
    warmstart: jax.Array  # (V,): the solver's last accelerations
    time: jax.Array  # int32


class Locomotion(Legged):
    """A robot shared out among agents, or, with `single`, one agent that has every joint and sees all."""

    def __init__(self, robot: str = "halfcheetah_6x1", obs_distance: int = 1, single: bool = False):
        """`obs_distance`: how far an agent sees in the kinematic tree; -1: everything."""
        self.robot_name, self.robot, self.model = robot, TASKS[robot], load_model(robot)
        host = self.model.host
        hinge = host.jnt_bodyid[host.jnt_type == 3]  # the root of a planar robot has a hinge too, its pitch
        self.free = host.jnt_type[0] == 0
        num_joints = len(hinge) - (not self.free)
        self.bodies = hinge[-num_joints:]  # that each joint turns
        hinges = np.zeros((num_joints, host.nbody))
        for j, body in enumerate(self.bodies):  # bodies without a joint are one with their parents
            hinges[j, body], hinges[j, host.body_weldid[host.body_parentid[body]]] = 1, -1
        self.root_place = slice(2, 7) if self.free else slice(1, 3)
        num_root = (5 if self.free else 2) + host.nv - num_joints
        self.share_out([tuple(range(num_joints))] if single else self.robot.agents, hinges, num_root, obs_distance)
        self.feet = [[host.geom(name).id for name in names] for names in self.robot.feet]
        self.num_feet = len(self.feet)

    def reset_env(self, key, params: PlanarParams):
        """The model's own pose, up to noise in all positions and velocities -> obs, state."""
        host, keys = self.model.host, jax.random.split(key)
        noise = lambda key, num: jax.random.uniform(key, (num,), jnp.float32, minval=-1) * params.reset_noise
        qpos, qvel = jnp.asarray(host.qpos0, jnp.float32) + noise(keys[0], host.nq), noise(keys[1], host.nv)
        state = LocomotionState(qpos, qvel, jnp.zeros(host.nv, jnp.float32), jnp.int32(0))
        return self.get_obs(state, params), state

    def step_env(self, key, state: LocomotionState, action, params: PlanarParams):
        """action (agents, A, ...) -> obs, state, reward (...), terminated (...) bool, info."""
        joint = jnp.clip(jnp.nan_to_num(action), -1, 1).reshape(self.num_agents * self.num_actions, *action.shape[2:])
        place = {j: a * self.num_actions + i for a, own in enumerate(self.agents) for i, j in enumerate(own)}
        joint = joint[np.array([place[j] for j in range(self.num_joints)])]
        simulate = functools.partial(self.simulate, params=params)
        before, time, moving = state.qpos[0], state.time + 1, state[:3]
        moving, contact, control = (jax.vmap(simulate, -1, -1) if joint.ndim > 1 else simulate)(moving, joint)
        state, robot = LocomotionState(*moving, time), self.robot
        seconds = self.model.host.opt.timestep * robot.frames
        reward = robot.speed * (state.qpos[0] - before) / seconds + robot.alive - robot.control_cost * (control**2).sum(0)
        (low, high), height = robot.height, state.qpos[2 if self.free else 1]
        terminated = (height < low) | (height > high) | ~jnp.isfinite(state.qpos).all(0)
        if not self.free:
            terminated |= jnp.abs(state.qpos[2]) > robot.pitch
        return self.get_obs(state, params), state, reward, terminated, {"contact": contact}

    def simulate(self, moving, joint, params: PlanarParams):
        """One step of one robot: motors (J,) -> the first three fields of its state, contact (feet,), controls (J,)."""
        from mujoco import mjx

        host, (model, data) = self.model.host, self.on_device()
        model = model.tree_replace({"opt.gravity": jnp.float32([0.0, 0.0, -1.0]) * params.gravity})
        low, high = host.actuator_ctrlrange.T
        joint = joint * jnp.broadcast_to(jnp.asarray(params.strength, jnp.float32), joint.shape)
        turned = host.actuator_trnid[:, 0] - (host.njnt - self.num_joints)  # the joint of each motor
        control = np.float32(low) + (joint[turned] + 1) / 2 * np.float32(high - low)
        data = data.replace(qpos=moving[0], qvel=moving[1], qacc_warmstart=moving[2], ctrl=control)

        def step(_, carry):
            data, contact = carry
            data = jax.tree.map(lambda new, old: new.astype(old.dtype), mjx.step(model, data), data)
            return data, contact | self.touching(data)

        data, contact = jax.lax.fori_loop(0, self.robot.frames, step, (data, jnp.zeros(self.num_feet, bool)))
        return (data.qpos, data.qvel, data.qacc_warmstart), contact, control

    def on_device(self):
        """MJX's model, and its state at rest."""
        return jax.tree.map(jnp.asarray, (self.model.device, self.model.data))

    def touching(self, data) -> jax.Array:
        """Which feet (feet,) are near enough to the ground for it to push them."""
        near = self.geom_ends(data)[..., 2].min(1) - self.model.host.geom_size[:, 0] < self.model.margins
        return jnp.stack([near[np.array(geoms)].any() for geoms in self.feet])

    def geom_ends(self, data) -> jax.Array:
        """Both ends of the axis of every capsule (a sphere's: its middle), (G, 2, 3), m."""
        host = self.model.host
        half = np.where(host.geom_type == 3, host.geom_size[:, 1], 0.0)[:, None] * data.geom_xmat[..., 2]
        return jnp.stack([data.geom_xpos - half, data.geom_xpos + half], axis=1)

    def all_features(self, state: LocomotionState) -> jax.Array:
        """The whole robot, (num_features, ...): root, joint angles (J), joint speeds (J)."""
        place, angles, speed = state.qpos[self.root_place], state.qpos[-self.num_joints :], jnp.clip(state.qvel, -10, 10)
        return jnp.concatenate([place, speed[: -self.num_joints], angles, speed[-self.num_joints :]])

    # --- pictures

    def agent_of_geom(self) -> list[int]:
        """The agent whose joint turns each geom; -1 for the root's."""
        host, agent = self.model.host, {0: -1}
        owner = {j: a for a, own in enumerate(self.agents) for j in own}
        joints = {body: owner[j] for j, body in enumerate(self.bodies)}
        for body in range(1, host.nbody):
            agent[body] = joints.get(body, agent[host.body_parentid[body]])
        return [agent[body] for body in host.geom_bodyid]

    def render(self, state: LocomotionState) -> jax.Array:
        """A slanted picture that follows the root: (72, 144, 3) uint8. Each agent's limbs have a colour; the ground is striped."""
        from mujoco import mjx

        host, (model, data) = self.model.host, self.on_device()
        ends = self.geom_ends(mjx.kinematics(model, data.replace(qpos=state.qpos)))
        away = ends[..., 1] - (state.qpos[1] if self.free else 0.0)
        ends_x, ends_z = ends[..., 0] + SLANT[0] * away, ends[..., 2] + SLANT[1] * away
        (rows, columns), (low, high, width) = PIXELS, WINDOW
        x = state.qpos[0] + (jnp.arange(columns) + 0.5) / columns * width - width / 2
        z = jnp.broadcast_to((high - (jnp.arange(rows) + 0.5) / rows * (high - low))[:, None], PIXELS)
        stripe = jnp.floor(2 * x) % 2 == 0
        image = jnp.where((z < 0)[..., None], jnp.where(stripe[:, None], 150, 110), jnp.array([225, 235, 245]))
        for i, agent in enumerate(self.agent_of_geom()):
            if host.geom_type[i] == 0:
                continue
            (ax, bx), (az, bz) = ends_x[i], ends_z[i]
            along = ((x - ax) * (bx - ax) + (z - az) * (bz - az)) / ((bx - ax) ** 2 + (bz - az) ** 2 + 1e-6)
            along = jnp.clip(along, 0, 1)
            near = jnp.hypot(x - ax - along * (bx - ax), z - az - along * (bz - az)) < host.geom_size[i, 0]
            image = jnp.where(near[..., None], jnp.asarray(COLOURS[1 + agent if agent >= 0 else 0]), image)
        return image.astype(jnp.uint8)
