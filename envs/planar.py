"""Planar multi-agent locomotion: legged robots in a vertical plane, joints shared out among agents that see only what is near.

The robots and how they are shared out follow the tasks of Mix-ME (2311.01829): cheetah 6x1 (six agents with one joint each), walker
2x3, hopper 3x1, and quad 4x2, a four-legged robot in the plane. Sizes and motors of cheetah, walker and hopper are close to
MuJoCo's half-cheetah, walker2d and hopper; the physics is this file's own.

obs      (agents, O) float: the torso's height, pitch, velocity (x, z) and spin; angle and spin of the agent's own joints and of
         those within `obs_distance` of one of its own in the kinematic tree (joints on one rod are at distance 1), its own first;
         zeros up to the largest agent's O. Velocities in m/s, spins in 10 rad/s, both clipped to +-10 of those.
actions  (agents, joints of each) in [-1, 1], times each motor's largest torque
reward   the torso's velocity in x (m/s) + 1 for being alive (not the cheetah) - the robot's control cost x the sum of actions^2
ends     walker, hopper, quad: the torso is too low, too high or pitched too far; else after max_steps_in_episode
info     "contact" (feet,) bool: which feet bore weight during the step: the source of Mix-ME's descriptors

Physics. A tree of rigid rods in the torso's position and the rods' absolute angles; joints are exact. With u_ka the vectors of
`point_vectors`, the mass matrix between two angles is sum_k m_k (R(th_a) u_ka) . (R(th_b) u_kb) = P_ab cos(th_b - th_a) +
Q_ab sin(th_b - th_a), zero unless a and b lie on one limb, so that it factorises as L' D L without fill-in, from the tips of the
limbs to the torso (Featherstone, Rigid Body Dynamics Algorithms, 2008, Sec. 6.5). Each of SUBSTEPS semi-implicit steps takes
springs and dampers of the joints as they will be after it, then finds the impulses of the ground contacts (springs and dampers
that only push, implicit too, with Coulomb friction) point by point, in the coordinates u = L v in which the mass matrix is
diagonal. The equations are written out rod by rod over the batch, which XLA fuses into few loops. No LAPACK.

Every function takes arrays with any further axes behind those named, the same for state and action: a batch is cheapest as one
trailing axis, as in `step_env` on a state whose leaves end in (..., N). `jax.vmap` works as well.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common.env import Environment

DT, SUBSTEPS, SWEEPS = 0.05, 8, 2
H = DT / SUBSTEPS
STIFFNESS, DAMPING, FRICTION = 2e5, 1000.0, 0.9  # of the ground: N/m, N s/m, coefficient
LIMIT_STIFFNESS = 10.0  # of joint limits, in largest motor torques a radian
MAX_SPIN = 60.0  # rad/s
MANY = 10  # points of contact, above which they are resolved in a loop
COLOURS = np.array([[70, 70, 80], [200, 60, 50], [230, 140, 40], [190, 170, 40], [40, 130, 190], [50, 150, 90], [130, 80, 180]])
PIXELS, WINDOW = (72, 144), (-0.4, 2.0, 4.8)  # rows and columns of a picture; its lowest and highest z and its width, m


class Rod(NamedTuple):
    """A rigid rod that hangs on its parent by a hinge (the torso hangs on nothing). Lengths in m, in the pose of angle 0."""

    parent: int
    hinge: tuple[float, float]  # in the parent's frame, whose origin is the parent's own hinge
    ends: tuple[tuple[float, float], tuple[float, float]]  # in its own frame
    mass: float  # kg
    radius: float
    torque: float = 0.0  # of the motor, N m: at most this, either way
    limits: tuple[float, float] = (-1.0, 1.0)  # of its angle relative to the parent's, rad
    stiffness: float = 0.0  # of the joint, N m / rad
    damping: float = 1.0  # N m s / rad
    gain: float = 0.0  # N m / rad: above 0 a command is an angle, towards which the motor turns the joint; else a torque


class Robot(NamedTuple):
    rods: tuple[Rod, ...]  # the torso first, then limb by limb: joint j turns rod j + 1
    joints_per_agent: int  # agent i has joints [i k, (i + 1) k)
    feet: tuple[int, ...]  # rods whose contact makes the descriptor
    touching: tuple[tuple[int, int], ...]  # (rod, end) of every point that the ground holds up
    alive: float  # reward a step
    control_cost: float
    height: tuple[float, float]  # of the torso's centre, outside which the episode ends
    pitch: float
    armature: float  # inertia of each motor, kg m^2
    offset: float  # what makes a step's reward positive, for the QD score


def _leg(torso: int, hip, segments, masses, radii, torques, limits, stiffness, damping) -> list[Rod]:
    """A chain of rods, the first on the torso; segments: the vector from each hinge to the next, or (start, end) of a foot."""
    rods = []
    for i, segment in enumerate(segments):
        ends = segment if isinstance(segment[0], tuple) else ((0.0, 0.0), segment)
        parent, hinge = (0, hip) if i == 0 else (torso + i, segments[i - 1])
        rods.append(Rod(parent, hinge, ends, masses[i], radii[i], torques[i], limits[i], stiffness[i], damping[i]))
    return rods


def _cheetah() -> Robot:
    radii = (0.046,) * 3
    torso = Rod(-1, (0.0, 0.0), ((-0.5, 0.0), (0.5, 0.0)), 6.3, 0.046)
    back = _leg(
        0, (-0.5, 0.0), ((0.16, -0.25), (-0.28, -0.14), (0.06, -0.19)), (1.5, 1.6, 1.1), radii, (120.0, 90.0, 60.0),
        ((-1.05, 0.52), (-0.79, 0.79), (-0.79, 0.4)), (240.0, 180.0, 120.0), (6.0, 4.5, 3.0),
    )  # fmt: skip
    front = _leg(
        3, (0.5, 0.0), ((-0.14, -0.24), (0.13, -0.18), (0.09, -0.16)), (1.4, 1.2, 0.9), radii, (120.0, 60.0, 30.0),
        ((-0.7, 1.0), (-0.87, 1.2), (-0.5, 0.5)), (180.0, 120.0, 60.0), (4.5, 3.0, 1.5),
    )  # fmt: skip
    touching = ((0, 0), (0, 1), (3, 0), (3, 1), (6, 0), (6, 1))
    return Robot((torso, *back, *front), 1, (3, 6), touching, 0.0, 0.1, (-9.0, 9.0), 99.0, 0.1, 2.0)


def _biped(legs: int, foot, foot_mass, torque, armature, damping) -> tuple[Rod, ...]:
    torso = Rod(-1, (0.0, 0.0), ((0.0, -0.2), (0.0, 0.2)), 3.5, 0.05)
    segments, masses = ((0.0, -0.45), (0.0, -0.5), foot), (3.9, 2.7, foot_mass)
    limits = ((-1.2, 1.2), (-2.0, 0.05), (-0.79, 0.79))
    rods = [torso]
    for leg in range(legs):
        radii = (0.05, 0.04, 0.06)
        rods += _leg(3 * leg, (0.0, -0.2), segments, masses, radii, (torque,) * 3, limits, (0.0,) * 3, (damping,) * 3)
    return tuple(rods)


def _walker() -> Robot:
    rods = _biped(2, ((-0.05, 0.0), (0.2, 0.0)), 2.9, 100.0, 0.05, 1.0)
    touching = ((0, 1), (2, 0), (3, 0), (3, 1), (5, 0), (6, 0), (6, 1))
    return Robot(rods, 3, (3, 6), touching, 1.0, 1e-3, (0.8, 2.0), 1.0, 0.05, 2.0)


def _hopper() -> Robot:
    rods = _biped(1, ((-0.13, 0.0), (0.26, 0.0)), 5.0, 200.0, 0.5, 1.0)
    return Robot(rods, 1, (3,), ((0, 1), (2, 0), (3, 0), (3, 1)), 1.0, 1e-3, (0.7, 2.5), 0.4, 0.5, 2.0)


def _quad() -> Robot:
    rods = [Rod(-1, (0.0, 0.0), ((-0.5, 0.0), (0.5, 0.0)), 6.0, 0.06)]
    for leg, hip in enumerate((-0.4, -0.4, 0.4, 0.4)):
        rods += _leg(
            2 * leg, (hip, 0.0), ((0.1, -0.3), (-0.1, -0.3)), (0.9, 0.6), (0.04, 0.04), (60.0, 60.0),
            ((-0.9, 0.9), (-1.0, 1.0)), (0.0, 0.0), (1.5, 1.5),
        )  # fmt: skip
    touching = ((0, 0), (0, 1), (2, 1), (4, 1), (6, 1), (8, 1), (2, 0), (4, 0), (6, 0), (8, 0))
    return Robot(tuple(rods), 2, (2, 4, 6, 8), touching, 1.0, 0.05, (0.3, 1.3), 1.2, 0.05, 2.0)


ROBOTS = {"cheetah": _cheetah, "walker": _walker, "hopper": _hopper, "quad": _quad}


# --- constants of a robot, in numpy


def point_vectors(rods, rod: int, local) -> np.ndarray:
    """Vectors u (rods, 2) such that a point of a rod is at torso + sum_a R(th_a) u_a."""
    u = np.zeros((len(rods), 2))
    u[rod] = local
    while rod:
        u[rods[rod].parent] += rods[rod].hinge
        rod = rods[rod].parent
    return u


class Tree(NamedTuple):
    """What the equations of motion need. B rods, J = B - 1 joints, C points that touch the ground."""

    h: float  # s, of a substep
    mass: float
    moments: np.ndarray  # (B, 2): sum_k m_k u_ka
    p: np.ndarray  # (B, B)
    q: np.ndarray  # (B, B)
    motors: np.ndarray  # (B, B): motors' inertia, and joints' springs and dampers as implicit integration sees them
    hinges: np.ndarray  # (J, B): joint angles from absolute ones
    paths: tuple[tuple[int, ...], ...]  # of each rod: the rods from it to the torso, both included
    points: np.ndarray  # (C, B, 2): vectors of the points that touch the ground, from the torso's centre
    ends: np.ndarray  # (2 B, B, 2): both ends of every rod, likewise


def make_tree(robot: Robot, h: float = H) -> Tree:
    """The constants of a robot that moves in substeps of h seconds."""
    rods, num = robot.rods, len(robot.rods)
    mass = np.array([rod.mass for rod in rods])
    u = np.stack([point_vectors(rods, i, np.mean(rod.ends, axis=0)) for i, rod in enumerate(rods)])  # of the rods' middles
    inertia = [rod.mass * np.sum(np.subtract(*rod.ends) ** 2) / 12 + rod.mass * rod.radius**2 / 4 for rod in rods]
    p = np.einsum("k,kai,kbi->ab", mass, u, u) + np.diag(inertia)
    q = np.einsum("k,ka,kb->ab", mass, u[..., 1], u[..., 0])
    hinges = np.zeros((num - 1, num))
    for j, rod in enumerate(rods[1:]):
        hinges[j, j + 1], hinges[j, rod.parent] = 1, -1
    implicit = [robot.armature + h * (rod.damping + h * rod.stiffness) for rod in rods[1:]]
    ends = np.stack([point_vectors(rods, i, end) for i, rod in enumerate(rods) for end in rod.ends])
    points = np.stack([ends[2 * rod + end] for rod, end in robot.touching])
    paths = [(0,)]
    for i, rod in enumerate(rods[1:], 1):
        paths.append((i, *paths[rod.parent]))
    moments = np.einsum("k,kai->ai", mass, u)
    motors = hinges.T @ np.diag(implicit) @ hinges
    return Tree(h, float(mass.sum()), moments, p, q - q.T, motors, hinges, tuple(paths), points, ends)


def joint_distances(hinges) -> np.ndarray:
    """(J, J): how many bodies lie between two joints; those of one body are at distance 1."""
    adjacent = (np.abs(hinges) @ np.abs(hinges).T) > 0
    distance, reached = np.full(adjacent.shape, len(adjacent)), np.eye(len(adjacent), dtype=bool)
    for steps in range(len(adjacent)):
        distance = np.minimum(distance, np.where(reached, steps, len(adjacent)))
        reached = reached @ adjacent
    return distance


# --- the world


class PlanarState(NamedTuple):
    pos: jax.Array  # (2,): the centre of mass, x and z, m
    angle: jax.Array  # (B,): of every rod, absolute, rad
    vel: jax.Array  # (2,)
    spin: jax.Array  # (B,)
    time: jax.Array  # int32


class PlanarParams(NamedTuple):
    max_steps_in_episode: int | jax.Array = 200
    gravity: float | jax.Array = 9.81
    strength: float | jax.Array = 1.0  # of the motors: one number, or (J,)
    reset_noise: float | jax.Array = 0.05  # of angles (rad) and, tenfold, spins (rad/s) at the start; uniform, to either side


def _sum(terms):
    """A sum of a few arrays, written out: XLA fuses it, unlike a reduction of a short axis."""
    total, *rest = terms
    for term in rest:
        total = total + term
    return total


def _swing(angle, vector):
    """How a vector (x, z) in a rod's frame, seen from outside, changes as the rod turns -> x, z."""
    (sin, cos), (x, z) = angle, map(float, vector)
    return -sin * x - cos * z, cos * x - sin * z


