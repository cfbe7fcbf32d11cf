"""Mix-ME's operators, policies, episodes and emitters, each against a slow reference; what the archive promises."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algos import mix_me
from algos.mix_me import CPU, emit, make_team, make_train, play, shares, some_agents, team_crossover
from common.archive import Archive, nearest
from common.runs.config import UsageError
from envs.planar import PlanarParams, PlanarState

SMALL = replace(CPU, robot="hopper", num_seeds=1, batch_size=16, episode_length=30, hidden=8, num_cells=32, cvt_samples=500)
AGENTS, NUMBERS = 3, 5


def archive_of(num_cells=12, empty=(0, 7, 11)):
    """Elites whose numbers tell who they are: cell + agent / 10."""
    genotype = jnp.arange(num_cells)[:, None, None] + jnp.arange(AGENTS)[:, None] / 10 + jnp.zeros(NUMBERS)
    fitness = jnp.arange(num_cells, dtype=jnp.float32).at[jnp.array(empty)].set(-jnp.inf)
    return Archive(genotype, fitness, jnp.zeros((num_cells, 2)))


# --- operators


def test_iso_line_moves_a_whole_team_along_one_line():
    keys = jax.random.split(jax.random.key(0), 3)
    x1, x2 = (jax.random.normal(key, (4000, AGENTS, NUMBERS)) for key in keys[:2])
    line = mix_me.iso_line(keys[2], x1, x2, 0.0, 0.05) - x1
    step = np.median(line / (x2 - x1), axis=(1, 2))
    np.testing.assert_allclose(line, step[:, None, None] * (x2 - x1), atol=1e-5)
    assert step.std() == pytest.approx(0.05, rel=0.05) and abs(step.mean()) < 0.003
    noise = np.asarray(mix_me.iso_line(keys[2], x1, x2, 0.005, 0.0) - x1)
    assert noise.std() == pytest.approx(0.005, rel=0.02)
    assert abs(np.corrcoef(noise[:, 0, 0], noise[:, 1, 3])[0, 1]) < 0.06
    both = mix_me.iso_line(keys[2], x1, x2, 0.005, 0.05)
    np.testing.assert_allclose(both, x1 + line + noise, atol=1e-5)


def slow_polynomial(x, u, eta, low, high):
    """Deb's mutation of one number."""
    if u < 0.5:
        shift = (2 * u + (1 - 2 * u) * (1 - (x - low) / (high - low)) ** (eta + 1)) ** (1 / (eta + 1)) - 1
    else:
        shift = 1 - (2 * (1 - u) + 2 * (u - 0.5) * (1 - (high - x) / (high - low)) ** (eta + 1)) ** (1 / (eta + 1))
    return min(max(x + shift * (high - low), low), high)


def test_polynomial_mutation_is_debs():
    key, shape = jax.random.key(1), (40, AGENTS, NUMBERS)
    x = jax.random.uniform(jax.random.key(2), shape, minval=-0.5, maxval=0.5)
    u = np.asarray(jax.random.uniform(jax.random.split(key)[1], shape), np.float64)
    slow = [slow_polynomial(a, b, 10.0, -0.5, 0.5) for a, b in zip(np.ravel(x).astype(float), u.ravel(), strict=True)]
    np.testing.assert_allclose(np.ravel(mix_me.polynomial(key, x, 10.0, 0.5, 1.0)), slow, atol=1e-5)
    many = jax.random.uniform(key, (500, AGENTS, 20), minval=-0.5, maxval=0.5)
    mutated = mix_me.polynomial(key, many, 10.0, 0.5, 0.1)
    assert (mutated != many).mean() == pytest.approx(0.1, abs=0.01) and np.abs(mutated).max() <= 0.5
    assert np.abs(mix_me.polynomial(key, 3 * many, 10.0, 0.5, 0.0)).max() == 0.5  # all are brought within the bounds


def test_crossover_transplants_whole_agents_from_independent_elites():
    archive = archive_of()
    child = np.asarray(team_crossover(jax.random.key(3), archive, 6000, 0, keep_roles=True))
    assert (child == child[..., :1]).all(), "an agent is mixed"
    elite, agent = np.floor(child[..., 0] + 1e-3), np.round(10 * (child[..., 0] % 1)).astype(int)
    assert (agent == np.arange(AGENTS)).all(), "a role is not kept"
    known = np.flatnonzero(archive.fitness > -np.inf)
    assert set(np.unique(elite)) == set(known)
    pairs = np.array([[((elite[:, 0] == a) & (elite[:, 1] == b)).sum() for b in known] for a in known])
    expected = 6000 / len(known) ** 2
    chi2, freedom = ((pairs - expected) ** 2 / expected).sum(), len(known) ** 2 - 1
    assert chi2 < freedom + 4 * np.sqrt(2 * freedom), "parents of slots are not independent and uniform"


