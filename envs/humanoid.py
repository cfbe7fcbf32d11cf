"""A planar humanoid that follows commanded joint angles, with the tasks and the kinds of observation of H-GAP's CMU humanoid.

H-GAP (2312.02682) plans for dm_control's humanoid of 56 joints in three dimensions (envs/cmu_humanoid.py). This one has 12 in a
vertical plane, on the physics of envs/planar.py, and simulates some thousand times as fast on a CPU: pelvis, chest, head, two arms
(shoulder, elbow), two legs (hip, knee, ankle); 65 kg, 1.75 m. It walks to the right, which is +x.

obs         (56,) float, ego-centric, in the order of PARTS; lengths in m, speeds in m/s and rad/s, accelerations in m/s^2 (gravity
            included, the step's mean), touch in body weights; x is forward and z up in the frame of the pelvis
actions     (12,) in [-1, 1]: commanded angles, from one end of each joint's range to the other; a filter of 30 ms follows them, a
            spring (implicit, up to the motor's largest torque) that
reward      of the task, a function of what is observed after the step: one of TASKS
terminated  anything but a foot touched the ground during the step, unless the task is one of FALLING
info        "fallen" bool: whether that happened

Differs from dm_control's walker (its own way in brackets): the world is a plane, so that no task turns or shifts sideways; no
torque sensors; hands and feet, but no head, among the end effectors; accelerations and touch are a control step's mean (its last
moment's); `crouch` and `stand` are tasks (none of the paper's).

Arrays may have one further axis behind those named, the same for state and action: the cheapest form of a batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from envs.planar import Planar, Robot, Rod, make_tree, substep

CONTROL_DT, STEPS = 0.03, 5  # s of a control step, its substeps
LAG = 0.03  # s, of the filter that commands go through
PARTS = {  # name -> size, in the order of the observation
    "actuator_activation": 12, "joints_pos": 12, "joints_vel": 12, "body_height": 1, "end_effectors_pos": 8, "accelerometer": 2,
    "gyro": 1, "touch": 4, "velocimeter": 2, "world_zaxis": 2,
}  # fmt: skip
STANDING, CROUCHING = 0.97, 0.65  # height of the pelvis, m


class Joint(NamedTuple):
    """What turns a rod. Angles in rad, counter-clockwise: arms and legs swing forward, the trunk bends back."""

    name: str
    low: float
    high: float
    torque: float  # N m
    gain: float  # N m / rad
    damping: float  # N m s / rad
    standing: float  # the angle at rest


HIP, KNEE = Joint("hip", -0.7, 2.2, 200, 500, 10, 0.2), Joint("knee", -2.5, 0.0, 180, 400, 8, -0.4)
LEG = (HIP, KNEE, Joint("ankle", -0.7, 0.9, 120, 250, 4, 0.2))
ARM = (Joint("shoulder", -1.2, 3.0, 60, 100, 3, -0.1), Joint("elbow", 0.0, 2.4, 40, 60, 2, 0.3))
JOINTS = (Joint("waist", -1.3, 0.5, 200, 500, 15, 0.0), Joint("neck", -0.7, 0.7, 20, 30, 1.5, 0.0), *LEG, *LEG, *ARM, *ARM)
ROD_COLOURS = (0, 0, 0, 4, 4, 4, 1, 1, 1, 5, 5, 2, 2)  # of each rod: left leg and arm, right leg and arm


def _body() -> Robot:
    """The rods, joint by joint: pelvis, chest, head, left leg, right leg, left arm, right arm; points that touch: feet first."""
    shapes = [  # parent, hinge in its frame, ends, mass, radius
        (0, (0.0, 0.1), ((0.0, 0.0), (0.0, 0.35)), 18.0, 0.11),
        (1, (0.0, 0.37), ((0.0, 0.1), (0.0, 0.2)), 4.5, 0.1),
    ]
    for leg in (3, 6):
        shapes.append((0, (0.0, -0.1), ((0.0, 0.0), (0.0, -0.42)), 8.0, 0.07))
        shapes.append((leg, (0.0, -0.42), ((0.0, 0.0), (0.0, -0.41)), 3.5, 0.05))
        shapes.append((leg + 1, (0.0, -0.41), ((-0.06, -0.05), (0.17, -0.05)), 1.1, 0.03))
    for arm in (9, 11):
        shapes.append((1, (0.0, 0.32), ((0.0, 0.0), (0.0, -0.28)), 2.0, 0.045))
        shapes.append((arm, (0.0, -0.28), ((0.0, 0.0), (0.0, -0.32)), 1.7, 0.04))
    rods = [Rod(-1, (0.0, 0.0), ((0.0, -0.1), (0.0, 0.1)), 10.0, 0.1)]
    for (parent, hinge, ends, mass, radius), joint in zip(shapes, JOINTS, strict=True):
        rods.append(Rod(parent, hinge, ends, mass, radius, joint.torque, (joint.low, joint.high), 0.0, joint.damping, joint.gain))
    touching = ((5, 0), (5, 1), (8, 0), (8, 1), (0, 0), (1, 1), (2, 1), (3, 1), (6, 1), (10, 1), (12, 1))
    return Robot(tuple(rods), 1, (5, 8), touching, 0.0, 0.0, (-9.0, 9.0), 99.0, 0.02, 0.0)


LOW, HIGH, REST = (np.float32([getattr(joint, name) for joint in JOINTS]) for name in ("low", "high", "standing"))
REST_ACTION = 2 * (REST - LOW) / (HIGH - LOW) - 1  # the command under which it stands
SOLES = 4  # of the points that touch, those of the feet


# --- tasks: functions of named observations (..., n) -> (...)


def split(obs, parts: dict[str, int] = PARTS) -> dict:
    """Observations (..., O) by name, (..., n) each: what a task is a function of."""
    places = np.cumsum([0, *parts.values()])
    return {name: obs[..., first:last] for name, first, last in zip(parts, places[:-1], places[1:], strict=True)}


def speed(obs) -> jax.Array:
    """How fast the pelvis moves, m/s."""
    return jnp.sqrt((obs["velocimeter"] ** 2).sum(-1) + 1e-12)


def forward(obs) -> jax.Array:
    """Its speed ahead, m/s, times how upright it is."""
    return obs["world_zaxis"][..., 1] * obs["velocimeter"][..., 0]


def backward(obs) -> jax.Array:
    """The opposite of forward."""
    return -forward(obs)


def jump(obs) -> jax.Array:
    """Its speed upwards, m/s, or 0."""
    return jnp.maximum((obs["velocimeter"] * obs["world_zaxis"]).sum(-1), 0)


def rotate(obs) -> jax.Array:
    """How fast it turns over forwards (a somersault), rad/s."""
    return -obs["gyro"][..., 0]


def near(x, target: float, width: float) -> jax.Array:
    """1 at the target, falling to 1/e at a distance of `width`."""
    return jnp.exp(-(((x - target) / width) ** 2))


def crouch(obs) -> jax.Array:
    """Upright with the pelvis low: at most 1."""
    return near(obs["body_height"][..., 0], CROUCHING, 0.1) * jnp.maximum(obs["world_zaxis"][..., 1], 0)


def stand(obs) -> jax.Array:
    """Upright at full height, and still: at most 1."""
    upright = near(obs["body_height"][..., 0], STANDING, 0.1) * jnp.maximum(obs["world_zaxis"][..., 1], 0)
    return upright * near(speed(obs), 0.0, 0.3)


TASKS = {task.__name__: task for task in (speed, forward, backward, jump, rotate, crouch, stand)}
FALLING = ("rotate",)  # tasks in which all of the body may touch the ground


# --- the world


class HumanoidState(NamedTuple):
    """The first four fields are a PlanarState's."""

    pos: jax.Array  # (2,): the centre of mass, x and z, m
    angle: jax.Array  # (13,): of every rod, absolute, rad
    vel: jax.Array  # (2,)
    spin: jax.Array  # (13,)
    time: jax.Array  # int32
    act: jax.Array  # (12,): filtered commands, in [-1, 1]
    push: jax.Array  # (11,): mean force of the ground on each point that touches in the last step, in body weights
    accel: jax.Array  # (2,): what a sensor in the pelvis would measure, its own frame, m/s^2