# --- the equations of motion. Coordinates: 0 and 1 the torso's x and z, 2 + b the angle of rod b; angles as (sin, cos) of each rod


def chain(tree: Tree, i: int) -> list[int]:
    """The coordinates that coordinate i moves with: those of the rods between it and the torso, and the torso's own."""
    return [*(2 + b for b in tree.paths[i - 2][1:]), 1, 0] if i > 1 else [0] * i


def mass_matrix(tree: Tree, angles, more: dict | None = None) -> dict:
    """The nonzero entries (i, j), j <= i; more: inertia that is added to the turning of some rods' joints."""
    mass, (p, q, motors) = {(0, 0): tree.mass, (1, 0): 0.0, (1, 1): tree.mass}, (x.tolist() for x in (tree.p, tree.q, tree.motors))
    for a, (sin, cos) in enumerate(angles):
        mass[2 + a, 0], mass[2 + a, 1] = _swing((sin, cos), tree.moments[a])
        for b in tree.paths[a]:
            sin_b, cos_b = angles[b]
            turned = p[a][b] * (cos_b * cos + sin_b * sin) + q[a][b] * (sin_b * cos - cos_b * sin)
            mass[2 + a, 2 + b] = (p[a][a] if a == b else turned) + motors[a][b]
    for a, inertia in (more or {}).items():
        b = tree.paths[a][1]
        mass[2 + a, 2 + a], mass[2 + b, 2 + b] = mass[2 + a, 2 + a] + inertia, mass[2 + b, 2 + b] + inertia
        mass[2 + a, 2 + b] = mass[2 + a, 2 + b] - inertia
    return mass


