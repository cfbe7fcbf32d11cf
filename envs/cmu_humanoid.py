"""The CMU humanoid with 56 joints in MuJoCo's physics (MJX), and the tasks that H-GAP (2312.02682) plans for.

Needs the physics extra (`pip install -e '.[physics]'`): the robot is dm_control's CMUHumanoidPositionControlledV2020 on its floor,
with that class's motors. Observations are those of MoCapAct's rollouts (envs/mocapact.py), tasks and ends those of H-GAP's code.
MJX takes minutes to compile on a CPU, and is slow there: this is for a GPU or TPU.

obs      (224,) float32: OBS_PARTS one after the other, as the root sees them (no place, no heading). Lengths m, angles rad, speeds
         m/s and rad/s, acceleration m/s^2; what motors aim at in [-1, 1]; torques tanh(2 x / 60 N m); touch 0 or 1 (over 1e-3 N).
         Joints are in the motors' order, by name. The root's x points to the robot's left, y up its spine, z where it looks.
action   (56,) in [-1, 1]: where each joint is to be within its range; motors follow with a delay of 30 ms
step     30 ms: 6 simulation steps of 5 ms. Accelerometer, torque and touch are those of the last one, the rest is of its end.
reward   CMU_TASKS[task] of the observation after the step
ends     something other than a foot is on the ground (not in rotate_x and rotate_z), or the numbers are no longer finite
starts   dm_control's upright pose, just above the ground, at rest but for N(0, 0.1) of the root's velocity (m/s) and spin (rad/s)

Differs from dm_control and H-GAP's code (their values in brackets):
 1. Feet, toes, hands, head and lower back collide, with the ground only (all but face and nose, with all): limbs pass through one
    another, which random actions soon make them do. What else is on the ground still ends an episode; in the two rotations, which
    go on, it sinks in. Fingers and thumbs feel no touch.
 2. Newton's solver has 6 iterations of 6 line searches (100 of 50) and no pass against slip (5 iterations); 32-bit numbers (64).
 3. Starts are one pose (any of the first 10 frames of 12 recordings, whose files dm_control fetches).
 4. At a start, accelerometer and torque are those of the pose at rest (with the noise: up to 0.04 m/s^2 apart).
 5. A robot whose numbers are no longer finite stays where it was, which ends its episode (so it does there, with a reward of 0).
 6. Where the up direction has no part in the plane that a task looks at, its reward is 0 (NaN).

As in envs/planar.py, arrays may have one further axis behind those named, the same for state and action.
"""

import contextlib
import functools
import io
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common.env import Environment
from envs.humanoid import split

OBS_PARTS = {
    "actuator_activation": 56,
    "appendages_pos": 15,  # right and left wrist, right and left foot, head
    "body_height": 1,
    "end_effectors_pos": 12,  # the same without the head
    "joints_pos": 56,
    "joints_vel": 56,
    "accelerometer": 3,
    "gyro": 3,
    "torque": 6,  # at the left and the right shoulder
    "touch": 10,  # hand, fingers, thumb: left, then right; left and right toes; right and left foot
    "velocimeter": 3,
    "world_zaxis": 3,  # where up is
}
OBS_SIZE = sum(OBS_PARTS.values())
FELT = ("accelerometer", "torque", "touch")  # sensors of accelerations and forces
FRAMES, TIMESTEP = 6, 0.005
ITERATIONS, LINE_SEARCHES = 6, 6
COLLIDING = ("lhand", "rhand", "head", "lowerback")  # besides the feet
ENDS = ("rradius", "lradius", "rfoot", "lfoot", "head")
UPRIGHT = (0.0, 0.0, 1.143, 0.859, 1.0, 1.0, 0.859)  # m, quaternion before it is normalised
TORQUE_SCALE, TOUCH_THRESHOLD = 30.0, 1e-3  # N m, N
MAY_LIE = ("rotate_x", "rotate_z")


# --- tasks


def share(x, y):
    """x / |(x, y)|, and 0 where that is 0 / 0."""
    return x * jax.lax.rsqrt(jnp.maximum(x**2 + y**2, 1e-12))


def go_forward(parts) -> jax.Array:
    """The velocity to where the robot looks (m/s), times how upright it is, leaning to its sides left out."""
    _, up, ahead = jnp.moveaxis(parts["world_zaxis"], -1, 0)
    return share(up, ahead) * parts["velocimeter"][..., 2]