class HumanoidParams(NamedTuple):
    max_steps_in_episode: int | jax.Array = 400
    gravity: float | jax.Array = 9.81
    reset_noise: float | jax.Array = 0.03  # of joint angles (rad) and, tenfold, of all speeds (m/s, rad/s): normal


class Humanoid(Planar):
    """The humanoid with one task's reward; `task` None: no reward, and `terminated` as in most tasks."""

    parts, tasks, falling = PARTS, TASKS, FALLING
    num_actions, obs_size, can_draw = len(JOINTS), sum(PARTS.values()), True

    def __init__(self, task: str | None = None):
        self.task, self.robot, self.colours = task, _body(), ROD_COLOURS
        self.tree = make_tree(self.robot, CONTROL_DT / STEPS)

    @property
    def default_params(self) -> HumanoidParams:
        return HumanoidParams()

    def action_space(self, params=None):
        from gymnax.environments import spaces  # on use only: gymnax starts the backend when it is imported

        return spaces.Box(-1.0, 1.0, (self.num_actions,))

    def observation_space(self, params=None):
        from gymnax.environments import spaces

        return spaces.Box(-jnp.inf, jnp.inf, (self.obs_size,))

    def reset_env(self, key, params: HumanoidParams):
        """It stands on the ground, up to noise -> obs, state."""
        noise = jax.random.normal(key, (3, len(self.robot.rods)), jnp.float32) * params.reset_noise
        relative, angle = jnp.concatenate([jnp.zeros(1, jnp.float32), REST + noise[0, 1:]]), [noise[0, 0]]
        for i, rod in enumerate(self.robot.rods[1:], 1):
            angle.append(angle[rod.parent] + relative[i])
        return self.begin(jnp.stack(angle), 10 * noise[1, :2], jnp.full(len(angle), 10 * noise[2, 0], jnp.float32), params)

    def begin(self, angle, vel, spin, params):
        """At rest on the ground in a pose: absolute angles (13,), velocity (2,) and spins (13,) -> obs, state."""
        like, vel = jnp.zeros_like(angle[0]), jnp.asarray(vel, jnp.float32)
        joints = jnp.stack([angle[i] - angle[rod.parent] for i, rod in enumerate(self.robot.rods[1:], 1)])
        low, high = (x.reshape(-1, *[1] * (joints.ndim - 1)) for x in (LOW, HIGH))
        act = jnp.clip(2 * (joints - low) / (high - low) - 1, -1, 1)
        push, accel = jnp.stack([like] * len(self.robot.touching)), jnp.stack([like, like + params.gravity])
        state = HumanoidState(jnp.stack([like, like]), angle, vel, spin, jnp.int32(0), act, push, accel)
        state = state._replace(pos=jnp.stack([like, self.depths(state).max(0)]))
        return self.get_obs(state, params), state

    def step_env(self, key, state: HumanoidState, action, params: HumanoidParams):
        """action (12, ...) -> obs, state, reward (...), terminated (...) bool, info."""
        state = self.simulate(state, jnp.clip(jnp.nan_to_num(action), -1, 1), params)
        fallen = (state.push[SOLES:] > 0).any(0)
        reward = self.reward(state) if self.task else jnp.zeros_like(state.pos[0])
        terminated = jnp.zeros_like(fallen) if self.task in self.falling else fallen
        return self.get_obs(state, params), state, reward, terminated, {"fallen": fallen}

    def simulate(self, state: HumanoidState, action, params: HumanoidParams) -> HumanoidState:
        """One control step under commands (12, ...) in [-1, 1]."""
        keep, before = float(np.exp(-CONTROL_DT / STEPS / LAG)), self.torso(state)[1]

        def step(_, carry):
            moving, act, total = carry
            act = action + keep * (act - action)
            command = [low + (high - low) * (x + 1) / 2 for low, high, x in zip(LOW.tolist(), HIGH.tolist(), act, strict=True)]
            moving, impulse = substep(self.robot, self.tree, moving, command, params.gravity)
            return moving, act, total + impulse

        none = jnp.zeros_like(state.push)
        moving, act, total = jax.lax.fori_loop(0, STEPS, step, (tuple(state[:4]), state.act, none))
        state = HumanoidState(*moving, state.time + 1, act, total / (CONTROL_DT * self.tree.mass * 9.81), state.accel)
        x, z = (self.torso(state)[1] - before) / CONTROL_DT
        return state._replace(accel=jnp.clip(self.into_frame(state, x, z + params.gravity), -100, 100))

    def into_frame(self, state: HumanoidState, x, z) -> jax.Array:
        """A vector as the pelvis sees it, (2, ...): forward, up."""
        sin, cos = jnp.sin(state.angle[0]), jnp.cos(state.angle[0])
        return jnp.stack([cos * x + sin * z, cos * z - sin * x])

    def get_obs(self, state: HumanoidState, params=None, key=None) -> jax.Array:
        """What it feels, (56, ...)."""
        pairs = [(i, rod.parent) for i, rod in enumerate(self.robot.rods[1:], 1)]
        (x, height), vel = self.torso(state)
        ends = self.places(state, self.tree.ends[np.array([2 * rod + 1 for rod in (10, 12, 5, 8)])])  # hands, feet
        ends = self.into_frame(state, ends[0] - x, ends[1] - height)
        found = {
            "actuator_activation": state.act,
            "joints_pos": jnp.stack([state.angle[i] - state.angle[j] for i, j in pairs]),
            "joints_vel": jnp.stack([state.spin[i] - state.spin[j] for i, j in pairs]),
            "body_height": height[None],
            "end_effectors_pos": ends.swapaxes(0, 1).reshape(2 * ends.shape[1], *ends.shape[2:]),
            "accelerometer": state.accel,
            "gyro": state.spin[:1],
            "touch": state.push[:SOLES],
            "velocimeter": self.into_frame(state, *vel),
            "world_zaxis": jnp.stack([jnp.sin(state.angle[0]), jnp.cos(state.angle[0])]),
        }
        return jnp.concatenate([found[name] for name in PARTS])

    def reward(self, state: HumanoidState) -> jax.Array:
        """The task's reward by the state itself: what its function finds in the observation, by test."""
        (_, height), (x, z) = self.torso(state)
        sin, cos, speed = jnp.sin(state.angle[0]), jnp.cos(state.angle[0]), jnp.sqrt(x * x + z * z + 1e-12)
        ahead, upright = cos * (cos * x + sin * z), jnp.maximum(cos, 0)
        rewards = {
            "speed": lambda: speed,
            "forward": lambda: ahead,
            "backward": lambda: -ahead,
            "jump": lambda: jnp.maximum(z, 0),
            "rotate": lambda: -state.spin[0],
            "crouch": lambda: upright * near(height, CROUCHING, 0.1),
            "stand": lambda: upright * near(height, STANDING, 0.1) * near(speed, 0.0, 0.3),
        }
        return rewards[self.task]()
