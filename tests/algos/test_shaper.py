"""Shaper's parts against numbers worked out by hand or plain references: layers, players, the learner's PPO, trials, evolution."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from algos import shaper
from algos.shaper import (
    CPU,
    Episode,
    Player,
    choose,
    cross_play,
    fixed_player,
    init_memory,
    learner_net,
    make_learner,
    make_policy,
    make_train,
    make_world,
    play_trial,
    policy_shapes,
    ppo_epochs,
    share_memory,
    spread,
    start_learner,
)
from common.runs.config import UsageError

SMALL = dataclasses.replace(
    CPU, num_updates=5, population_size=4, num_opponents=3, num_envs=2, num_episodes=4, num_steps=10, hidden=4, eval_learners=3
)
WORLDS = {
    "ipd": {},
    "coin_game": dict(learner="mlp", lr=0.01),
    "ipditm": dict(learner="gru", lr=0.01, learner_hidden=3),
}


def config_of(**changes):
    return dataclasses.replace(SMALL, **(WORLDS.get(changes.get("env"), {}) | changes))


def random_weights(config, seed=0):
    """One policy's weights, all of them random."""
    shapes, tree = jax.tree.flatten(policy_shapes(config), is_leaf=lambda x: isinstance(x, tuple))
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes])


# --- layers


def test_average_by_hand():
    h = jnp.float32([[[2.0, 0]], [[4.0, 8]]])  # two environments, one feature, two matches
    np.testing.assert_allclose(share_memory({}, h, "average", 1), [[[2.5, 2]], [[3.5, 6]]])
    np.testing.assert_array_equal(share_memory({}, h, "none", 1), h)


@pytest.mark.parametrize("averaging", ["average", "attention"])
def test_shared_memory_does_not_depend_on_the_order_of_environments(averaging):
    config = config_of(averaging=averaging)
    share = spread(random_weights(config)["share"], (1, 2))
    h = jnp.asarray(np.random.default_rng(2).normal(size=(5, 4, 2)), jnp.float32)
    order = np.array([3, 0, 4, 1, 2])
    mix = jax.jit(partial(share_memory, share, averaging=averaging, heads=2))
    np.testing.assert_allclose(mix(h[order]), mix(h)[order], rtol=1e-4, atol=1e-5)
    alone = mix(h[:1])
    assert np.abs(mix(h)[:1] - alone).max() > 1e-3, "others are not heard"
    changed = mix(h.at[:, :, 1].set(0.0))
    np.testing.assert_allclose(changed[..., 0], mix(h)[..., 0], rtol=1e-4, atol=1e-5)  # other matches are not


# --- players


def acted(config, weights, observations):
    """Logits (steps, E, A, M) over two episodes of the same observations."""
    policy, memory = make_policy(config), init_memory(config, config.num_envs, 3)

    @jax.jit
    def episode(weights, memory):
        def step(memory, obs):
            logits, _, memory = policy.act(weights, memory, obs)
            return memory, logits

        memory, logits = jax.lax.scan(step, memory, observations)
        return logits, policy.end(None, weights, memory, None, 0)[1]

    weights = spread(weights, (1, 3))
    first, memory = episode(weights, memory)
    return np.array(first), np.array(episode(weights, memory)[0])


@pytest.mark.parametrize("env", WORLDS)
@pytest.mark.parametrize("method", ["shaper", "mfos", "gs", "reset"])
def test_what_each_method_remembers(env, method):
    """Good Shepherd sees the present alone; within an episode the others remember; past its end only Shaper and M-FOS do."""
    config = config_of(env=env, method=method)
    features = make_world(config).num_features
    obs = np.float32(np.random.default_rng(4).uniform(size=(6, 2, features, 3)) < 0.3)
    first, second = acted(config, random_weights(config), np.concatenate([obs, obs[:1]]))
    assert np.abs(first).max() > 0
    same = np.allclose(first[0], first[-1], atol=1e-5)
    assert same == (method == "gs")
    assert np.allclose(first, second, atol=1e-5) == (method in ("gs", "reset"))


def test_mfos_passes_on_a_vector():
    """It is 1 in the first episode; later the sigmoid of a layer over the meta-agent's memory, which ends with the episode."""
    config = config_of(method="mfos")
    policy, weights = make_policy(config), spread(random_weights(config), (1, 3))
    memory = init_memory(config, 2, 3)
    np.testing.assert_array_equal(memory[2], 1)
    _, _, memory = policy.act(weights, memory, jnp.ones((2, 5, 3)))
    _, after = policy.end(None, weights, memory, None, 0)
    w, b, h = (np.array(x) for x in (weights["th"]["w"], weights["th"]["b"], memory[1]))
    np.testing.assert_allclose(after[2], 1 / (1 + np.exp(-(np.einsum("oim,eim->eom", w, h) + b))), rtol=1e-4)
    assert not after[0].any() and not after[1].any() and memory[0].any()


