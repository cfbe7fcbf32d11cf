"""How humanoids are run: whose rewards count and until when, users' tasks, planners that simulate. On a world of points, whose
numbers can be followed by hand."""

from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.runs.config import UsageError
from envs.humanoid import Humanoid
from envs.humanoid_control import (
    KNOTS,
    START_NOISE,
    Tasks,
    begin_worlds,
    check_task,
    film,
    follow_plan,
    make_tasks,
    may_fall,
    play,
    rewards,
    shaped_noise,
    true_dynamics,
)

EDGE = 1.0  # beyond it points fall


class Points(NamedTuple):
    """M points on a line."""

    pos: jax.Array  # (1, M)
    vel: jax.Array  # (1, M)
    spin: jax.Array  # (3, M)
    act: jax.Array  # (2, M)
    time: jax.Array  # (M,)


class World:
    """Points that move by half of the first action; the second is only seen. A point beyond the edge has fallen."""

    parts = {"place": 1, "seen": 1}
    tasks = {"far": lambda obs: obs["place"][..., 0], "shown": lambda obs: obs["seen"][..., 0] ** 2}
    falling, obs_size, num_actions, default_params, can_draw = ("shown",), 2, 2, None, True

    def get_obs(self, state, params=None):
        return jnp.concatenate([state.pos, state.act[1:]])

    def step_env(self, key, state, action, params):
        state = state._replace(pos=state.pos + action[:1] / 2, act=action, time=state.time + 1)
        fallen = jnp.abs(state.pos[0]) > EDGE
        return self.get_obs(state), state, jnp.full_like(state.pos[0], 100.0), fallen, {"fallen": fallen}

    def reset_env(self, key, params):
        zero = jnp.zeros(1, jnp.float32)
        state = Points(zero, zero + 3, jnp.zeros(3, jnp.float32), jnp.zeros(2, jnp.float32), jnp.int32(0))
        return self.get_obs(state), state

    def render(self, state):
        return jnp.broadcast_to(100 + 10 * state.pos[0], (2, 3, 3)).astype(jnp.uint8)


def points(*places):
    num = len(places)
    zeros = lambda *shape: jnp.zeros(shape, jnp.float32)
    return Points(jnp.float32([places]), zeros(1, num), zeros(3, num), zeros(2, num), jnp.zeros(num, jnp.int32))


def tasks_of(*which):
    return Tasks(tuple(World.tasks), tuple(World.tasks.values()), (False, True), np.array(which))


def by_hand(start, actions, task):
    """Total and length of one episode of actions (T, 2), numpy."""
    place, total, length = start, 0.0, 0
    for move, seen in np.asarray(actions):
        place += move / 2
        if task == 0 and abs(place) > EDGE:
            break
        total, length = total + (place if task == 0 else seen**2), length + 1
    return total, length


# --- tasks


@pytest.fixture
def user(tmp_path):
    """A name for --task whose file has this text."""

    def name(text, function="mine", file="my_task.py"):
        (tmp_path / file).write_text(text)
        return f"{tmp_path / file}:{function}"

    return name


def refused(words, name):
    with pytest.raises(UsageError) as error:
        check_task(name, Humanoid)
    assert words in str(error.value) and "\n" not in str(error.value) and str(error.value).startswith("--task ")


def test_tasks_by_name_need_no_file():
    assert all(check_task(name, Humanoid) is None for name in ("all", *Humanoid.tasks))


def test_a_users_task_is_its_function(user):
    task = check_task(user("import jax.numpy as jnp\ndef mine(obs): return jnp.abs(obs['gyro'][..., 0]) + 2"), Humanoid)
    assert task({"gyro": jnp.array([[-3.0], [1.0]])}).tolist() == [5, 3]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def mine(obs): return obs['gyro']", "gave float32 of shape (2, 3, 1) for observations (2, 3, n); must be float (2, 3)"),
        ("def mine(obs): return obs['gyro'].sum()", "of shape ()"),
        ("def mine(obs): return obs['gyro'][..., 0] > 0", "gave bool"),
        ("def mine(obs): return (obs['gyro'][..., 0]).astype(int)", "gave int32"),
        ("def mine(obs): return 1 / obs['gyro'][..., 0]", "is not finite for a humanoid that stands still"),
        ("def mine(obs): return 0 / obs['gyro'][..., 0]", "is not finite"),
        ("def mine(obs): raise ValueError('two\\nlines')", "ValueError: two lines"),
        ("def mine(obs): return obs['nose'][..., 0]", "KeyError: 'nose'"),
        ("def mine(): return 0", "TypeError"),
        ("mine = 3", "TypeError"),
        ("def yours(obs): return 0", "AttributeError"),
        ("def mine(obs) return 0", "SyntaxError"),
        ("import no_such_module", "ModuleNotFoundError"),
    ],
)
def test_faulty_tasks_are_refused_in_one_line(user, text, words):
    refused(words, user(text))