def factorise(tree: Tree, mass: dict) -> tuple[dict, list]:
    """M = L' D L -> the entries of L below its unit diagonal, and 1 / D."""
    mass, lower, inverse = dict(mass), {}, [None] * (2 + len(tree.paths))
    for i in reversed(range(len(inverse))):
        inverse[i] = 1 / mass[i, i]
        above = chain(tree, i)
        for place, j in enumerate(above):
            lower[i, j] = mass[i, j] * inverse[i]
            for k in above[place:]:
                mass[j, k] = mass[j, k] - lower[i, j] * mass[i, k]
    return lower, inverse


def spread_force(tree: Tree, lower: dict, force: dict) -> dict:
    """L^-T f of a force on some coordinates, which with each must have all of its chain."""
    force = dict(force)
    for i in sorted(force, reverse=True):
        for j in chain(tree, i):
            force[j] = force[j] - lower[i, j] * force[i]
    return force


def servos(robot: Robot, tree: Tree, angle, spin, command) -> tuple[dict, dict]:
    """Motors that hold an angle: of their rods, the torque towards where the command wants the joint after the step, up to the
    motor's own; and what that adds to the inertia as implicit integration sees it, nothing while it is at its limit."""
    torques, inertias = {}, {}
    for b, rod in enumerate(robot.rods[1:], 1):
        if rod.gain:
            turn, rate = angle[b] - angle[rod.parent], spin[b] - spin[rod.parent]
            wanted = rod.gain * (command[b - 1] - turn - tree.h * rate)
            torques[b] = jnp.clip(wanted, -rod.torque, rod.torque)
            inertias[b] = jnp.where(jnp.abs(wanted) < rod.torque, tree.h * tree.h * rod.gain, 0.0)
    return torques, inertias


