"""GAE, the PPO loss and its minibatches against NumPy; then learning on probe environments whose answer is known."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common.nn import dense, init_dense, init_lstm, lstm
from common.ppo import Batch, Transition, gae, minibatches, play_episodes, ppo_loss, ppo_update, rollout

run_gae = jax.jit(gae)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("gamma, gae_lambda", [(0.9, 0.8), (0.99, 1.0), (0.95, 0.0)])
def test_gae_equals_loop(seed, gamma, gae_lambda):
    rng = np.random.default_rng(seed)
    reward, value = rng.normal(size=(2, 13, 4)).astype(np.float32)
    done, last_value = rng.random((13, 4)) < 0.25, rng.normal(size=4).astype(np.float32)
    adv, target = run_gae(reward, value, done, last_value, gamma, gae_lambda)
    for n in range(4):
        running, following = 0.0, float(last_value[n])
        for t in reversed(range(13)):
            if done[t, n]:
                running, following = 0.0, 0.0
            running = reward[t, n] + gamma * following - value[t, n] + gamma * gae_lambda * running
            following = float(value[t, n])
            np.testing.assert_allclose(adv[t, n], running, atol=1e-5)
            np.testing.assert_allclose(target[t, n], running + value[t, n], atol=1e-5)


def test_gae_is_the_discounted_return_at_lambda_1():
    reward = np.float32([[1], [2], [3], [4]])
    done = np.array([[False], [True], [False], [False]])
    _, target = run_gae(reward, np.full((4, 1), 7, np.float32), done, np.float32([10]), 0.5, 1.0)
    np.testing.assert_allclose(target[:, 0], [1 + 0.5 * 2, 2, 3 + 0.5 * (4 + 0.5 * 10), 4 + 0.5 * 10], rtol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_ppo_loss_equals_numpy(seed):
    rng = np.random.default_rng(seed)
    shape, clip_eps, vf_coef, ent_coef = (6, 5), 0.2, 0.7, 0.03
    logits = rng.normal(size=(*shape, 3))
    value, old_value, target, adv = rng.normal(size=(4, *shape)) * 0.5
    action, old_log_prob = rng.integers(0, 3, shape), rng.normal(size=shape) * 0.3 - 1.1

    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    total = dict.fromkeys(("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction"), 0.0)
    normal = (adv - adv.mean()) / (adv.std() + 1e-5)
    for i in np.ndindex(shape):
        ratio = probs[i][action[i]] / np.exp(old_log_prob[i])
        total["policy_loss"] -= min(ratio * normal[i], min(max(ratio, 1 - clip_eps), 1 + clip_eps) * normal[i])
        near = old_value[i] + min(max(value[i] - old_value[i], -clip_eps), clip_eps)
        total["value_loss"] += 0.5 * max((value[i] - target[i]) ** 2, (near - target[i]) ** 2)
        total["entropy"] -= (probs[i] * np.log(probs[i])).sum()
        total["approx_kl"] += ratio - 1 - np.log(ratio)
        total["clip_fraction"] += abs(ratio - 1) > clip_eps
    expected = {name: x / 30 for name, x in total.items()}
    expected["loss"] = expected["policy_loss"] + vf_coef * expected["value_loss"] - ent_coef * expected["entropy"]

    none = np.zeros(shape)
    traj = Transition(none, none, action, old_log_prob, old_value, none, none)
    batch = jax.tree.map(lambda x: jnp.asarray(x, jnp.int32 if x.dtype == int else jnp.float32), Batch(traj, adv, target, ()))
    loss, info = jax.jit(ppo_loss, static_argnums=(3, 4, 5))(
        jnp.float32(logits), jnp.float32(value), batch, clip_eps, vf_coef, ent_coef
    )
    assert set(info) == set(expected) and 0 < expected["clip_fraction"] < 1
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-4, atol=1e-5)
    for name in expected:
        np.testing.assert_allclose(info[name], expected[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("num_minibatches", [1, 2, 6])
def test_minibatches(num_minibatches):
    steps, num = 4, 6
    column = 100 * np.arange(num) + np.arange(steps)[:, None]  # (T, N): says which environment and step it is
    traj = Transition({"a": column, "b": np.stack([column, -column], -1)}, *[column + i for i in range(6)])
    batch = Batch(traj, column + 6, column + 7, (100 * np.arange(num), np.stack([100 * np.arange(num)] * 2, -1)))
    orders = set()
    for seed in range(4):
        groups = jax.tree.map(np.array, minibatches(jax.random.key(seed), batch, num_minibatches))
        env = groups.hstate[0] // 100  # (num_minibatches, N / num_minibatches)
        assert env.shape == (num_minibatches, num // num_minibatches)
        assert sorted(env.ravel()) == list(range(num))
        orders.add(tuple(env.ravel()))
        for group in range(num_minibatches):
            expected = jax.tree.map(lambda x, e=env[group]: x[:, e], batch[:3])
            jax.tree.map(lambda x, y, g=group: np.testing.assert_array_equal(x[g], y), groups[:3], expected)
            np.testing.assert_array_equal(groups.hstate[1][group], batch.hstate[1][env[group]])
    assert len(orders) > 1


# --- probe environments: N worlds of a hidden number x and a clock t; a new x and a new length are drawn when an episode ends


class World(NamedTuple):
    x: jax.Array  # (N,) float32: -1 or 1
    t: jax.Array  # (N,) int32
    length: jax.Array  # (N,) int32


class Probe(NamedTuple):
    see: Callable  # (x, t) -> obs
    reward: Callable  # (x, t, action) -> reward
    lengths: tuple[int, int] = (1, 1)  # the shortest and the longest episode


def any_of(probes: list[Probe], which) -> Probe:
    """The probe of a traced index, so that several train side by side in one program."""
    choose = lambda values: jnp.stack(values)[which]
    return Probe(
        lambda x, t: choose([p.see(x, t) for p in probes]),
        lambda x, t, action: choose([p.reward(x, t, action) for p in probes]),
        jnp.array([p.lengths for p in probes])[which],
    )


def draw_world(key, probe, num):
    key_x, key_length = jax.random.split(key)
    x = jax.random.rademacher(key_x, (num,), jnp.float32)
    return World(x, jnp.zeros(num, jnp.int32), jax.random.randint(key_length, (num,), probe.lengths[0], probe.lengths[1] + 1))


def make_world(key, probe: Probe, num: int):
    """-> reset, step for `rollout`."""

    def reset():
        world = draw_world(key, probe, num)
        return probe.see(world.x, world.t)[:, None], world

    def step(key, world, action):
        reward, done = probe.reward(world.x, world.t, action), world.t + 1 == world.length
        fresh = draw_world(key, probe, num)
        world = jax.tree.map(lambda new, old: jnp.where(done, new, old), fresh, world._replace(t=world.t + 1))
        return probe.see(world.x, world.t)[:, None], world, reward, done

    return reset, step


def init_policy(key, body):
    """A body of 16 features, and two heads."""
    key_policy, key_value = jax.random.split(key)
    return {"body": body, "policy": init_dense(key_policy, 16, 2, 0.01), "value": init_dense(key_value, 16, 1, 1.0)}


def heads(params, x):
    return dense(params["policy"], x), dense(params["value"], x)[..., 0]


def mlp_policy(params, obs, reset, hstate):
    return *heads(params, jnp.tanh(dense(params["body"], obs))), hstate


def lstm_policy(params, obs, reset, hstate):
    x, hstate = lstm(params["body"], obs, reset, hstate)
    return *heads(params, x), hstate


GAMMA = 0.8
PPO = SimpleNamespace(num_epochs=4, num_minibatches=2, clip_eps=0.2, vf_coef=0.5, ent_coef=0.0)


def train(probes: list[Probe], policy, init_body, hstate=(), num=32, steps=8, updates=150):
    """Trains every probe, all in one jit -> the last params and a rollout with them (Transition), a leading axis of probes."""
    tx = optax.adam(optax.linear_schedule(1e-2, 0.0, updates * PPO.num_epochs * PPO.num_minibatches))

    def play(key, params, which):
        key_world, key_play = jax.random.split(key)
        reset, step = make_world(key_world, any_of(probes, which), num)
        return rollout(key_play, policy, params, reset, step, hstate, steps)[:2]

    def run(key, which):
        def update(carry, key):
            key_play, key_learn = jax.random.split(key)
            traj, last_value = play(key_play, carry[0], which)
            batch = Batch(traj, *gae(traj.reward, traj.value, traj.done, last_value, GAMMA, 0.95), hstate)
            params, opt_state, info = ppo_update(key_learn, policy, tx, *carry, batch, PPO)
            return (params, opt_state), info["loss"]

        key_params, key_train, key_last = jax.random.split(key, 3)
        params = init_policy(key_params, init_body(key_params))
        (params, _), losses = jax.lax.scan(update, (params, tx.init(params)), jax.random.split(key_train, updates))
        return params, play(key_last, params, which)[0], losses

    params, traj, losses = jax.jit(jax.vmap(run, (None, 0)))(jax.random.key(0), jnp.arange(len(probes)))
    assert np.isfinite(losses).all()
    return params, traj


PROBES = {
    "constant": Probe(see=lambda x, t: 0 * x, reward=lambda x, t, action: 0 * x + 1),
    "observed": Probe(see=lambda x, t: x, reward=lambda x, t, action: x),
    "delayed": Probe(see=lambda x, t: 1.0 * t, reward=lambda x, t, action: 1.0 * (t == 1), lengths=(2, 2)),
    "action": Probe(see=lambda x, t: 0 * x, reward=lambda x, t, action: 2.0 * action - 1),
    "action and observation": Probe(see=lambda x, t: x, reward=lambda x, t, action: x * (2 * action - 1)),
}


@pytest.fixture(scope="module")
def learned():
    """The value and the probability of action 1 at the observations -1, 0, 1, for every probe."""
    params, _ = train(list(PROBES.values()), mlp_policy, lambda key: init_dense(key, 1, 16))
    look = lambda params: mlp_policy(params, jnp.float32([[-1], [0], [1]]), None, ())
    logits, value, _ = jax.jit(jax.vmap(look))(params)
    return dict(zip(PROBES, zip(np.array(value), np.array(jax.nn.softmax(logits))[..., 1], strict=True), strict=True))


def test_probe_constant_reward(learned):
    value, _ = learned["constant"]
    assert abs(value[1] - 1) < 0.1


def test_probe_reward_is_the_observation(learned):
    value, _ = learned["observed"]
    np.testing.assert_allclose(value[[0, 2]], [-1, 1], atol=0.1)


def test_probe_delayed_reward_is_discounted(learned):
    value, _ = learned["delayed"]
    np.testing.assert_allclose(value[1:], [GAMMA, 1], atol=0.1)


def test_probe_action(learned):
    value, prob = learned["action"]
    assert prob[1] > 0.9 and abs(value[1] - 1) < 0.1


def test_probe_action_and_observation(learned):
    value, prob = learned["action and observation"]
    assert prob[0] < 0.1 and prob[2] > 0.9
    np.testing.assert_allclose(value[[0, 2]], [1, 1], atol=0.1)


# A pulse may be seen at an episode's first step, and nothing after; every action must say whether there was one. Only `reset` tells
# when an episode of unknown length begins, so an agent whose memory outlives its episode cannot answer.
PULSE = Probe(
    see=lambda x, t: jnp.where((t == 0) & (x > 0), 1.0, 0.0),
    reward=lambda x, t, action: x * (2 * action - 1),
    lengths=(3, 4),
)


def test_probe_memory():
    hstate = (jnp.zeros((32, 16)), jnp.zeros((32, 16)))
    params, traj = train([PULSE], lstm_policy, lambda key: init_lstm(key, 1, 16), hstate, steps=16)
    params, traj = jax.tree.map(lambda x: x[0], (params, traj))
    success, remembered = np.array(traj.reward) == 1, ~np.array(traj.reset)
    assert remembered.mean() > 0.6 and success[remembered].mean() > 0.9 and success[~remembered].mean() > 0.9
    # resets mark the first step and what follows a `done`
    assert np.all(traj.reset[0])
    np.testing.assert_array_equal(traj.reset[1:], traj.done[:-1])
    # what the learner computes from the stored steps is what the player did
    logits, value, _ = jax.jit(lstm_policy)(params, traj.obs, traj.reset, hstate)
    log_prob = np.take_along_axis(np.array(jax.nn.log_softmax(logits)), np.array(traj.action)[..., None], -1)[..., 0]
    np.testing.assert_allclose(log_prob, traj.log_prob, atol=1e-4)
    np.testing.assert_allclose(value, traj.value, atol=1e-4)


def test_rollout_carries_on_from_the_hidden_state_given():
    """A policy that adds up its observations in `hstate` shows what it was given and when it was reset."""

    def policy(params, obs, reset, hstate):
        assert reset.shape == (1, 3)
        hstate = jnp.where(reset[0], hstate * 100, hstate) + obs[0]
        return jnp.zeros((1, 3, 2)), hstate[None], hstate

    def step(key, t, action):
        return t + 1.0, t + 1, t.astype(jnp.float32), jnp.array([False, False, True]) & (t == 1)

    reset = lambda: (jnp.zeros(3), jnp.zeros(3, jnp.int32))
    traj, last, _ = jax.jit(lambda h: rollout(jax.random.key(0), policy, (), reset, step, h, 3))(jnp.float32([1, 2, 3]))
    np.testing.assert_array_equal(traj.obs, [[0, 0, 0], [1, 1, 1], [2, 2, 2]])
    np.testing.assert_array_equal(traj.reward, [[0, 0, 0], [1, 1, 1], [2, 2, 2]])
    np.testing.assert_array_equal(traj.value, [[100, 200, 300], [101, 201, 301], [103, 203, 30102]])
    np.testing.assert_array_equal(last, [106, 206, 30105])
    np.testing.assert_allclose(traj.log_prob, np.log(0.5), rtol=1e-6)


# --- whole episodes


def play_counting(lengths, max_steps, record=lambda state: ()):
    """Environment n pays n + 1 a step and ends after lengths[n] steps; a step after that would pay 1000."""
    lengths = jnp.asarray(lengths)
    num = len(lengths)

    def policy(params, obs, reset, hstate):
        logits = jnp.where(jnp.arange(2) == obs[..., None].astype(int) % 2, 0.0, -jnp.inf)  # the clock's parity
        return logits, jnp.zeros(obs.shape), hstate + jnp.where(reset[0], 10, 1)

    def step(key, state, action):
        t, right = state
        reward = jnp.where(t < lengths, jnp.arange(num) + 1.0, 1000.0)
        t = t + 1
        return t, (t, right & (action == (t - 1) % 2)), reward, t % lengths == 0

    reset = lambda: (jnp.zeros(num, jnp.int32), (jnp.zeros(num, jnp.int32), jnp.ones(num, bool)))
    return jax.jit(lambda key: play_episodes(key, policy, (), reset, step, jnp.zeros(num, jnp.int32), max_steps, record))(
        jax.random.key(0)
    )


def test_play_episodes_counts_one_episode_each():
    episodes = play_counting([1, 3, 5, 2], 8, record=lambda state: {"t": state[0], "right": state[1]})
    np.testing.assert_array_equal(episodes.length, [1, 3, 5, 2])
    np.testing.assert_array_equal(episodes.total_reward, [1, 6, 15, 8])
    np.testing.assert_array_equal(
        episodes.record["t"], np.minimum(np.arange(8)[:, None] + 1, [1, 3, 5, 2])
    )  # all stay at their ends
    assert np.all(episodes.record["right"])  # the policy acts on what the last step showed


def test_play_episodes_stops_at_max_steps():
    episodes = play_counting([1, 3, 5, 2], 4)
    np.testing.assert_array_equal(episodes.length, [1, 3, 4, 2])
    np.testing.assert_array_equal(episodes.total_reward, [1, 6, 12, 8])


def test_play_episodes_resets_memory_once():
    """The hidden state sees one reset, at the first step; the actions are sampled, not the likeliest."""
    num = 500

    def policy(params, obs, reset, hstate):
        hstate = jnp.where(reset[0], 0.0, hstate) + 1
        return jnp.log(jnp.broadcast_to(jnp.array([0.25, 0.75]), (1, num, 2))), jnp.zeros((1, num)), hstate

    def step(key, state, action):
        return state, state + 1, action.astype(jnp.float32), jnp.full(num, False)

    reset = lambda: (jnp.zeros(num), jnp.zeros(num))
    play = lambda key: play_episodes(key, policy, (), reset, step, jnp.full(num, 50.0), 6)
    episodes = jax.jit(play)(jax.random.key(1))
    assert (episodes.length == 6).all()
    assert abs(episodes.total_reward.mean() / 6 - 0.75) < 5 * np.sqrt(0.25 * 0.75 / 6 / num)