def test_fixed_strategies_by_hand():
    """Tit for tat repeats what the other did; greedy walks to the coin beside it."""
    obs = jnp.eye(5)[:, :, None]  # CC, CD, DC, DD, START as five environments
    picks = {name: np.array(choose(play(obs)))[:, 0].tolist() for name, play in shaper.MATRIX_STRATEGIES.items()}
    assert picks == {"tft": [0, 1, 0, 1, 0], "cooperate": [0] * 5, "defect": [1] * 5}
    for cell, action in {(1, 2): 0, (1, 0): 1, (2, 1): 2, (0, 1): 3}.items():
        maps = np.zeros((1, 3, 3, 4, 1), np.float32)
        maps[0, 1, 1, 0], maps[0, *cell, 3], maps[0, 1, 1, 2] = 1, 1, 1
        assert choose(shaper.greedy(jnp.asarray(maps.reshape(1, 36, 1))))[0, 0] == action
    assert choose(shaper.COIN_STRATEGIES["stay"](jnp.zeros((1, 36, 1))))[0, 0] == 4


# --- the learner


def test_ppo_step_of_a_table():
    """One epoch, one minibatch: every match as plain PPO on its own with optax's clipping by the global norm."""
    config = config_of(num_epochs=1, num_minibatches=1, lr=0.3)
    rng, rows, matches = np.random.default_rng(5), 20, 3
    obs = np.eye(5, dtype=np.float32)[rng.integers(0, 5, (rows, matches))].swapaxes(1, 2)
    action = rng.integers(0, 2, (rows, matches))
    table = rng.normal(size=(3, 5, matches)).astype(np.float32)
    old, value, adv, target = (rng.normal(size=(rows, matches)).astype(np.float32) for _ in range(4))
    old, adv = -np.abs(old), adv * np.float32([1, 10, 0.1])
    tx, params = optax.adam(config.lr, eps=1e-5), {"heads": jnp.asarray(table)}
    flat = Episode(obs, (), action, old, value, value), adv, target
    learn = jax.jit(lambda params, flat: ppo_epochs(jax.random.key(0), learner_net, tx, params, tx.init(params), flat, config)[0])
    ours = learn(params, jax.tree.map(jnp.asarray, flat))

    def loss(table, m):
        out = obs[..., m] @ table.T  # (rows, 3)
        log_probs = out[:, :2] - jax.scipy.special.logsumexp(out[:, :2], axis=1, keepdims=True)
        ratio = jnp.exp(log_probs[jnp.arange(rows), action[:, m]] - old[:, m])
        a = (adv[:, m] - adv[:, m].mean()) / (adv[:, m].std() + 1e-8)
        gain = jnp.minimum(ratio * a, jnp.clip(ratio, 0.8, 1.2) * a).mean()
        near = value[:, m] + jnp.clip(out[:, 2] - value[:, m], -0.2, 0.2)
        error = jnp.maximum((out[:, 2] - target[:, m]) ** 2, (near - target[:, m]) ** 2).mean()
        entropy = -(jnp.exp(log_probs) * log_probs).sum(1).mean()
        return -gain + 0.5 * error - 0.02 * entropy

    plain = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(config.lr, eps=1e-5))
    for m in range(matches):
        mine = jnp.asarray(table[..., m])
        updates, _ = plain.update(jax.jit(jax.grad(partial(loss, m=m)))(mine), plain.init(mine))
        np.testing.assert_allclose(ours["heads"][..., m], mine + updates, rtol=1e-3, atol=1e-4)


def watcher(learner) -> Player:
    """A learner that does not learn; its weights become whether its record fits the rules: what it saw, did and was paid."""

    def end(key, weights, memory, episode, k):
        params, _ = weights
        seen = episode.obs.argmax(2)  # (T, E, M)
        starts = (seen[0] == 4).all() & (seen[1:] != 4).all()
        mine, others = seen[1:] // 2, seen[1:] % 2
        payoff = jnp.array([-1.0, -3, 0, -2])
        did = (mine == episode.action[:-1]).all()
        paid = (episode.reward[:-1] == payoff[seen[1:]]).all()
        answers = (others[1:] == episode.action[:-2]).all()  # the other side plays tit for tat
        return (params, jnp.stack([starts, did, paid, answers])), memory

    act = lambda weights, memory, obs: learner.act((weights[0],), memory, obs)
    return Player(act, end, records="episode")