def forces(robot: Robot, tree: Tree, angle, angles, spin, command, gravity) -> dict:
    """Generalised forces: gravity, what the turning itself exerts, motors, the joints' springs, dampers and limits."""
    squares = [spin[b] ** 2 for b in range(len(angles))]
    pulls = [_swing((sin, cos), tree.moments[a]) for a, (sin, cos) in enumerate(angles)]
    force = {0: _sum(z * square for (_, z), square in zip(pulls, squares, strict=True))}
    force[1] = _sum(-x * square for (x, _), square in zip(pulls, squares, strict=True)) - gravity * tree.mass
    for a, (sin, cos) in enumerate(angles):
        force[2 + a] = -gravity * pulls[a][1]
        for b, (sin_b, cos_b) in enumerate(angles):
            if a != b and (a in tree.paths[b] or b in tree.paths[a]):
                sin_ab, cos_ab = sin_b * cos - cos_b * sin, cos_b * cos + sin_b * sin
                force[2 + a] = force[2 + a] + (float(tree.p[a, b]) * sin_ab - float(tree.q[a, b]) * cos_ab) * squares[b]
    for b, rod in enumerate(robot.rods[1:], 1):
        turn, rate = angle[b] - angle[rod.parent], spin[b] - spin[rod.parent]
        torque = command[b - 1] - LIMIT_STIFFNESS * rod.torque * (turn - jnp.clip(turn, *rod.limits))
        torque = torque - rod.stiffness * turn - (tree.h * rod.stiffness + rod.damping) * rate
        force[2 + b], force[2 + rod.parent] = force[2 + b] + torque, force[2 + rod.parent] - torque
    return force


