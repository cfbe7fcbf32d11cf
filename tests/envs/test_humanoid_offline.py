"""What H-GAP is compared with learns from the steps that there are, by the losses of TD3+BC."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.runs.config import UsageError
from envs.humanoid import PARTS, TASKS, Humanoid, split
from envs.humanoid_control import make_tasks
from envs.humanoid_data import Data
from envs.humanoid_offline import (
    GAMMA,
    TAU,
    Steps,
    actor_loss,
    critic_loss,
    goals,
    init_mlp,
    label,
    limits_of,
    make_bc,
    make_buffer,
    make_offline,
)
from envs.humanoid_skills import window_starts

OBS, ACTIONS = sum(PARTS.values()), 12
FALLING_TWICE, CUT, SHORT = [3, 2, 1, 4, 3, 2, 1, 1], [8, 7, 6, 5, 4, 3, 2, 1], [4, 3, 2, 1, 0, 0, 0, 0]
LIMITS = np.float32([[-3, -1], [0.5, 2]])  # of two actions
LEFT = np.int32([FALLING_TWICE, CUT, SHORT])  # three demonstrators' steps of an episode from each on


@pytest.fixture
def config():
    return SimpleNamespace(
        mlp_hidden=8, bc_batch=16, bc_lr=1e-3, offline_batch=16, offline_lr=1e-2, offline_alpha=2.5, window=2, eval_steps=2,
        num_updates=4, eval_episodes=2, plan_every=1, task="all", dry_run=False,
    )  # fmt: skip


@pytest.fixture
def tasks(config):
    return make_tasks(config, Humanoid)


@pytest.fixture
def data():
    """Noise, but for the first two numbers of an observation: the demonstrator, and the step."""
    rng, (num, steps) = np.random.default_rng(0), LEFT.shape
    x = rng.normal(size=(num, steps, OBS + ACTIONS)).astype(np.float32)
    x[..., 0], x[..., 1] = np.arange(num)[:, None], np.arange(steps)
    mean, std = (draw.astype(np.float32) for draw in (rng.normal(size=OBS + ACTIONS), rng.uniform(0.5, 2, OBS + ACTIONS)))
    starts = window_starts(LEFT, 2)
    fell = LEFT == 1  # all episodes but those that the recording cut
    fell[:, -1] = False
    parts = dict(steps=x, left=LEFT, fell=fell, starts=starts, held_steps=x, held_left=LEFT, held_starts=starts)
    return Data(**parts, mean=mean, std=std, worlds=None, task_means={}, num_obs=OBS)


# --- TD3+BC, by hand


def by_hand(layers, x):
    for layer in layers[:-1]:
        x = np.maximum(x @ layer["w"] + layer["b"], 0)
    return x @ layers[-1]["w"] + layers[-1]["b"]


@pytest.fixture
def tiny():
    """Parameters of an actor and two critics, their targets, a batch of 5 steps of one task, noise."""
    keys, rng = jax.random.split(jax.random.key(0), 6), np.random.default_rng(1)
    nets = [init_mlp(key, (3, 4, 4, 2), 1.0) for key in keys[:2]] + [init_mlp(key, (5, 4, 4, 1), 1.0) for key in keys[2:]]
    two = lambda a, b: jax.tree.map(lambda *x: jnp.stack(x), a, b)
    params, target = ({"actor": nets[i], "critic": two(*nets[2 + 2 * i : 4 + 2 * i])} for i in (0, 1))
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    flags = [np.array(x, bool) for x in ([1, 1, 1, 1, 0], [0, 1, 0, 0, 0], [1, 1, 0, 1, 0])]
    steps = Steps(normal(5, 3), np.tanh(normal(5, 2)), normal(5, 3), flags[0], normal(5), *flags[1:])
    return jax.device_get((params, target)) + (steps, np.clip(0.2 * normal(5, 2), -0.1, 0.1))


def action_by_hand(layers, obs):
    return LIMITS.mean(0) + (LIMITS[1] - LIMITS[0]) / 2 * np.tanh(by_hand(layers, obs))


def values(critic, obs, action):
    """Both critics', (2, B)."""
    x = np.concatenate([obs, action], -1)
    return np.stack([by_hand(jax.tree.map(lambda leaf, i=i: leaf[i], critic), x)[:, 0] for i in (0, 1)])


def test_critics_learn_the_lesser_of_two_values_and_nothing_of_what_is_unknown(tiny):
    params, target, steps, noise = tiny
    action = np.clip(action_by_hand(target["actor"], steps.after) + noise, *LIMITS)
    expected = steps.reward + GAMMA * ~steps.over * values(target["critic"], steps.after, action).min(0)
    np.testing.assert_allclose(goals(target, steps, noise, LIMITS), expected, rtol=1e-5, atol=1e-6)
    errors = (values(params["critic"], steps.obs, steps.action) - expected) ** 2
    loss, grads = jax.value_and_grad(critic_loss)(params["critic"], target, steps, noise, LIMITS)
    np.testing.assert_allclose(loss, errors[:, steps.known].mean(1).sum(), rtol=1e-5)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(grads))
    none = steps._replace(known=np.zeros(5, bool))
    assert not float(critic_loss(params["critic"], target, none, noise, LIMITS))