def test_crossover_of_a_shared_pool_gives_any_role():
    child = np.asarray(team_crossover(jax.random.key(4), archive_of(), 3000, 0, keep_roles=False))
    agent = np.round(10 * (child[..., 0] % 1)).astype(int)
    counts = np.stack([np.bincount(agent[:, i], minlength=AGENTS) for i in range(AGENTS)])
    assert (child == child[..., :1]).all() and np.abs(counts - 1000).max() < 130


def test_crossover_of_k_agents_and_of_single_agents():
    child = np.asarray(team_crossover(jax.random.key(5), archive_of(), 2000, 1, keep_roles=True))
    elite = np.floor(child[..., 0] + 1e-3)
    common = np.array([np.unique(row, return_counts=True)[1].max() for row in elite])
    assert (common >= AGENTS - 1).all() and (common == AGENTS - 1).mean() > 0.7
    odd = np.array([np.argmin([(row == x).sum() for x in row]) for row in elite[common == AGENTS - 1]])
    assert np.bincount(odd, minlength=AGENTS).min() > 300, "it is always the same agent that changes"
    alone = archive_of()._replace(genotype=archive_of().genotype[:, :1])
    child = team_crossover(jax.random.key(6), alone, 50, 0, keep_roles=True)
    assert set(np.ravel(child).tolist()) <= set(np.ravel(alone.genotype[alone.fitness > -jnp.inf]).tolist())


def test_k_agents_are_chosen_evenly():
    chosen = np.asarray(some_agents(jax.random.key(7), (3000, 5), 2))[..., 0]
    assert (chosen.sum(1) == 2).all() and np.abs(chosen.mean(0) - 0.4).max() < 0.05
    assert some_agents(jax.random.key(7), (4, 5), 0).all() and some_agents(jax.random.key(7), (4, 5), 9).all()


def test_shares_of_a_batch():
    paper = replace(CPU, batch_size=100, variation_percentage=0.3, crossplay_percentage=0.3)
    assert shares(paper) == (30, 40, 30)
    for variant in ("naive", "parameter_sharing", "single_agent"):
        assert shares(replace(paper, variant=variant)) == (30, 70, 0)
    assert shares(replace(paper, emitter="iso_line")) == (70, 0, 30)
    assert shares(replace(paper, emitter="iso_line", variant="naive")) == (100, 0, 0)


@pytest.mark.parametrize("variant", ["mix_me", "shared_pool", "naive"])
def test_children_come_from_elites(variant):
    """With no noise every child is a parent, or a mixture of whole agents; naive with k_mutations varies that many agents."""
    config = replace(SMALL, variant=variant, iso_sigma=0.0, line_sigma=0.0, proportion_to_mutate=0.0, mutation_bound=100.0)
    archive = archive_of()
    children = np.asarray(emit(jax.random.key(8), archive, config))
    assert children.shape == (16, AGENTS, NUMBERS)
    elites = np.asarray(archive.genotype[archive.fitness > -jnp.inf])
    varied, mutated, crossed = shares(config)
    whole = (children[:, None] == elites).all((2, 3)).any(1)
    assert whole[: varied + mutated].all() and crossed == (0 if variant == "naive" else 4)
    if variant == "naive":
        noisy = replace(config, iso_sigma=0.01, proportion_to_mutate=1.0, k_mutations=1)
        children = np.asarray(emit(jax.random.key(9), archive, noisy))
        kept = (children[:, None] == elites).all(3).sum(2).max(1)  # agents that equal those of some elite
        assert (kept == AGENTS - 1).all()


# --- teams


def slow_policy(weights, obs, sizes):
    """One policy of one team on one observation."""
    at, x = 0, obs
    for i, (n_in, n_out) in enumerate(zip(sizes, sizes[1:], strict=False)):
        w = weights[at : at + n_in * n_out].reshape(n_in, n_out)
        x = x @ w + weights[at + n_in * n_out : at + (n_in + 1) * n_out]
        x = np.maximum(x, 0) if i < len(sizes) - 2 else np.tanh(x)
        at += (n_in + 1) * n_out
    assert at == len(weights)
    return x


def slow_view(config, env, state, agent):
    """What an agent's policy is given, from the features of the whole robot."""
    features = np.asarray(env.all_features(state))
    seen = env.features[agent]
    local = np.pad(features[seen], (0, env.obs_size - len(seen)))
    if config.variant not in ("parameter_sharing", "shared_pool"):
        return local
    if config.homogenisation == "max":
        return np.concatenate([np.eye(env.num_agents)[agent], local])
    return np.array([x if f in seen else 0.0 for f, x in enumerate(features)])