class Contact(NamedTuple):
    """A point near the ground, in the coordinates u = L v."""

    by_x: dict  # velocity in x for each u_i
    by_z: dict
    w_x: jax.Array  # velocity in x for an impulse in x
    w_z: jax.Array
    depth: jax.Array  # below the ground
    give: jax.Array  # impulse for each m/s that the spring and the damper yield


def contact_points(robot: Robot, tree: Tree, height, angles, lower: dict, inverse: list) -> list[Contact]:
    """The points that the ground may hold up; `height` is the torso's."""
    points = []
    for (rod, _), vectors in zip(robot.touching, tree.points, strict=True):
        swings = {2 + b: _swing(angles[b], vectors[b]) for b in tree.paths[rod]}
        depth = robot.rods[rod].radius - height + _sum(x for x, _ in swings.values())
        by_x = spread_force(tree, lower, {0: 1.0, 1: 0.0} | {i: x for i, (x, _) in swings.items()})
        by_z = spread_force(tree, lower, {0: 0.0, 1: 1.0} | {i: z for i, (_, z) in swings.items()})
        w_x, w_z = (_sum(y * y * inverse[i] for i, y in by.items()) for by in (by_x, by_z))
        give = jnp.where(depth > 0, tree.h * DAMPING, 0.0) + tree.h * tree.h * STIFFNESS
        points.append(Contact(by_x, by_z, w_x, w_z, depth, give))
    return points


def resolve_contacts(points: list[Contact], inverse: list, u: list, h: float) -> tuple[list, list, list]:
    """Impulses of all points, one after another, SWEEPS times to and fro -> u, normal and tangential impulses.

    The normal impulse p >= 0 of a point at depth d that moves at v after the step solves p = h (k d - (c + h k) v), or is 0 where
    that would pull; friction stops the point or slips at FRICTION p.
    """
    normal, friction, u = [0.0] * len(points), [0.0] * len(points), list(u)

    def push(by, impulse):
        for i, y in by.items():
            u[i] = u[i] + y * inverse[i] * impulse

    for sweep in range(SWEEPS):
        for c in range(len(points))[:: -1 if sweep % 2 else 1]:
            point = points[c]
            speed = _sum(y * u[i] for i, y in point.by_z.items())
            excess = normal[c] - h * STIFFNESS * point.depth + point.give * speed
            new = jnp.maximum(normal[c] - excess / (1 + point.give * point.w_z), 0)
            push(point.by_z, new - normal[c])
            normal[c], limit = new, FRICTION * new
            speed = _sum(y * u[i] for i, y in point.by_x.items())
            new = jnp.clip(friction[c] - speed / point.w_x, -limit, limit)
            push(point.by_x, new - friction[c])
            friction[c] = new
    return u, normal, friction