def test_record_of_an_episode():
    """Observation, action and reward of one step belong together (the authors' N-player code shifts them by one)."""
    config = config_of()
    world, sizes = make_world(config), (1, 3, 2)
    learner = make_learner(config, True)
    (params, *_), memory = start_learner(jax.random.key(0), config, *sizes)
    players = (fixed_player(shaper.MATRIX_STRATEGIES["tft"]), watcher(learner))
    weights = ((), (params, jnp.zeros(4, bool)))
    play = jax.jit(lambda weights, memory: play_trial(jax.random.key(1), world, players, weights, ((), memory), sizes, config)[1])
    _, (_, fits) = play(weights, memory)
    np.testing.assert_array_equal(fits, True)


def test_naive_learners_end_in_defection():
    """Two tabular learners in the prisoner's dilemma begin at random (-1.5 each) and most pairs end in mutual defection (-2)."""
    config = dataclasses.replace(CPU, num_episodes=20, eval_learners=32)
    reward = np.array(jax.jit(partial(shaper.naive_play, config=config))(jax.random.key(0)).reward)
    assert reward.shape == (20, 2, 1, 32)
    assert abs(reward[0].mean() + 1.5) < 0.05
    ends = reward[-3:].mean((0, 1, 2))
    assert np.median(ends) < -1.9 and ends.mean() < -1.7


# --- trials and evolution


@pytest.fixture(scope="module", params=list(WORLDS))
def trial(request):
    """A trial whose population is one policy three times and another once."""
    config = config_of(env=request.param, num_steps=20, num_minibatches=4)
    world, sizes = make_world(config), (4, 3, 2)
    same, other = random_weights(config), random_weights(config, 1)
    population = jax.tree.map(lambda x, y: jnp.stack([x, x, x, y]), same, other)
    weights, memory = shaper.to_matches(population, 3), init_memory(config, 2, 12)

    @jax.jit
    def play(seed, stop):
        learner, learner_memory = start_learner(jax.random.key(seed), config, *sizes, stop)
        players, memories = (make_policy(config), make_learner(config, world.bootstrap)), (memory, learner_memory)
        outcome, after, _ = play_trial(jax.random.key(seed), world, players, (weights, learner), memories, sizes, config, True)
        return outcome, learner[0], after[1][0]

    return config, play


def test_chance_is_common_to_the_population(trial):
    """Equal policies earn exactly the same; a learner of its own for each opponent; another policy earns something else."""
    config, play = trial
    outcome, _, _ = play(0, jnp.inf)
    reward = np.array(outcome.reward)  # (K, 2, P, O)
    assert reward.shape == (4, 2, 4, 3) and np.isfinite(reward).all()
    np.testing.assert_allclose(reward[:, :, 0], reward[:, :, 1], atol=1e-5)
    np.testing.assert_allclose(reward[:, :, 0], reward[:, :, 2], atol=1e-5)
    if config.env != "ipditm":  # where twenty steps seldom hold a meeting
        assert np.abs(reward[:, :, 0] - reward[:, :, 3]).max() > 1e-3
        assert np.abs(reward[..., 0] - reward[..., 1]).max() > 1e-3
    if config.env == "ipd":
        visits = np.stack([outcome.stats[f"visits/{name}"] for name in ("CC", "CD", "DC", "DD")], axis=-1)
        np.testing.assert_allclose(visits.sum(-1), 1, atol=1e-5)
        np.testing.assert_allclose(visits @ [-1, -3, 0, -2], reward[:, 0], atol=1e-5)


def test_learners_learn_until_they_stop(trial):
    _, play = trial
    changed = lambda result: max(float(jnp.abs(x - y).max()) for x, y in zip(*map(jax.tree.leaves, result[1:]), strict=True))
    assert changed(play(0, jnp.inf)) > 1e-3
    assert changed(play(0, 0)) == 0