def shift_left(parts) -> jax.Array:
    """The velocity to the robot's side (m/s), times how upright it is, leaning forward left out."""
    side, up, _ = jnp.moveaxis(parts["world_zaxis"], -1, 0)
    return share(up, side) * parts["velocimeter"][..., 0]


# What H-GAP plans for: named observations (..., n) -> rewards (...), m/s or rad/s.
CMU_TASKS = {
    "speed": lambda parts: jnp.linalg.norm(parts["velocimeter"], axis=-1),
    "forward": go_forward,
    "backward": lambda parts: -go_forward(parts),
    "shift_left": shift_left,
    "jump": lambda parts: jnp.maximum(0, (parts["velocimeter"] * parts["world_zaxis"]).sum(-1)),
    "rotate_x": lambda parts: parts["gyro"][..., 0],  # a somersault
    "rotate_y": lambda parts: parts["gyro"][..., 1],  # a turn
    "rotate_z": lambda parts: parts["gyro"][..., 2],  # a cartwheel
}


class CmuBody(NamedTuple):
    """The robot as MuJoCo's own code and as MJX have it."""

    host: Any
    device: Any
    data: Any  # MJX's state at rest
    start: np.ndarray  # (63,) float32: the upright pose
    felt: np.ndarray  # (19,) float32: FELT in that pose
    feet: tuple[int, ...]  # geoms that may be on the ground
    others: tuple[int, ...]  # geoms that may not


def build():
    """dm_control's walker on dm_control's floor, as they are -> walker, physics.

    Raises ModuleNotFoundError without dm_control, ImportError where MuJoCo is too new for it.
    """
    import mujoco

    try:
        with warnings.catch_warnings(action="ignore"):  # without a display
            from dm_control import mjcf
            from dm_control.locomotion.arenas import floors
            from dm_control.locomotion.walkers import cmu_humanoid
    except ModuleNotFoundError as error:
        words = f"the CMU humanoid needs dm_control ({error.name} is missing): pip install 'nightjax[physics]'"
        raise ModuleNotFoundError(words, name=error.name) from error
    try:
        walker, arena = cmu_humanoid.CMUHumanoidPositionControlledV2020(), floors.Floor()
        walker.create_root_joints(arena.attach(walker))
        return walker, mjcf.Physics.from_mjcf_model(arena.mjcf_model)
    except AttributeError as error:  # dm_control reads every field that a model of its time had
        words = f"this dm_control does not work with MuJoCo {mujoco.__version__} ({error}): pip install 'mujoco>=3.17,<4'"
        raise ImportError(words) from error


def simplify(host, feet) -> None:
    """Makes a model what MJX can simulate: see above, 1 and 2. `feet`: geoms."""
    import mujoco

    host.opt.timestep, host.opt.noslip_iterations = TIMESTEP, 0
    host.opt.iterations, host.opt.ls_iterations = ITERATIONS, LINE_SEARCHES
    colliding = np.isin(np.arange(host.ngeom), [*feet, *(host.geom(f"walker/{name}").id for name in COLLIDING)])
    ground = host.geom_type == mujoco.mjtGeom.mjGEOM_PLANE
    host.geom_contype[:], host.geom_conaffinity[:] = ground, colliding & ~ground


def narrow(x) -> np.ndarray:
    """An array of MJX's on the host, in 32 bits whatever JAX_ENABLE_X64 says."""
    kinds = {"float64": np.float32, "int64": np.int32}
    return np.asarray(x, kinds.get(str(x.dtype), x.dtype))


@functools.cache
def load_model() -> CmuBody:
    """The robot, with what MJX cannot simulate left out.

    Raises ModuleNotFoundError without the physics extra, ImportError as `build` does.
    """
    import mujoco

    with contextlib.redirect_stdout(io.StringIO()):  # where MJX says which of its other engines are missing
        from mujoco import mjx

    walker, physics = build()
    host = physics.model.ptr
    feet = tuple(host.geom(geom.full_identifier).id for geom in walker.ground_contact_geoms)
    solid = (host.geom_type != mujoco.mjtGeom.mjGEOM_PLANE) & ((host.geom_contype | host.geom_conaffinity) > 0)
    others = tuple(int(i) for i in np.flatnonzero(solid) if i not in feet)
    simplify(host, feet)
    start = np.array(host.qpos0)
    start[:7] = UPRIGHT
    start[3:7] /= np.linalg.norm(start[3:7])
    rest = mujoco.MjData(host)
    rest.qpos[:] = start
    flags, host.opt.disableflags = host.opt.disableflags, host.opt.disableflags | mujoco.mjtDisableBit.mjDSBL_ACTUATION
    mujoco.mj_forward(host, rest)  # as dm_control looks at a new pose: with the motors off
    host.opt.disableflags = flags
    with jax.set_mesh(jax.sharding.Mesh(np.empty((), object), ())):  # MJX puts its arrays on one device: taken off it again
        device = mjx.put_model(host)
        device, data = jax.tree.map(narrow, (device, mjx.make_data(device)))
    return CmuBody(host, device, data, start.astype(np.float32), feel(host, rest.sensordata, np), feet, others)