def resolve_many(robot: Robot, tree: Tree, height, angles, lower: dict, inverse: list, u: list) -> tuple[list, list, list]:
    """What contact_points and resolve_contacts do, point by point in a loop: for robots of many points, which are compiled in a
    fraction of the time."""
    num, zero = len(robot.touching), jnp.zeros_like(height)
    one, paths = zero + 1, [tree.paths[rod] for rod, _ in robot.touching]
    swings = [
        [_swing(angles[b], v[b]) if b in path else (zero, zero) for b in range(len(angles))]
        for path, v in zip(paths, tree.points, strict=True)
    ]
    radii = np.array([robot.rods[rod].radius for rod, _ in robot.touching], np.float32).reshape(-1, *[1] * height.ndim)
    columns = lambda k: {0: jnp.stack([one, zero][k : k + 1] * num), 1: jnp.stack([zero, one][k : k + 1] * num)}
    rows = [columns(k) | {2 + b: jnp.stack([swing[b][k] for swing in swings]) for b in range(len(angles))} for k in (0, 1)]
    depth = radii - height + _sum(rows[0][2 + b] for b in range(len(angles)))
    rows = jnp.stack([jnp.stack([row[i] for i in range(len(inverse))]) for row in (spread_force(tree, lower, row) for row in rows)])
    inverse = jnp.stack([x + zero for x in inverse])[:, None]  # rows (2, coordinates, points, ...)
    w = (rows * rows * inverse).sum(1)
    give = jnp.where(depth > 0, tree.h * DAMPING, 0.0) + tree.h * tree.h * STIFFNESS
    order = [c for sweep in range(SWEEPS) for c in range(num)[:: -1 if sweep % 2 else 1]]

    def resolve(carry, c):
        u, normal, friction = carry
        (by_x, by_z), (w_x, w_z), push = rows[:, :, c], w[:, c], inverse[:, 0]
        excess = normal[c] - tree.h * STIFFNESS * depth[c] + give[c] * (by_z * u).sum(0)
        new = jnp.maximum(normal[c] - excess / (1 + give[c] * w_z), 0)
        u = u + by_z * push * (new - normal[c])
        limit = FRICTION * new
        slid = jnp.clip(friction[c] - (by_x * u).sum(0) / w_x, -limit, limit)
        u = u + by_x * push * (slid - friction[c])
        return (u, normal.at[c].set(new), friction.at[c].set(slid)), None

    none = jnp.zeros((num, *height.shape), height.dtype)
    (u, normal, friction), _ = jax.lax.scan(resolve, (jnp.stack(u), none, none), jnp.array(order, jnp.int32))
    return list(u), list(normal), list(friction)


def substep(robot: Robot, tree: Tree, moving, command, gravity):
    """One semi-implicit step of tree.h seconds: velocities, then positions with the new velocities -> moving, impulses (C, ...).

    `moving` is the first four fields of PlanarState, `command` a torque for each joint, an angle for servos. Position and velocity
    are kept at the centre of mass, whose momentum then changes by outer forces alone, to rounding.
    """
    pos, angle, vel, spin = moving
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    angles, share = list(zip(sin, cos, strict=True)), tree.moments / tree.mass
    swings = [_swing(angles[b], share[b]) for b in range(len(angles))]  # of the centre of mass about the torso's centre
    drift = [_sum(swing[i] * spin[b] for b, swing in enumerate(swings)) for i in (0, 1)]
    v = [vel[0] - drift[0], vel[1] - drift[1], *spin]
    height = pos[1] + _sum(x for x, _ in swings)

    torques, inertias = servos(robot, tree, angle, spin, command)
    command = [torques.get(b, x) for b, x in enumerate(command, 1)]
    lower, inverse = factorise(tree, mass_matrix(tree, angles, inertias))
    force = spread_force(tree, lower, forces(robot, tree, angle, angles, spin, command, gravity))
    u = [v[i] + _sum([0.0, *(lower[i, j] * v[j] for j in chain(tree, i))]) + tree.h * inverse[i] * force[i] for i in range(len(v))]
    if len(robot.touching) > MANY:
        u, normal, friction = resolve_many(robot, tree, height, angles, lower, inverse, u)
    else:
        u, normal, friction = resolve_contacts(contact_points(robot, tree, height, angles, lower, inverse), inverse, u, tree.h)
    for i in range(len(v)):
        v[i] = u[i] - _sum([0.0, *(lower[i, j] * v[j] for j in chain(tree, i))])

    vel = jnp.stack([vel[0] + _sum(friction) / tree.mass, vel[1] + _sum(normal) / tree.mass - tree.h * gravity])
    spin = jnp.clip(jnp.stack(v[2:]), -MAX_SPIN, MAX_SPIN)
    return (pos + tree.h * vel, angle + tree.h * spin, vel, spin), jnp.stack(normal)