def test_tasks_that_are_not_there_are_refused_in_one_line(user, tmp_path):
    refused("is none of speed, forward, backward, jump, rotate, crouch, stand, all, or FILE.py:FUNCTION", "fly")
    refused("is none of", str(tmp_path / "my_task.py"))  # no function
    refused("is none of", user("def mine(obs): return obs['gyro'][..., 0]", file="my_task.txt"))
    refused(f"there is no file {tmp_path / 'none.py'}", f"{tmp_path / 'none.py'}:mine")


def test_a_task_sees_the_body_upright_when_it_is_tried(user):
    """A function that is only defined for a body above the ground, and that points up, is none to refuse."""
    text = "import jax.numpy as jnp\ndef mine(obs): return jnp.log(obs['body_height'][..., 0] * obs['world_zaxis'][..., 1])"
    assert check_task(user(text), Humanoid)


def settings(task, **more):
    return SimpleNamespace(**dict(task=task, eval_episodes=3, falling=False) | more)


def test_every_task_is_played_as_often_and_only_those_of_falling_may_fall():
    tasks = make_tasks(settings("all"), Humanoid)
    assert tasks.names == tuple(Humanoid.tasks) and tasks.functions == tuple(Humanoid.tasks.values())
    np.testing.assert_array_equal(tasks.which, np.repeat(np.arange(7), 3))
    assert {tasks.names[i] for i in tasks.which[may_fall(tasks)]} == {"rotate"} and may_fall(tasks).sum() == 3
    one = make_tasks(settings("rotate"), Humanoid)
    assert (one.names, one.falling, one.which.tolist()) == (("rotate",), (True,), [0, 0, 0])
    assert one.functions == (Humanoid.tasks["rotate"],)


@pytest.mark.parametrize("falling", [False, True])
def test_in_a_users_task_falling_is_as_they_say(user, falling):
    tasks = make_tasks(settings(user("def mine(obs): return obs['gyro'][..., 0]"), falling=falling), Humanoid)
    assert (tasks.names, tasks.falling, tasks.which.tolist()) == (("mine",), (falling,), [0, 0, 0])
    assert tasks.functions[0]({"gyro": np.float32([[4.0]])}).tolist() == [4]


@pytest.mark.parametrize(("formula", "fits"), [("1 / (height + 0.5)", True), ("jnp.log(height)", False)])
def test_a_users_task_must_be_finite_on_demonstrations_as_they_are(user, formula, fits):
    """A height of half a standard deviation, which is 2, below the mean of 1 is 0."""
    steps, at = np.zeros((2, 3, 68), np.float32), 36
    assert [*Humanoid.parts][3] == "body_height" and sum([*Humanoid.parts.values()][:3]) == at
    steps[1, 2, at] = -0.5
    data = SimpleNamespace(held_steps=steps, mean=np.ones(68, np.float32), std=np.full(68, 2, np.float32), num_obs=56)
    config = settings(user(f"import jax.numpy as jnp\ndef mine(obs):\n height = obs['body_height'][..., 0]\n return {formula}"))
    if fits:
        assert make_tasks(config, Humanoid, data).names == ("mine",)
    else:
        with pytest.raises(UsageError, match="^--task .*: is not finite for some of the demonstrations$"):
            make_tasks(config, Humanoid, data)


def test_each_is_rewarded_by_its_own_task():
    obs = jnp.arange(24.0).reshape(3, 4, 2)
    found = rewards(World(), tasks_of(0, 1, 0), obs)
    np.testing.assert_array_equal(found, [obs[0, :, 0], obs[1, :, 1] ** 2, obs[2, :, 0]])


# --- episodes


def scripted(actions):
    """A planner that gives actions (R, M, every, A), one round after the other; and more of each plan, which is not to be done."""
    more = jnp.concatenate([actions, jnp.full_like(actions, 0.9)], axis=2)
    return lambda key, memory, world, obs: (more[memory], memory + 1)