def feel(host, sensordata, xp=jnp):
    """What is felt, FELT (19,) float32, of a model's sensors. `xp`: numpy or jax.numpy."""
    import mujoco

    kinds = mujoco.mjtSensor
    found = []
    for kind in (kinds.mjSENS_ACCELEROMETER, kinds.mjSENS_TORQUE, kinds.mjSENS_TOUCH):
        sensors = np.flatnonzero(host.sensor_type == kind)
        found.append(sensordata[np.concatenate([host.sensor_adr[i] + np.arange(host.sensor_dim[i]) for i in sensors])])
    acceleration, torque, force = found
    touch = (force > TOUCH_THRESHOLD).astype(acceleration.dtype)
    return xp.concatenate([acceleration, xp.tanh(torque / TORQUE_SCALE), touch]).astype(xp.float32)


# --- the world


class CmuParams(NamedTuple):
    max_steps_in_episode: int | jax.Array = 400
    reset_noise: float | jax.Array = 0.1  # standard deviation of the root's velocity (m/s) and spin (rad/s) at the start


class CmuState(NamedTuple):
    qpos: jax.Array  # (63,): the root's place, its quaternion, joint angles
    qvel: jax.Array  # (62,): the root's velocity in the world's frame, its spin in its own, joint speeds
    act: jax.Array  # (56,): what the motors aim at, after their delay
    warmstart: jax.Array  # (62,): the solver's last accelerations
    felt: jax.Array  # (19,): FELT in the last simulation step
    time: jax.Array  # int32