class Legged(Environment):
    """A robot whose joints are shared out among agents: what every such world has, whatever its physics.

    A world says `share_out` when it is made, and has `all_features`: num_root features of the root, joint angles, joint spins.
    """

    def share_out(self, agents, hinges, num_root: int, obs_distance: int) -> None:
        """agents: the joints of each; hinges (J, bodies): which bodies each joint joins; obs_distance: how far an agent sees in the
        kinematic tree, -1: everything."""
        self.agents, self.num_agents, self.num_joints = agents, len(agents), len(hinges)
        self.num_actions, self.num_root = max(map(len, agents)), num_root
        self.own_joints = np.array([[*own, *own[-1:] * (self.num_actions - len(own))] for own in agents])
        self.num_features, self.features = num_root + 2 * self.num_joints, []  # features: which ones each agent sees
        between = joint_distances(hinges)
        for own in agents:  # its own joints come first
            near = [j for j in range(self.num_joints) if obs_distance < 0 or between[j, list(own)].min() <= obs_distance]
            angles = [num_root + j for j in (*own, *(j for j in near if j not in own))]
            self.features.append([*range(num_root), *angles, *(self.num_joints + i for i in angles)])
        self.obs_size = max(map(len, self.features))

    @property
    def default_params(self) -> PlanarParams:
        return PlanarParams()

    def action_space(self, params=None):
        from gymnax.environments import spaces  # on use only: gymnax starts the backend when it is imported

        return spaces.Box(-1.0, 1.0, (self.num_agents, self.num_actions))

    def observation_space(self, params=None):
        from gymnax.environments import spaces

        return spaces.Box(-jnp.inf, jnp.inf, (self.num_agents, self.obs_size))

    def get_obs(self, state, params=None, key=None) -> jax.Array:
        """What each agent sees, (agents, O, ...)."""
        features = self.all_features(state)
        features = jnp.concatenate([features, jnp.zeros_like(features[:1])])
        return features[np.array([seen + [self.num_features] * (self.obs_size - len(seen)) for seen in self.features])]