def test_evolution_climbs():
    """The update moves the mean towards what earns more: the gradient of Open_ES on trials that pay the policy's first bias."""
    config = config_of(population_size=32, num_episodes=1, num_steps=4, method="gs", num_opponents=1)
    train = make_train(config)
    state = jax.jit(train.init)(jax.random.key(0))
    assert not state.params.any()
    update = jax.jit(train.update)
    state, metrics = update(state, jnp.int32(0))
    assert float(metrics["env_steps"]) == 32 * 2 * 4
    assert metrics["shaper_best"] >= metrics["shaper_reward"]
    # one round of four steps against a learner that has not learned yet: to defect pays, so all-defect is what is climbed to
    rewards = []
    for t in range(60):
        state, metrics = update(state, jnp.int32(t))
        rewards.append(metrics["shaper_reward"])
    assert np.mean(rewards[20:]) > -1.25  # uniform play earns -1.5, defection -1, each update's mean +- .4 by the learners' luck


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(population_size=5), "even"),
        (dict(num_minibatches=7), "must divide"),
        (dict(env="coin_game", learner="tabular"), "needs mlp or gru"),
        (dict(method="gs", averaging="average"), "no memory"),
        (dict(num_opponents=0), "at least 1"),
        (dict(sigma=0.0), "positive"),
    ],
)
def test_bad_requests(changes, words):
    with pytest.raises(UsageError, match=words) as error:
        dataclasses.replace(SMALL, **changes)
    assert "\n" not in str(error.value)


# --- PPO on the policy, and two policies against each other


@pytest.mark.parametrize("method", ["shaper", "mfos"])
def test_replay_is_what_was_played(method):
    """PPO's first ratio is 1 everywhere; what an episode shows changes what the policy does in the next, and so the gradient."""
    config = config_of(method=method, trainer="ppo", num_opponents=2)
    world, sizes = make_world(config), (1, 2, config.num_envs)
    params = shaper.init_policy(jax.random.key(0), config) | {"policy": random_weights(config)["policy"]}
    players = (make_policy(config)._replace(records="trial"), make_learner(config, world.bootstrap))

    @jax.jit
    def play(params):
        learner, memory = start_learner(jax.random.key(1), config, *sizes)
        memories = (init_memory(config, config.num_envs, 2), memory)
        outcome = play_trial(jax.random.key(2), world, players, (spread(params, sizes), learner), memories, sizes, config)[0]
        return outcome.trial[0]

    trial = play(params)
    assert trial.obs.shape == (config.num_episodes, config.num_steps, config.num_envs, 5, 2)
    memory = init_memory(config, config.num_envs, 2)

    @jax.jit
    def again(params, obs):
        logits, value = shaper.replay(make_policy(config), spread(params, sizes), memory, obs)
        return shaper.pick(jax.nn.log_softmax(logits, axis=-2), trial.action), value

    log_prob, value = again(params, trial.obs)
    np.testing.assert_allclose(log_prob, trial.log_prob, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(value, trial.value, rtol=1e-3, atol=1e-5)
    later = jax.jit(jax.grad(lambda obs: again(params, obs)[1][1].sum()))(trial.obs)  # the second episode's values
    assert np.abs(later[0]).max() > 0 and np.abs(later[2]).max() == 0
    if method == "mfos":
        grads = jax.jit(jax.grad(lambda params: again(params, trial.obs)[0].sum()))(params)
        assert np.abs(grads["meta"]["gru"]["wh"]).max() > 0 and np.abs(grads["th"]["w"]).max() > 0


def test_ppo_learns_to_defect():
    """Within one episode to defect is best whatever the other does: PPO finds it for a policy without memory."""
    config = config_of(method="gs", trainer="ppo", num_opponents=8, rl_gamma=0.0, rl_lr=0.05, lr=1e-6, num_updates=20)
    train = make_train(config)
    state = train.init(jax.random.key(0))
    _, metrics = jax.jit(lambda s: jax.lax.scan(train.update, s, jnp.arange(20)))(state)
    early, late = metrics["shaper_reward"][:3].mean(), metrics["shaper_reward"][-3:].mean()
    assert -1.7 < early < -1.3 and late > -1.15, (early, late)  # against a learner that stays near one half: -1.5, then -1


def test_cross_play_changes_sides():
    """One that always defects against one that always cooperates earns 0, and the other -3, on whichever side."""
    config = config_of(method="gs")
    zero = jax.tree.map(jnp.zeros, policy_shapes(config), is_leaf=lambda x: isinstance(x, tuple))
    sure = lambda sign: zero | {"second": {"w": zero["second"]["w"], "b": zero["second"]["b"].at[0].set(9.0)},
                                "policy": zero["policy"].at[1, 0].set(99.0 * sign)}  # fmt: skip
    play = jax.jit(partial(cross_play, config=config))
    reward = play(jax.random.key(0), sure(1), sure(-1)).reward
    np.testing.assert_allclose(reward.mean((0, 2, 3)), [0, -3])
    reward = play(jax.random.key(0), sure(-1), sure(1)).reward
    np.testing.assert_allclose(reward.mean((0, 2, 3)), [-3, 0])