class CmuHumanoid(Environment):
    """One humanoid on a flat floor with one of CMU_TASKS."""

    parts, tasks, falling, obs_size, num_actions = OBS_PARTS, CMU_TASKS, MAY_LIE, OBS_SIZE, 56
    can_draw = False  # not inside jit

    def __init__(self, task: str = "speed"):
        """Raises KeyError for another task, and what `load_model` does."""
        self.task, self.reward, self.model = task, CMU_TASKS[task], load_model()
        host = self.model.host
        self.joints = host.actuator_trnid[:, 0]  # of the motors, in their order
        self.root, *self.ends = (host.body(f"walker/{name}").id for name in ("root", *ENDS))

    @property
    def default_params(self) -> CmuParams:
        return CmuParams()

    def action_space(self, params=None):
        from gymnax.environments import spaces  # on use only: gymnax starts the backend when it is imported

        return spaces.Box(-1.0, 1.0, (self.num_actions,))

    def observation_space(self, params=None):
        from gymnax.environments import spaces

        return spaces.Box(-jnp.inf, jnp.inf, (self.obs_size,))

    def reset_env(self, key, params: CmuParams):
        """The upright pose, its root a little in motion -> obs (224,), state."""
        noise = jax.random.normal(key, (6,), jnp.float32) * params.reset_noise
        qvel = jnp.zeros(self.model.host.nv, jnp.float32).at[:6].set(noise.astype(jnp.float32))
        rest = [jnp.zeros(num, jnp.float32) for num in (self.model.host.na, self.model.host.nv)]
        state = CmuState(jnp.asarray(self.model.start), qvel, *rest, jnp.asarray(self.model.felt), jnp.int32(0))
        return self.get_obs(state, params), state

    def step_env(self, key, state: CmuState, action, params: CmuParams):
        """action (56, ...) -> obs (224, ...), state, reward (...), terminated (...) bool, info: `fallen` (...) bool."""
        action, time = jnp.clip(jnp.nan_to_num(action), -1, 1).astype(jnp.float32), state.time + 1
        simulate = jax.vmap(self.simulate, -1, -1) if action.ndim > 1 else self.simulate
        moving, broken = simulate(state[:5], action)
        state = CmuState(*moving, time)
        obs, fallen = self.look(state)
        reward = self.reward(split(jnp.moveaxis(obs, 0, -1), OBS_PARTS))
        terminated = broken if self.task in MAY_LIE else broken | fallen
        return obs, state, reward, terminated, {"fallen": broken | fallen}

    def get_obs(self, state: CmuState, params=None, key=None) -> jax.Array:
        """What the robot senses, (224, ...)."""
        return self.look(state)[0]

    def simulate(self, moving, action):
        """One step of one robot: action (56,) -> the first five fields of its state, whether its numbers were no longer finite."""
        from mujoco import mjx

        model, data = self.on_device()
        qpos, qvel, act, warmstart, _ = moving
        data = data.replace(qpos=qpos, qvel=qvel, act=act, qacc_warmstart=warmstart, ctrl=action)

        def step(_, data):
            return jax.tree.map(lambda new, old: new.astype(old.dtype), mjx.step(model, data), data)

        data = jax.lax.fori_loop(0, FRAMES, step, data)
        after = (data.qpos, data.qvel, data.act, data.qacc_warmstart, feel(self.model.host, data.sensordata))
        broken = ~jnp.stack([jnp.isfinite(x).all() for x in after]).all()
        return jax.tree.map(lambda new, old: jnp.where(broken, old, new), after, moving), broken

    def look(self, state: CmuState):
        """-> obs (224, ...), whether something other than a foot is on the ground (...) bool."""
        look = jax.vmap(self.look_at_one, -1, (-1, -1)) if state.qpos.ndim > 1 else self.look_at_one
        return look(state[:5])

    def look_at_one(self, moving):
        """`look` for one robot. Its root's body, the frame that moves freely and the root's sensors all coincide."""
        from mujoco import mjx

        (model, data), host = self.on_device(), self.model.host
        qpos, qvel, act, _, felt = moving
        data = mjx.kinematics(model, data.replace(qpos=qpos))
        turn = data.xmat[self.root]  # from the root's frame to the world's
        ends = ((data.xpos[np.array(self.ends)] - data.xpos[self.root]) @ turn).reshape(-1)
        acceleration, torque, touch = jnp.split(felt, [3, 9])
        angles, speeds = qpos[host.jnt_qposadr[self.joints]], qvel[host.jnt_dofadr[self.joints]]
        place = [act, ends, data.xpos[self.root, 2:], ends[:12], angles, speeds]
        senses = [acceleration, qvel[3:6], torque, touch, qvel[:3] @ turn, turn[2]]
        return jnp.concatenate(place + senses).astype(jnp.float32), self.lying(data)

    def lying(self, data) -> jax.Array:
        """Whether one of the geoms that may not reaches the ground, bool: a capsule's, a ball's or an ellipsoid's lowest point."""
        import mujoco

        host, geoms = self.model.host, np.array(self.model.others)
        kind, size = host.geom_type[geoms], host.geom_size[geoms].astype(np.float32)
        ellipsoid = kind == mujoco.mjtGeom.mjGEOM_ELLIPSOID
        half = np.where((kind == mujoco.mjtGeom.mjGEOM_CAPSULE)[:, None], size[:, 1:2] * np.float32([0, 0, 1]), 0)
        half, radius = np.where(ellipsoid[:, None], size, half), np.where(ellipsoid, 0, size[:, 0])
        reach = jnp.linalg.norm(half * data.geom_xmat[geoms, 2], axis=-1) + radius
        return (data.geom_xpos[geoms, 2] < reach).any()

    def on_device(self):
        """MJX's model, and its state at rest."""
        return jax.tree.map(jnp.asarray, (self.model.device, self.model.data))

    def render(self, state: CmuState, height: int = 240, width: int = 320) -> np.ndarray:
        """A picture by MuJoCo's own renderer that follows one robot, (height, width, 3) uint8: on the host, not in jit.

        Raises what MuJoCo does where there is no OpenGL.
        """
        import mujoco

        data = mujoco.MjData(self.model.host)
        data.qpos[:] = state.qpos
        mujoco.mj_forward(self.model.host, data)
        with mujoco.Renderer(self.model.host, height, width) as renderer:
            renderer.update_scene(data, "walker/side")
            return renderer.render()