@pytest.fixture(scope="module")
def played():
    """Three points, three rounds of two steps. One falls in the fourth step; one, whose task allows it, in the third."""
    moves = np.float32([[0.4, 0.4, 0.8, 1.0, -1.0, -1.0], [1, 1, 1, -1, -1, -1], [0.1, 0.2, 0.3, 0.4, 0.5, -0.1]])
    actions = np.stack([moves, np.arange(18).reshape(3, 6) / 10], -1).astype(np.float32)  # (M, T, 2)
    rounds = jnp.asarray(actions.reshape(3, 3, 2, 2).swapaxes(0, 1))
    run = lambda: play(jax.random.key(0), World(), tasks_of(0, 1, 0), scripted(rounds), jnp.int32(0), points(0, 0, -0.3), 6, 2)
    return actions, jax.jit(run)()


def test_returns_end_with_a_fall_where_it_is_not_allowed(played):
    """Point by point in a loop: what comes after a fall, the fall included, adds nothing."""
    actions, outcome = played
    expected = [by_hand(start, x, task) for start, x, task in zip((0, 0, -0.3), actions, (0, 1, 0), strict=True)]
    np.testing.assert_allclose(outcome.total, [total for total, _ in expected], rtol=1e-5)
    assert outcome.length.tolist() == [length for _, length in expected] == [3, 6, 6]


def test_what_fell_is_shown_as_it_was(played):
    """The world before each plan; after a fall the first plan that begins with it, again and again."""
    _, outcome = played
    np.testing.assert_array_equal(outcome.worlds.time, [[0, 0, 0], [2, 2, 2], [2, 4, 4]])
    np.testing.assert_allclose(outcome.worlds.pos[:, 0, 0], [0, 0.4, 0.4], rtol=1e-6)
    assert outcome.worlds.act.shape == (3, 2, 3)


def test_plans_are_made_from_the_world_as_it_is():
    """And with the memory of the last."""
    seen = lambda key, memory, world, obs: (jnp.stack([0.5 - obs[:, 0], memory], -1)[:, None], memory + world.pos[0])
    outcome = play(jax.random.key(0), World(), tasks_of(1, 1), seen, jnp.zeros(2), points(0.1, 0.3), 3, 1)
    place, memory, total = np.array([0.1, 0.3]), np.zeros(2), 0
    for _ in range(3):
        total, memory, place = total + memory**2, memory + place, place + (0.5 - place) / 2
    np.testing.assert_allclose(outcome.total, total, rtol=1e-5)


def test_plans_are_followed_whatever_comes():
    moves = np.float32([[0.6, 0.9], [0.9, 0.9], [-0.9, -0.2], [0.1, 0.0]])
    obs, alive = follow_plan(World(), points(0, 0.8), jnp.stack([moves, moves * 2], -1))
    np.testing.assert_allclose(obs[..., 0], np.cumsum(moves / 2, 0) + [0, 0.8], rtol=1e-5)
    np.testing.assert_array_equal(obs[..., 1], moves * 2)
    assert alive.tolist() == [[True, False], [True, False], [True, False], [True, False]]


def test_evaluations_begin_in_worlds_of_the_data_and_not_all_in_one():
    worlds = points(*range(5))
    world = begin_worlds(jax.random.key(0), World(), jax.tree.map(np.asarray, worlds), 400)
    assert set(np.unique(world.pos)) == set(range(5)) and world.time.shape == (400,)
    assert abs(float(world.vel.std()) / START_NOISE - 1) < 0.15 and (np.ptp(world.spin, 0) == 0).all()
    assert abs(float(world.spin[0].std()) / START_NOISE - 1) < 0.15
    assert abs(np.corrcoef(world.vel[0], world.spin[0])[0, 1]) < 0.2


def test_without_worlds_of_the_data_evaluations_begin_where_the_world_does():
    world = begin_worlds(jax.random.key(0), World(), None, 4)
    assert world.vel.tolist() == [[3] * 4] and world.time.tolist() == [0] * 4


def test_films_show_the_first_episode_of_each_task():
    """Three tasks of two episodes in two columns: frames of a pixel's border, and the last place empty."""
    tasks = Tasks(("a", "b", "c"), (None,) * 3, (False,) * 3, np.repeat(np.arange(3), 2))
    worlds = jax.tree.map(lambda x: jnp.stack([x, x]), points(1, 9, 2, 9, 3, 9))
    worlds = worlds._replace(pos=worlds.pos.at[1].add(5))
    shade = np.asarray(film(World(), tasks, worlds, 2)["tasks"])[..., 0]
    expected = np.zeros((2, 2, 4, 2, 5))
    expected[:, 0, 1:3, 0, 1:4], expected[:, 0, 1:3, 1, 1:4], expected[:, 1, 1:3, 0, 1:4] = 110, 120, 130
    expected[1] += 50 * (expected[1] > 0)
    np.testing.assert_array_equal(shade, expected.reshape(2, 8, 10))