@pytest.mark.parametrize("homogenisation", ["concat", "max"])
@pytest.mark.parametrize("variant", ["mix_me", "shared_pool", "parameter_sharing", "single_agent"])
def test_actions_are_those_of_each_agents_policy(variant, homogenisation):
    config = replace(SMALL, robot="quad", variant=variant, homogenisation=homogenisation)
    team, num = make_team(config), 3
    env, rng = team.env, np.random.default_rng(0)
    teams = mix_me.init_teams(jax.random.key(0), team, num)
    teams = teams + 0.1 * rng.normal(size=teams.shape).astype(np.float32)
    assert teams.shape[1] == {"parameter_sharing": 1, "single_agent": 1}.get(variant, 4)
    rods = len(env.robot.rods)
    state = PlanarState(
        *(jnp.asarray(rng.normal(size=(n, num)), jnp.float32) for n in (2, rods, 2, rods)), jnp.zeros(num, jnp.int32)
    )
    action = np.asarray(mix_me.act(mix_me.layers(teams, team.sizes), team.observe(state), team))
    assert action.shape == (env.num_agents, env.num_actions, num)
    for b in range(num):
        one = jax.tree.map(lambda x, b=b: x[..., b], state)
        for i in range(env.num_agents):
            weights = np.asarray(teams[b, min(i, teams.shape[1] - 1)])
            out = slow_policy(weights, slow_view(config, env, one, i), team.sizes)
            concat = variant in ("shared_pool", "parameter_sharing") and homogenisation == "concat"
            own = out[2 * i : 2 * i + 2] if concat else out
            np.testing.assert_allclose(action[i, :, b], own, atol=2e-5)


def test_random_teams():
    team = make_team(SMALL)
    teams = mix_me.init_teams(jax.random.key(0), team, 200)
    w, b = mix_me.layers(teams, team.sizes)[0]
    assert (b == 0).all() and w.std() == pytest.approx(team.sizes[0] ** -0.5, rel=0.03)
    assert np.abs(w).max() <= (3 / team.sizes[0]) ** 0.5 and len(np.unique(np.asarray(w)[:, 0, 0, 0])) == 200


def test_an_episode_is_that_of_a_slow_loop():
    """Fitness and descriptor count up to the fall and no further; recorded states are those that were passed through."""
    team = make_team(SMALL)
    teams = mix_me.init_teams(jax.random.key(1), team, 4) * 3
    episode = jax.jit(lambda teams: play(SMALL, teams, recorded=(2,)))(teams)
    env, params = team.env, PlanarParams(reset_noise=0.0)
    _, state = jax.vmap(env.reset_env, (0, None), -1)(jax.random.split(jax.random.key(0), 4), params)
    step = jax.jit(env.step_env, static_argnums=0)
    going_on, total, contact, steps = np.ones(4, bool), np.zeros(4), np.zeros(4), np.zeros(4)
    for t in range(SMALL.episode_length):
        action = mix_me.act(mix_me.layers(teams, team.sizes), team.observe(state), team)
        _, state, reward, fallen, info = step(None, state, action, params)
        total[going_on] += np.asarray(reward)[going_on]
        contact[going_on] += np.asarray(info["contact"])[0, going_on]
        steps += going_on
        going_on &= ~np.asarray(fallen)
        np.testing.assert_allclose(episode.record.angle[t, :, 0], state.angle[:, 2], atol=2e-2)
    assert not going_on.all() and steps.min() < SMALL.episode_length, "nobody fell: the test tests nothing"
    np.testing.assert_allclose(episode.fitness, total, rtol=1e-2, atol=0.1)
    np.testing.assert_allclose(episode.descriptor[:, 0], contact / steps, atol=0.11)


# --- the loop


@pytest.fixture(scope="module")
def trained():
    """The states of eight generations of Mix-ME on the hopper."""
    train = make_train(SMALL)
    state, update = jax.jit(train.init)(jax.random.key(0)), jax.jit(train.update)
    states, metrics = [state], []
    for t in range(8):
        state, info = update(state, jnp.int32(t))
        states.append(state)
        metrics.append(info)
    return states, metrics


def test_the_archive_only_gets_better(trained):
    states, metrics = trained
    for before, after in zip(states, states[1:], strict=False):
        assert (after.archive.fitness >= before.archive.fitness).all()
    score = [float(m["qd_score"]) for m in metrics]
    assert score == sorted(score) and score[-1] > score[0]
    last = states[-1].archive
    held = np.asarray(last.fitness) > -np.inf
    by_hand = (np.asarray(last.fitness)[held] + 2.0 * SMALL.episode_length).sum()
    assert score[-1] == pytest.approx(by_hand, rel=1e-5)
    assert float(metrics[-1]["coverage"]) == pytest.approx(held.mean()) and float(metrics[-1]["max_fitness"]) == last.fitness.max()
    assert all(0 <= float(m["taken"]) <= 1 for m in metrics) and int(metrics[-1]["evaluations"]) == 8 * 16
    assert np.isnan(metrics[0]["taken_crossover"]) and np.isfinite(metrics[1]["taken_crossover"])