def test_the_actor_weighs_value_against_cloning_by_the_size_of_values(tiny):
    params, _, steps, _ = tiny
    action = action_by_hand(params["actor"], steps.obs)[steps.there]
    q = values(params["critic"], steps.obs[steps.there], action)[0]
    expected = -2.5 / np.abs(q).mean() * q.mean() + ((action - steps.action[steps.there]) ** 2).mean()
    loss, metrics = actor_loss(params["actor"], params["critic"], steps, LIMITS, 2.5)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["q"], q.mean(), rtol=1e-5)
    grow = jax.tree.map(lambda x: x, params["critic"])
    grow[-1] = {name: 10 * x for name, x in grow[-1].items()}  # ten times the value: the same loss
    np.testing.assert_allclose(actor_loss(params["actor"], grow, steps, LIMITS, 2.5)[0], expected, rtol=1e-4)


# --- steps


def test_limits_are_the_ends_of_actions_ranges(data):
    np.testing.assert_allclose(limits_of(data) * data.std[OBS:] + data.mean[OBS:], [[-1] * ACTIONS, [1] * ACTIONS], rtol=1e-5)


def test_no_step_is_followed_by_another_episodes_and_falls_end_those_that_must_not(config, data, tasks):
    """Rewards are the tasks' of what is observed after a step, as it is; of a fall there is none."""
    buffer, filled = make_buffer(config, data)
    draw = lambda key: buffer.sample(jax.tree.map(jnp.asarray, filled), key).experience
    pair = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.vmap(draw)(jax.random.split(jax.random.key(0), 20)))
    steps = jax.device_get(label(Humanoid, tasks, data, pair))
    lane, at = steps.obs[:, 0].astype(int), steps.obs[:, 1].astype(int)
    assert set(zip(lane, at, strict=True)) == {(i, t) for i in range(3) for t in range(7)}
    left, may, fell = LEFT[lane, at], np.array(tasks.falling), data.fell[lane, at]
    np.testing.assert_array_equal(steps.there, left > 0)
    np.testing.assert_array_equal(steps.known[may], [left > 1] * may.sum())
    np.testing.assert_array_equal(steps.known[~may], [(left > 1) | fell] * (~may).sum())
    np.testing.assert_array_equal(steps.over, fell & ~may[:, None])
    np.testing.assert_array_equal(steps.obs, data.steps[lane, at, :OBS])
    np.testing.assert_array_equal(steps.after, data.steps[lane, at + 1, :OBS])
    np.testing.assert_array_equal(steps.action, data.steps[lane, at, OBS:])
    seen = split((data.steps[lane, at + 1] * data.std + data.mean)[:, :OBS])
    expected = np.stack([task(seen) for task in TASKS.values()]) * ~steps.over
    np.testing.assert_allclose(steps.reward, expected, rtol=1e-4, atol=1e-5)
    assert steps.over.any() and not steps.reward[steps.over].any()


# --- training


def test_specialists_learn_apart_and_their_actors_every_second_time(config, data):
    train = make_offline(config, data, Humanoid())
    start = jax.jit(train.init)(jax.random.key(0))
    assert all(len(x) == len(TASKS) for x in jax.tree.leaves(start.params))
    update = jax.jit(train.update)
    first, metrics = update(start, jnp.int32(2))
    second, rest = update(first, jnp.int32(3))
    moved = lambda a, b: any(bool((x != y).any()) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))
    assert moved(start.params["actor"], first.params["actor"]) and not moved(first.params["actor"], second.params["actor"])
    assert moved(first.params["critic"], second.params["critic"]) and not moved(first.target, second.target)
    jax.tree.map(
        lambda a, b, c: np.testing.assert_allclose(c, a + TAU * (b - a), atol=1e-6), start.target, first.params, first.target
    )
    assert np.isfinite(list(metrics.values())).all() and np.isnan(rest["q"])
    leaves = [x for x in jax.tree.leaves(second._replace(key=())) if x.dtype == jnp.float32]
    assert all(np.isfinite(x).all() for x in leaves)


@pytest.mark.parametrize(("make", "more"), [(make_bc, {"heldout_action_mse", "imitation_length"}), (make_offline, {"length"})])
def test_types_do_not_depend_on_x64_and_every_task_has_a_return(config, data, make, more):
    with jax.enable_x64():
        train = make(config, data, Humanoid())
        state = jax.eval_shape(train.init, jax.eval_shape(lambda: jax.random.key(0)))
        after, metrics = jax.eval_shape(train.update, state, jax.ShapeDtypeStruct((), jnp.int32))
        results = jax.eval_shape(train.evaluate, state)
    types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert types(after) == types(state)
    assert not {x.dtype for x in jax.tree.leaves((state, metrics, results))} & {np.dtype("int64"), np.dtype("float64")}
    assert results.keys() == more | {"tasks"} | {f"return_{name}" for name in TASKS}


def test_a_batch_beyond_all_that_there_is_is_refused(config, data):
    config.offline_batch = LEFT.size + 1
    with pytest.raises(UsageError, match="--offline-batch 25: must be at most 24"):
        make_buffer(config, data)


def test_cloning_descends(config, data):
    train = make_bc(config, data, Humanoid())
    state = train.init(jax.random.key(0))
    step = jax.jit(lambda state: jax.lax.scan(train.update, state, jnp.arange(200)))
    _, metrics = step(state)
    assert metrics["action_mse"][-20:].mean() < metrics["action_mse"][:20].mean()