def test_what_cannot_be_drawn_is_not_filmed():
    assert film(SimpleNamespace(can_draw=False), None, None, 2) == {}


# --- planners with the true dynamics

SAMPLES, HORIZON, EVERY, SIGMA = 6, 9, 2, 0.5


def test_noise_is_drawn_now_and_then_and_straight_between():
    noise = np.asarray(shaped_noise(jax.random.key(0), (11, 200, 3)))
    bend = np.abs(np.diff(noise, 2, axis=0)).max((1, 2))  # of steps 1 to 9
    assert [t for t in range(1, 10) if bend[t - 1] > 1e-4] == [KNOTS, 2 * KNOTS]
    np.testing.assert_allclose(noise[::KNOTS].std((1, 2)), 1, atol=0.1)
    assert abs(np.corrcoef(noise[0].ravel(), noise[KNOTS].ravel())[0, 1]) < 0.15


@pytest.fixture(scope="module", params=[True, False], ids=["predictive_sampling", "mppi"])
def planned(request):
    """One round of a planner for two points, one of each task, that begins with a plan at random."""
    tasks, world = tasks_of(0, 1), points(0.2, 0.1)
    planner, first = true_dynamics(World(), tasks, SAMPLES, HORIZON, EVERY, SIGMA, request.param)
    plan = jax.random.uniform(jax.random.key(1), (2, HORIZON, 2), jnp.float32, -0.4, 0.4)
    new, memory = jax.jit(planner)(jax.random.key(2), plan, world, None)
    noise = SIGMA * np.array(shaped_noise(jax.random.key(2), (HORIZON, 2, SAMPLES, 2)))
    noise[:, :, 0] = 0
    copies = np.clip(np.asarray(plan)[:, None] + noise.transpose(1, 2, 0, 3), -1, 1)  # (M, N, H, A)
    totals = [[by_hand((0.2, 0.1)[i], copy, i)[0] for copy in copies[i]] for i in (0, 1)]
    return SimpleNamespace(
        best=request.param, copies=copies, totals=np.array(totals), new=np.asarray(new), memory=memory, first=first
    )


def test_plans_are_the_best_copy_or_the_weighted_mean(planned):
    """Of the returns that a simulation by hand gives; a fall ends what is counted where it is not allowed."""
    totals = planned.totals
    if planned.best:
        weight = np.eye(SAMPLES)[totals.argmax(1)]
        assert (totals.argmax(1) > 0).all(), "noise brought nothing"
    else:
        weight = np.exp((totals - totals.max(1, keepdims=True)) / (0.1 * totals.std(1, keepdims=True)))
        weight /= weight.sum(1, keepdims=True)
        assert (weight.max(1) < 0.999).any(), "no mean"
    np.testing.assert_allclose(planned.new, np.einsum("mn,mnha->mha", weight, planned.copies), atol=1e-4)
    np.testing.assert_array_equal(planned.memory[:, :-EVERY], planned.new[:, EVERY:])
    np.testing.assert_array_equal(planned.memory[:, -EVERY:], planned.new[:, -1:].repeat(EVERY, 1))


def test_without_better_noise_predictive_sampling_keeps_its_plan():
    """The first copy has none: a plan that cannot be bettered stays as it is."""
    tasks, world = tasks_of(1, 1), points(0, 0)
    planner, _ = true_dynamics(World(), tasks, SAMPLES, HORIZON, EVERY, SIGMA, True)
    plan = jnp.stack([jnp.zeros((2, HORIZON)), jnp.ones((2, HORIZON))], -1)
    np.testing.assert_array_equal(planner(jax.random.key(0), plan, world, None)[0], plan)


def test_plans_begin_with_the_pose_that_is_held(planned):
    world = points(0, 0)._replace(act=jnp.float32([[0.1, 0.2], [0.3, 0.4]]))
    np.testing.assert_allclose(planned.first(world), np.tile(np.float32([[[0.1, 0.3]], [[0.2, 0.4]]]), (1, HORIZON, 1)))


@pytest.mark.parametrize("every", [1, 3])
def test_planners_run_in_closed_loop(every):
    """Predictive sampling goes as far as it can without falling, from plan to plan."""
    tasks = tasks_of(0, 0)
    planner, first = true_dynamics(World(), tasks, 16, 6, every, 0.3, True)
    world = points(0, -0.4)
    run = jax.jit(lambda key: play(key, World(), tasks, planner, first(world), world, 18, every))
    outcome = run(jax.random.key(0))
    assert (outcome.length == 18).all() and (np.asarray(outcome.total) > 18 * 0.5).all()