def test_elites_replay_to_what_is_stored_of_them_and_sit_in_their_cells(trained):
    state = trained[0][-1]
    held = np.flatnonzero(state.archive.fitness > -jnp.inf)
    assert len(held) > 3
    episode = jax.jit(lambda teams: play(SMALL, teams))(state.archive.genotype)
    np.testing.assert_allclose(episode.fitness[held], state.archive.fitness[held], rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(episode.descriptor[held], state.archive.descriptor[held], atol=0.05)
    np.testing.assert_array_equal(nearest(state.archive.descriptor[held], state.centroids), held)


def test_corner_elites_are_the_nearest():
    archive = archive_of()._replace(descriptor=jnp.stack([jnp.linspace(0, 1, 12), jnp.linspace(1, 0, 12) ** 2], axis=1))
    corner = np.asarray(mix_me.corner_elites(archive))
    for place, goal in zip(corner, [(0, 0), (1, 0), (0, 1), (1, 1)], strict=True):
        distance = np.where(archive.fitness > -np.inf, ((np.asarray(archive.descriptor) - goal) ** 2).sum(1), np.inf)
        assert distance[place] == distance.min()


# --- CMA-ME


def test_improvements_are_ranked_new_cells_first():
    fitness = jnp.array([1.0, 5.0, -3.0, 2.0, 9.0])
    held = jnp.array([-jnp.inf, 1.0, -jnp.inf, 3.0, 8.0])
    assert mix_me.improvement_rank(fitness, held).tolist() == [0, 2, 1, 4, 3]  # new: 1, -3; gains: 4, 1, -1


def test_cma_me_follows_improvements_and_restarts():
    """Emitters climb a slope that the archive rewards; one whose children are all refused starts anew at an elite."""
    config = replace(SMALL, emitter="cma_me", batch_size=32, num_emitters=2, cma_sigma=0.1)
    team = make_team(config)
    cma = mix_me.make_cma_me(config, team)
    elites = mix_me.init_teams(jax.random.key(0), team, 4)
    archive = Archive(elites, jnp.arange(4.0), jnp.zeros((4, 1)))
    first = state = mix_me.restart(jax.random.key(1), cma, archive, config)
    starts = np.asarray(elites.reshape(4, -1))
    assert all((start == starts).all(1).any() for start in np.asarray(state.mean))
    ask = jax.jit(lambda key, state: mix_me.ask(key, cma, state, config))
    tell = jax.jit(lambda key, *args: mix_me.tell(key, cma, *args, archive, config))
    for i in range(30):
        children, state = ask(jax.random.key(i), state)
        assert children.shape == (32, 3, team.num_parameters)
        rank = mix_me.improvement_rank(children[:, 0].sum(-1), jnp.zeros(32))
        state = tell(jax.random.key(100 + i), state, children, rank, jnp.ones(32, bool))
    agents = lambda mean: mean.reshape(2, 3, -1).sum(-1)
    climbed = np.asarray(agents(state.mean) - agents(first.mean))
    assert (climbed[:, 0] > 3 * np.abs(climbed[:, 1:]).max(1)).all(), "the means do not follow the ranks"
    taken = jnp.arange(32) < 16  # the second emitter's children are refused
    after = tell(jax.random.key(7), state, children, rank, taken)
    assert (np.asarray(after.mean[1]) == starts).all(1).any() and not (np.asarray(after.mean[0]) == starts).all(1).any()
    assert float(after.std[1]) == pytest.approx(0.1)


def test_bad_settings_are_refused():
    for change, words in (
        (dict(variation_percentage=0.8, crossplay_percentage=0.3), "at most 1"),
        (dict(emitter="cma_me", num_emitters=3), "multiple of"),
        (dict(emitter="cma_me", num_emitters=8), "at least 4"),
        (dict(obs_distance=-2), "at least -1"),
        (dict(num_cells=1000, cvt_samples=100), "num-cells"),
    ):
        with pytest.raises(UsageError, match=words):
            replace(SMALL, **change)


def test_robots_of_the_physics_extra_need_it(monkeypatch):
    monkeypatch.setattr(mix_me.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"ant_4x2: needs .* '\.\[physics\]'"):
        replace(CPU, robot="ant_4x2")