class Planar(Legged):
    """A robot shared out among agents, or, with `single`, one agent that has every joint and sees all."""

    def __init__(self, robot: str = "cheetah", obs_distance: int = 1, single: bool = False):
        """`obs_distance`: how far an agent sees in the kinematic tree; -1: everything."""
        self.robot_name, self.robot = robot, ROBOTS[robot]()
        self.tree = make_tree(self.robot)
        self.colours = [0, *(1 + j // self.robot.joints_per_agent for j in range(len(self.robot.rods) - 1))]  # of each rod
        num_joints, self.num_feet = len(self.robot.rods) - 1, len(self.robot.feet)
        each = num_joints if single else self.robot.joints_per_agent
        agents = [tuple(range(first, first + each)) for first in range(0, num_joints, each)]
        self.share_out(agents, self.tree.hinges, 5, obs_distance)

    def reset_env(self, key, params: PlanarParams):
        """The robot stands on the ground, up to noise -> obs, state."""
        noise = jax.random.uniform(key, (2, len(self.robot.rods)), jnp.float32, minval=-1) * params.reset_noise
        state = PlanarState(jnp.zeros(2, jnp.float32), noise[0], jnp.zeros(2, jnp.float32), 10 * noise[1], jnp.int32(0))
        state = state._replace(pos=jnp.stack([jnp.zeros((), jnp.float32), self.depths(state).max()]))
        return self.get_obs(state, params), state

    def step_env(self, key, state: PlanarState, action, params: PlanarParams):
        """action (agents, joints of each, ...) -> obs, state, reward (...), terminated (...) bool, info."""
        action = jnp.clip(jnp.nan_to_num(action), -1, 1).reshape(self.num_joints, *action.shape[2:])
        before = self.torso(state)[0][0]
        state, pushed = self.simulate(state, action, params)
        (x, height), _ = self.torso(state)
        robot = self.robot
        reward = (x - before) / DT + robot.alive - robot.control_cost * _sum(action**2)
        low, high = robot.height
        terminated = (height < low) | (height > high) | (jnp.abs(state.angle[0]) > robot.pitch)
        feet = [[i for i, (rod, _) in enumerate(robot.touching) if rod == foot] for foot in robot.feet]
        contact = jnp.stack([_sum([pushed[i] for i in points]) > 0 for points in feet])
        return self.get_obs(state, params), state, reward, terminated, {"contact": contact}

    def all_features(self, state: PlanarState) -> jax.Array:
        """The whole robot, (num_features, ...): torso (5), joint angles (J), joint spins (J)."""
        (_, height), vel = self.torso(state)
        hinged = lambda x: [x[i + 1] - x[rod.parent] for i, rod in enumerate(self.robot.rods[1:])]
        spins = jnp.clip(jnp.stack([state.spin[0], *hinged(state.spin)]) / 10, -10, 10)
        vel = jnp.clip(vel, -10, 10)
        first = jnp.stack([height, state.angle[0], vel[0], vel[1], spins[0]])
        return jnp.concatenate([first, jnp.stack(hinged(state.angle)), spins[1:]])

    # --- physics

    def simulate(self, state: PlanarState, action, params: PlanarParams):
        """SUBSTEPS steps under constant motor commands (J, ...) -> state, the impulses (C, ...) that the ground gave."""
        strength = jnp.broadcast_to(jnp.asarray(params.strength, jnp.float32), (self.num_joints,))
        command = [strength[j] * rod.torque * action[j] for j, rod in enumerate(self.robot.rods[1:])]

        def step(_, carry):
            moving, total = carry
            moving, impulse = substep(self.robot, self.tree, moving, command, params.gravity)
            return moving, total + impulse

        total = jnp.zeros((len(self.robot.touching), *action.shape[1:]), state.pos.dtype)
        moving, total = jax.lax.fori_loop(0, SUBSTEPS, step, (tuple(state[:4]), total))
        return PlanarState(*moving, state.time + 1), total

    def torso(self, state: PlanarState) -> tuple[jax.Array, jax.Array]:
        """Position and velocity of the torso's centre, (2, ...) each."""
        share = self.tree.moments / self.tree.mass
        swings = [_swing((jnp.sin(angle), jnp.cos(angle)), share[b]) for b, angle in enumerate(state.angle)]
        offset = jnp.stack([_sum(z for _, z in swings), -_sum(x for x, _ in swings)])
        drift = jnp.stack([_sum(swing[i] * state.spin[b] for b, swing in enumerate(swings)) for i in (0, 1)])
        return state.pos - offset, state.vel - drift

    def places(self, state: PlanarState, vectors) -> jax.Array:
        """x and z of points given by their vectors (C, B, 2) from the torso: (2, C, ...)."""
        sin, cos, vectors = jnp.sin(state.angle), jnp.cos(state.angle), vectors.astype(state.angle.dtype)
        x = jnp.tensordot(vectors[..., 0], cos, 1) - jnp.tensordot(vectors[..., 1], sin, 1)
        z = jnp.tensordot(vectors[..., 0], sin, 1) + jnp.tensordot(vectors[..., 1], cos, 1)
        return jnp.stack([x, z]) + self.torso(state)[0][:, None]

    def depths(self, state: PlanarState) -> jax.Array:
        """How far each point that the ground may hold up is below it, (C, ...), m."""
        heights = self.places(state, self.tree.points)[1]
        return jnp.stack([self.robot.rods[rod].radius - z for (rod, _), z in zip(self.robot.touching, heights, strict=True)])

    def energy(self, state: PlanarState, gravity: float = 9.81) -> jax.Array:
        """Kinetic and potential energy of the rods, J; that of springs (joints, ground) and of the motors is left out."""
        angles = list(zip(jnp.sin(state.angle), jnp.cos(state.angle), strict=True))
        mass = mass_matrix(self.tree._replace(motors=np.zeros_like(self.tree.motors)), angles)
        v = [*self.torso(state)[1], *state.spin]
        kinetic = _sum((0.5 if i == j else 1.0) * m * v[i] * v[j] for (i, j), m in mass.items())
        return kinetic + self.tree.mass * gravity * state.pos[1]

    # --- pictures

    def render(self, state: PlanarState) -> jax.Array:
        """A picture that follows the torso: (72, 144, 3) uint8. `colours` says each rod's colour; the ground is striped."""
        rows, columns = PIXELS
        low, high, width = WINDOW
        (middle, _), _ = self.torso(state)
        x = middle + (jnp.arange(columns) + 0.5) / columns * width - width / 2
        z = jnp.broadcast_to((high - (jnp.arange(rows) + 0.5) / rows * (high - low))[:, None], PIXELS)
        ends_x, ends_z = self.places(state, self.tree.ends)
        stripe = jnp.floor(2 * x) % 2 == 0
        image = jnp.where((z < 0)[..., None], jnp.where(stripe[:, None], 150, 110), jnp.array([225, 235, 245]))
        for i, rod in enumerate(self.robot.rods):
            ax, bx, az, bz = ends_x[2 * i], ends_x[2 * i + 1], ends_z[2 * i], ends_z[2 * i + 1]
            along = ((x - ax) * (bx - ax) + (z - az) * (bz - az)) / ((bx - ax) ** 2 + (bz - az) ** 2)
            along = jnp.clip(along, 0, 1)
            near = jnp.hypot(x - ax - along * (bx - ax), z - az - along * (bz - az)) < rod.radius
            image = jnp.where(near[..., None], jnp.asarray(COLOURS[self.colours[i]]), image)
        return image.astype(jnp.uint8)
