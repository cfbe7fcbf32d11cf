"""H-GAP's parts against numpy and by hand, at sizes at which that can be done; what its planner chooses; what is refused."""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algos import hgap
from algos.hgap import CPU, Codebook
from common.runs.checkpoint import save
from common.runs.config import UsageError, as_dict
from envs.humanoid import Humanoid, split
from envs.humanoid_control import Tasks
from envs.humanoid_data import Data

OBS, ACTIONS, BATCH = 5, 3, 4
TINY = replace(
    CPU, episodes=8, batch_size=8, window=12, pool=4, codes_per_step=2, num_codes=8, latent=8, width=16, layers=3, prior_width=16,
    prior_layers=2, heads=2, samples=4, horizon=4, num_updates=4, vqvae_updates=2, log_every=1, eval_every=4, save_every=4,
)  # fmt: skip
SLICE = (TINY.codes_per_step, TINY.latent // TINY.codes_per_step)


def scattered(init, seed=0):
    """Parameters of the shapes that `init` (of a key) gives, at random: none hides what it does, nothing is compiled."""
    rng = np.random.default_rng(seed)
    like = jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)))
    return jax.tree.map(lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), x.dtype), like)


@pytest.fixture(scope="module")
def vqvae():
    return scattered(lambda key: hgap.init_vqvae(key, TINY, (OBS, ACTIONS)))


@pytest.fixture(scope="module")
def prior():
    return scattered(lambda key: hgap.init_prior(key, TINY, OBS))


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def changed(a, b):
    """Along the second axis (time), what differs in any way."""
    a, b = np.asarray(a), np.asarray(b)
    return (a != b).any(axis=(0, *range(2, a.ndim))).tolist()


# --- VQ-VAE


def test_the_encoder_is_causal(vqvae):
    """A step changes its own latent step and those after it, none before."""
    x = normal(0, BATCH, 12, OBS + ACTIONS)
    run = jax.jit(lambda x: hgap.encode(vqvae, x, TINY))
    whole = run(x)
    assert whole.shape == (BATCH, 3, *SLICE)
    for t in range(12):
        assert changed(whole, run(x.at[:, t].multiply(-3))) == [step >= t // 4 for step in range(3)]


def test_the_decoder_is_causal_and_each_latent_step_is_for_its_own_steps(vqvae):
    z, first = normal(0, BATCH, 3, *SLICE), normal(1, BATCH, OBS)
    run = jax.jit(lambda z, first: hgap.decode(vqvae, z, first, TINY))
    whole = run(z, first)
    assert whole.shape == (BATCH, 12, OBS + ACTIONS)
    assert changed(whole, run(z.at[:, 1].multiply(-3), first)) == [t >= 4 for t in range(12)]
    assert changed(whole[..., OBS:], run(z, first * 2)[..., OBS:]) == [True] * 12
    np.testing.assert_allclose(hgap.decode(vqvae, z[:, :2], first, TINY), whole[:, :8], atol=1e-5)  # a shorter plan


def test_the_first_state_is_given_back_and_others_are_offsets_from_it(vqvae):
    z, first = normal(0, BATCH, 3, *SLICE), normal(1, BATCH, OBS)
    out = hgap.decode(vqvae, z, first, TINY)
    np.testing.assert_array_equal(out[:, 0, :OBS], first)
    assert (np.abs(out[:, 1:, :OBS] - first[:, None]).max((0, 2)) > 0.01).all() and np.abs(out[:, 0, OBS:]).min() > 1e-3
    blind = {**vqvae, "decoder": vqvae["decoder"] | {"in": dict(vqvae["decoder"]["in"])}}
    blind["decoder"]["in"]["w"] = blind["decoder"]["in"]["w"].at[:OBS].set(0)  # which knows the first state as an offset alone
    one, other = hgap.decode(blind, z, first, TINY), hgap.decode(blind, z, first + 2, TINY)
    np.testing.assert_allclose(other[..., :OBS] - one[..., :OBS], 2, atol=1e-5)
    np.testing.assert_allclose(other[..., OBS:], one[..., OBS:], atol=1e-5)


def test_the_nearest_code_is_that_of_trying_all():
    codes, z = normal(0, 50, 4), normal(1, 6, 7, 4) * 1.5
    distance = ((np.asarray(z)[..., None, :] - np.asarray(codes)) ** 2).sum(-1)
    found = hgap.nearest(codes, z)
    np.testing.assert_array_equal(found, distance.argmin(-1))
    assert found.dtype == jnp.int32 and len(np.unique(found)) > 10
    np.testing.assert_array_equal(hgap.nearest(codes * 3, codes[:9] * 3), np.arange(9))


def test_the_loss_is_that_of_what_codes_decode_to(vqvae):
    """Actions weigh as told, the first state is given; gradients reach the encoder straight through the codes, and no codes."""
    codes, x = normal(0, 8, SLICE[1]), normal(1, BATCH, 12, OBS + ACTIONS)
    config = replace(TINY, action_weight=3.0, commitment=0.25)
    loss, (metrics, z, index) = hgap.vqvae_loss(vqvae, jax.random.key(0), codes, x, OBS, config)
    np.testing.assert_array_equal(index, hgap.nearest(codes, hgap.encode(vqvae, x, TINY)))
    q = codes[index]
    error = np.array((hgap.decode(vqvae, q, x[:, 0, :OBS], TINY) - x) ** 2)
    assert metrics["state_mse"] == pytest.approx(error[..., :OBS].mean(), rel=1e-4)
    assert metrics["action_mse"] == pytest.approx(error[..., OBS:].mean(), rel=1e-4)
    assert metrics["commit"] == pytest.approx(float(((z - q) ** 2).mean()), rel=1e-4)
    error[..., OBS:] *= 3
    assert loss == pytest.approx(error.mean() + 0.25 * float(metrics["commit"]), rel=1e-4)

    of = jax.jit(jax.grad(lambda params, codes: hgap.vqvae_loss(params, jax.random.key(0), codes, x, OBS, free)[0], (0, 1)))
    free = replace(config, commitment=0.0)
    grads, of_codes = of(vqvae, codes)
    through = jax.grad(lambda shift: ((hgap.decode(vqvae, q + shift, x[:, 0, :OBS], TINY) - x) ** 2 * weight).mean())
    weight = jnp.where(jnp.arange(OBS + ACTIONS) < OBS, 1.0, 3.0)
    pull = jax.jit(lambda params: jax.vjp(lambda params: hgap.encode(params, x, TINY), params)[1](through(jnp.zeros_like(q)))[0])
    pulled = pull(vqvae)
    for name in ("in", "out"):
        np.testing.assert_allclose(grads["encoder"][name]["w"], pulled["encoder"][name]["w"], rtol=1e-2, atol=1e-4)
    assert np.abs(grads["encoder"]["in"]["w"]).max() > 1e-3
    assert not of_codes.any()


def test_codes_follow_the_mean_of_what_chose_them():
    """Moving averages of counts and sums by hand; a code that nothing chooses for long begins anew at an output."""
    config = replace(TINY, num_codes=4, codebook_decay=0.9, least_use=0.05)
    z, index = normal(0, 3, 2, 2), jnp.array([[0, 1], [0, 0], [1, 2]])  # six slices: 1.5 for each of four codes
    count, total = np.float32([2, 1, 1, 0.05]), np.asarray(normal(1, 4, 2))
    book = hgap.follow(jax.random.key(0), Codebook(jnp.array(count), jnp.array(total)), z, index, config, 5)
    flat, chosen = np.asarray(z).reshape(-1, 2), np.asarray(index).ravel()
    hits = np.array([(chosen == k).sum() for k in range(4)])
    expected = (0.9 * total + 0.1 * np.array([flat[chosen == k].sum(0) for k in range(4)])) / (0.9 * count + 0.1 * hits)[:, None]
    found = np.asarray(hgap.vectors(book))
    np.testing.assert_allclose(found[:3], expected[:3], rtol=1e-3)
    np.testing.assert_allclose(book.count[:3], (0.9 * count + 0.1 * hits)[:3], rtol=1e-3)
    assert np.abs(flat - found[3]).max(1).min() < 1e-5 and np.abs(found[3] - expected[3]).max() > 0.1
    assert 0.9 * book.count[3] > 0.05 * 1.5, "it begins anew again at once"


def test_in_the_first_update_all_codes_are_outputs_and_without_a_least_use_none_begins_anew():
    z, index = normal(0, 40, 2), jnp.zeros(40, jnp.int32)
    start = Codebook(jnp.ones(8), jnp.zeros((8, 2)))
    found = np.asarray(hgap.vectors(hgap.follow(jax.random.key(0), start, z, index, TINY, 0)))
    gaps = np.abs(found[:, None] - np.asarray(z)).max(-1)
    assert (gaps.min(1) < 1e-5).all() and len(set(gaps.argmin(1))) > 4
    kept, config = start._replace(total=normal(1, 8, 2)), replace(TINY, least_use=0.0, codebook_decay=0.5)
    step = lambda t, book: hgap.follow(jax.random.key(t), book, z, index, config, t)
    for length in (20, 300):  # after which averages of what was never chosen are below the least float
        found = hgap.vectors(jax.jit(lambda length=length: jax.lax.fori_loop(1, length, step, kept))())
        np.testing.assert_allclose(found[0], z.mean(0), rtol=1e-3, atol=1e-5)
        assert np.isfinite(found).all() and np.abs(np.asarray(found)[1:, None] - np.asarray(z)).max(-1).min() > 1e-3


# --- prior


def test_cached_logits_are_those_of_the_whole(prior):
    """Code by code with keys and values of those before; each sees the first state and the codes before it, in their order."""
    index, first = jnp.asarray(np.random.default_rng(0).integers(0, 8, (BATCH, TINY.tokens))), normal(1, BATCH, OBS)
    whole = jax.jit(lambda index, first: hgap.prior(prior, index, first, TINY))
    logits = whole(index, first)
    assert logits.shape == (BATCH, 6, 8)
    state = hgap.dense(prior["state"], first)
    step = jax.jit(lambda before, cache, s: hgap.prior_step(prior, before, state, cache, s, TINY))
    before, cache = jnp.zeros_like(state), hgap.init_cache(TINY, BATCH)
    for s in range(TINY.tokens):
        found, cache = step(before, cache, s)
        np.testing.assert_allclose(found, logits[:, s], atol=1e-5)
        before = prior["code"][index[:, s]]
    assert changed(logits, whole(index.at[:, 2].set((index[:, 2] + 1) % 8), first)) == [s > 2 for s in range(6)]
    assert changed(logits, whole(index, -first)) == [True] * 6
    assert not np.allclose(logits[:, 3], whole(index.at[:, :2].set(index[:, 1::-1]), first)[:, 3], atol=1e-3)


def test_greedy_sequences_are_those_of_the_whole_and_belong_to_their_state(prior):
    """Two for each first state, one after the other; every next code the likeliest by encoding all codes before anew."""
    first = normal(1, 3, OBS)
    found = jax.jit(lambda key: hgap.sample_codes(key, prior, first, 2, TINY, 0.0))(jax.random.key(0))
    assert found.shape == (6, TINY.tokens)
    whole = jax.jit(lambda index: hgap.prior(prior, index, first, TINY))
    index = jnp.zeros((3, TINY.tokens), jnp.int32)
    for s in range(TINY.tokens):
        index = index.at[:, s].set(whole(index)[:, s].argmax(-1))
    np.testing.assert_array_equal(found, np.repeat(index, 2, 0))
    assert len(np.unique(index, axis=0)) > 1


def test_codes_are_drawn_as_the_prior_says(prior):
    """First codes and second codes after each: frequencies in 4000 sequences of one state are the prior's probabilities."""
    config, first = replace(TINY, top_p=1.0), normal(2, 1, OBS)
    codes = np.asarray(jax.jit(lambda key: hgap.sample_codes(key, prior, first, 4000, config, 2.0))(jax.random.key(0)))
    index = jnp.pad(jnp.arange(8)[:, None], ((0, 0), (0, TINY.tokens - 1)))
    p = np.asarray(jax.nn.softmax(hgap.prior(prior, index, first.repeat(8, 0), TINY) / 2.0))
    np.testing.assert_allclose(np.bincount(codes[:, 0], minlength=8) / 4000, p[0, 0], atol=0.04)
    likely = p[0, 0].argmax()
    after = codes[codes[:, 0] == likely, 1]
    np.testing.assert_allclose(np.bincount(after, minlength=8) / len(after), p[likely, 1], atol=2 / len(after) ** 0.5)


def test_the_priors_loss_is_the_cross_entropy(prior):
    index, first = jnp.asarray(np.random.default_rng(0).integers(0, 8, (BATCH, TINY.tokens))), normal(1, BATCH, OBS)
    logits = np.asarray(hgap.prior(prior, index, first, TINY), np.float64)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = -np.log([p[b, s, index[b, s]] for b in range(BATCH) for s in range(TINY.tokens)]).mean()
    assert hgap.prior_loss(prior, None, index, first, TINY) == pytest.approx(expected, rel=1e-4)


# --- training


def some_data(num_obs=56, num_actions=12):
    rng = np.random.default_rng(0)
    size, window = num_obs + num_actions, TINY.window
    steps = rng.normal(size=(3, 20, size)).astype(np.float32)
    left = np.tile(np.arange(20, 0, -1, dtype=np.int32), (3, 1))
    starts = np.argwhere(left >= window).astype(np.int32)
    mean, std = rng.normal(size=size).astype(np.float32), rng.uniform(0.5, 1.5, size).astype(np.float32)
    return Data(steps, left, np.zeros((3, 20), bool), starts, steps, left, starts, mean, std, None, {"speed": 1.5}, num_obs)


def moved(a, b):
    return {name: any((x != y).any() for x, y in zip(*map(jax.tree.leaves, (a[name], b[name])), strict=True)) for name in a}


def test_each_part_is_trained_in_its_turn(monkeypatch):
    """The VQ-VAE and its codes until vqvae_updates, then the prior; what does not learn stays, and says that it did not."""
    monkeypatch.setattr(hgap, "load_data", lambda config: some_data(OBS, ACTIONS))
    train = hgap.make_train(replace(TINY, prior_layers=1, layers=1, window=8))
    state = jax.jit(train.init)(jax.random.key(0))
    update = jax.jit(train.update)
    for t, part, losses in ((0, "vqvae", {"state_mse", "action_mse", "commit"}), (2, "prior", {"prior_loss"})):
        new, metrics = update(state, jnp.int32(t))
        assert moved(state.params, new.params) == {"vqvae": part == "vqvae", "prior": part == "prior"}
        assert (new.codebook.count != state.codebook.count).any() == (part == "vqvae")
        assert {name for name, x in metrics.items() if np.isfinite(x)} == losses < metrics.keys()
        state = new


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def test_each_stage_trains_its_part_alone_and_types_do_not_depend_on_x64(monkeypatch):
    monkeypatch.setattr(hgap, "load_data", lambda config: some_data(OBS, ACTIONS))
    for stage in ("all", "vqvae", "prior"):
        with jax.enable_x64():
            train = hgap.make_train(replace(TINY, stage=stage))
            state = jax.eval_shape(train.init, jax.eval_shape(lambda: jax.random.key(0)))
            new, metrics = jax.eval_shape(train.update, state, jax.ShapeDtypeStruct((), jnp.int32))
            text = str(jax.make_jaxpr(train.update)(state, jnp.int32(0)))
        assert types(new) == types(state)
        assert not {x.dtype for x in jax.tree.leaves((new, metrics))} & {np.dtype("int64"), np.dtype("float64")}
        assert ("cond[" in text) == (stage == "all")


# --- planning


def plans_of(table, data, obs):
    """The plans that the stubs below make, standardised, of observations (M, 56): (M, N, T, 68), numpy."""
    first = (np.asarray(obs) - data.mean[:56]) / data.std[:56]
    return table[None] + np.pad(first, ((0, 0), (0, 12)))[:, None, None]


@pytest.fixture
def stubbed(monkeypatch):
    """A planner's surroundings in which plan j of a state is row j of a table, about that state."""
    rng, data = np.random.default_rng(5), some_data()
    data = data._replace(mean=rng.normal(1, 1, 68).astype(np.float32), std=rng.uniform(0.2, 2, 68).astype(np.float32))
    table = rng.normal(size=(TINY.samples, TINY.window, 68)).astype(np.float32)

    def sample_codes(key, params, first, num, config, temperature):
        return jnp.tile(jnp.arange(num)[:, None], (len(first), config.tokens))

    def decode(params, z, first, config, key=None):
        which = jnp.round(z.reshape(len(z), -1)[:, 0]).astype(int)
        return jnp.asarray(table)[which] + jnp.pad(first, ((0, 0), (0, 12)))[:, None]

    monkeypatch.setattr(hgap, "sample_codes", sample_codes)
    monkeypatch.setattr(hgap, "decode", decode)
    codes = jnp.broadcast_to(jnp.arange(8.0)[:, None], (8, SLICE[1]))
    state = SimpleNamespace(params={"prior": None, "vqvae": None}, codebook=Codebook(jnp.full(8, 2.0), 2 * codes))
    functions = (lambda obs: (obs["velocimeter"] ** 2).sum(-1), lambda obs: -jnp.abs(obs["body_height"][..., 0] - 1))
    tasks = Tasks(("fast", "level"), functions, (False, False), np.repeat([0, 1], 8))
    return SimpleNamespace(data=data, table=table, state=state, tasks=tasks, obs=normal(6, 16, 56))


def scores_by_hand(plans, num_steps):
    """(16, N, T, 68) -> (16, N), the first 8 by the first task."""
    seen = split(plans[..., :num_steps, :56])
    fast, level = (seen["velocimeter"] ** 2).sum(-1), -np.abs(seen["body_height"][..., 0] - 1)
    return np.concatenate([fast[:8], level[8:]]).sum(-1)


@pytest.mark.parametrize("chunk", [8, 1000])
def test_the_plan_whose_states_score_best_as_they_are_is_done(stubbed, monkeypatch, chunk):
    """Over the horizon alone; by the task of each. Another choice than on standardised states, and than on the whole window."""
    monkeypatch.setattr(hgap, "CHUNK", chunk)
    data = stubbed.data
    planner = hgap.make_planner(TINY, Humanoid, data, stubbed.state, stubbed.tasks, TINY.samples, 1.0)
    actions, memory = jax.jit(planner)(jax.random.key(0), (), None, stubbed.obs)
    plans = plans_of(stubbed.table, data, stubbed.obs)
    whole = plans * data.std + data.mean
    best = scores_by_hand(whole, TINY.horizon).argmax(1)
    np.testing.assert_allclose(actions, whole[np.arange(16), best][..., 56:], rtol=1e-4, atol=1e-5)
    assert actions.shape == (16, TINY.window, 12) and memory == ()
    assert (best != scores_by_hand(plans, TINY.horizon).argmax(1)).any() and (best != scores_by_hand(whole, 12).argmax(1)).any()
    assert len(set(best[:8])) > 1 and len(set(best[8:])) > 1


def test_what_is_done_begins_the_best_plan(stubbed, monkeypatch):
    """In closed loop: `plan_every` actions of the plan that is best where it was made, then of the next. A world in which nothing
    moves and `push` holds the first joint's last commands."""
    note = lambda self, state, action, params: state._replace(push=jnp.concatenate([action[:1], state.push[:-1]]))
    monkeypatch.setattr(Humanoid, "simulate", note)
    env, data, tasks = Humanoid(), stubbed.data, stubbed.tasks._replace(falling=(True, True))
    planner = hgap.make_planner(TINY, env, data, stubbed.state, tasks, TINY.samples, 1.0)
    world = jax.jit(jax.vmap(lambda key: env.reset_env(key, env.default_params)[1], out_axes=-1))(
        jax.random.split(jax.random.key(0), 16)
    )
    outcome = jax.jit(lambda world: hgap.play(jax.random.key(0), env, tasks, planner, (), world, 6, 2))(world)
    whole = plans_of(stubbed.table, data, env.get_obs(world).T) * data.std + data.mean
    best = np.clip(whole[np.arange(16), scores_by_hand(whole, TINY.horizon).argmax(1)][:, :, 56], -1, 1)
    np.testing.assert_allclose(outcome.worlds.push[2, :4], best.T[[1, 0, 1, 0]], atol=1e-4)
    assert np.abs(best[:, 0] - best[:, 1]).max() > 0.1


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"horizon": 17}, "--horizon 17: must be at most --window 16"),
        ({"codes_per_step": 3}, "--codes-per-step 3: must divide --latent 128"),
        ({"pool": 3}, "--pool 3: must divide --window 16"),
        ({"window": 18, "horizon": 16}, "--pool 4: must divide --window 18"),
        ({"plan_every": 17}, "--plan-every 17: must be at most --horizon 16"),
        ({"heads": 3}, "--width 128: must be a multiple of --heads 3"),
        ({"prior_width": 130}, "--prior-width 130: must be a multiple of --heads 4"),
        ({"vqvae_updates": 3000, "num_updates": 3000}, "--vqvae-updates 3000: must be below --num-updates 3000"),
        ({"samples": 0}, "--samples 0: must be at least 1"),
        ({"eval_steps": 0}, "--eval-steps 0: must be at least 1"),
        ({"top_p": 1.5}, "--top-p 1.5: must lie between 0 and 1"),
        ({"temperature": -1.0}, "--temperature -1.0: must lie between 0 and 100"),
        ({"codebook_decay": 1.1}, "--codebook-decay 1.1: must lie between 0 and 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(changes, words):
    with pytest.raises(UsageError) as error:
        replace(CPU, **changes)
    assert str(error.value).startswith(words) and "\n" not in str(error.value)


def test_a_single_stage_may_be_as_short_as_it_likes():
    config = replace(CPU, stage="prior", num_updates=10, log_every=10, eval_every=10, save_every=10)
    assert config.tokens == 16 and (config.split_size, replace(config, stage="offline").split_size) == (128, 256)


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("fly", "--task fly: is none of speed"),
        ("none.py:mine", "--task none.py:mine: there is no file none.py"),
        ("bad.py:mine", "NameError: name 'nothing' is not defined"),
        ("bad.py:yours", "AttributeError"),
        ("bad.py:shape", "must be float (2, 3)"),
        ("bad.py:endless", "is not finite"),
    ],
)
@pytest.mark.parametrize("stage", ["all", "plan"])
def test_faulty_tasks_end_the_command_in_one_line_before_anything_is_drawn(stage, task, words, tmp_path, monkeypatch, capsys):
    def never(*given, **named):
        raise AssertionError("too late")

    for name in ("load_data", "run", "start_run", "find", "newest_run"):
        monkeypatch.setattr(hgap, name, never)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.py").write_text(
        "def mine(obs): return nothing\ndef shape(obs): return obs['gyro']\ndef endless(obs): return 1 / obs['gyro'][..., 0]\n"
    )
    with pytest.raises(SystemExit) as stop:
        hgap.main(replace(CPU, stage=stage, task=task))
    told = capsys.readouterr().err
    assert stop.value.code == 2 and words in told and told.count("\n") == 1


# --- runs


def save_run(folder, config, update=4, state=None):
    save(folder / "checkpoints" / f"{update:08}.npz", {} if state is None else state, {"config": as_dict(config), "update": update})
    return folder


def test_a_run_is_of_the_part_that_it_has_come_to(tmp_path):
    tree = {"x": np.zeros(2)}
    for update, stage in ((2, "vqvae"), (4, "all")):
        found = hgap.find(save_run(tmp_path / str(update), TINY, update, tree))
        assert (found.config.stage, found.update) == (stage, update)
        assert replace(found.config, stage="all") == TINY
    assert hgap.find(save_run(tmp_path / "prior", replace(TINY, stage="prior"), 1, tree)).config.stage == "prior"
    with pytest.raises(UsageError, match="there is no checkpoint"):
        hgap.find(tmp_path / "none")


@pytest.mark.parametrize(
    ("stage", "update", "asked", "fits"),
    [
        ("bc", 4, "plan", False),
        ("offline", 4, "prior", False),
        ("all", 2, "plan", False),  # no prior yet
        ("vqvae", 4, "plan", False),
        ("vqvae", 4, "prior", True),
        ("all", 4, "plan", True),
        ("prior", 4, "plan", True),
        ("all", 4, "bc", False),
    ],
)
def test_runs_are_used_for_what_they_have_learned(tmp_path, monkeypatch, capsys, stage, update, asked, fits):
    """What has not been trained is refused in one line, before anything is drawn."""
    folder, reached = save_run(tmp_path / "run", replace(TINY, stage=stage), update, {"x": np.zeros(2)}), []
    monkeypatch.setattr(hgap, "load_data", None)
    monkeypatch.setattr(hgap, "plan", lambda config, found: reached.append(found))
    monkeypatch.setattr(hgap, "run", lambda config, make_train, highlights, given: reached.append(given))
    config = replace(TINY, stage=asked, load=str(folder), cache="none")
    if fits:
        hgap.main(config)
        assert len(reached) == 1 and reached[0]
    else:
        with pytest.raises(SystemExit) as stop:
            hgap.main(config)
        told = capsys.readouterr().err
        assert stop.value.code == 2 and told.count("\n") == 1 and "--load" in told and not reached


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A run with two seeds at random, about to end, on data that are noise."""
    monkeypatch.setattr(hgap, "load_data", lambda config: some_data())
    config = replace(TINY, num_seeds=2)
    rng = np.random.default_rng(0)
    key = lambda x: jax.random.split(jax.random.key(1), x.shape[0])
    fill = lambda x: key(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else np.asarray(rng.normal(size=x.shape), x.dtype)
    state = jax.tree.map(fill, hgap.state_like(config, hgap.make_train))
    return config, save_run(tmp_path / "run", config, 4, state), state


def test_a_run_begins_with_what_another_has_learned(saved):
    config, folder, state = saved
    given = hgap.starting_state(replace(config, stage="prior", load=str(folder)), folder)
    assert given.keys() == {"params", "codebook"}
    for a, b in zip(jax.tree.leaves(given), jax.tree.leaves((state.codebook, state.params)), strict=True):
        np.testing.assert_array_equal(a, b)
    for changes, words in (
        ({"num_seeds": 1}, "has 2 seeds, this run 1: give --num-seeds 2"),
        ({"width": 32}, "this run has"),
        ({"num_codes": 16}, "this run has"),
    ):
        with pytest.raises(UsageError, match=words):
            hgap.starting_state(replace(config, **changes), folder)


class Reached(Exception):
    """Which planner was made."""


MODEL, DYNAMICS = ("hgap", "imitate"), ("mppi", "predictive_sampling")


@pytest.mark.parametrize(
    ("planner", "given"), [*((name, True) for name in MODEL + DYNAMICS), *((name, False) for name in DYNAMICS)]
)
def test_the_planner_that_is_asked_for_plans(saved, monkeypatch, planner, given):
    """With a run or, if the true dynamics do, without one."""
    config, folder, _ = saved

    def stop(name):
        def made(*args):
            raise Reached(name, args)

        return made

    monkeypatch.setattr(hgap, "true_dynamics", stop("dynamics"))
    monkeypatch.setattr(hgap, "make_planner", stop("model"))
    asked = replace(config, stage="plan", planner=planner, task="forward", samples=5, load=str(folder) if given else None)
    monkeypatch.setattr(hgap, "begin_worlds", lambda *args: SimpleNamespace(act=jnp.zeros((12, 4))))
    with pytest.raises(Reached) as reached:
        hgap.plan(asked, hgap.find(folder) if given else None)
    name, args = reached.value.args
    assert name == ("dynamics" if planner in DYNAMICS else "model")
    if planner in DYNAMICS:
        assert args[2] == 5 and args[-1] == (planner == "predictive_sampling")
    else:
        assert args[-2:] == ((5, config.temperature) if planner == "hgap" else (1, 0.0))


@pytest.mark.slow
@pytest.mark.parametrize("planner", ["hgap", "mppi"])
def test_plan_writes_returns_and_a_film(saved, monkeypatch, tmp_path, planner):
    """Of each seed's model, of every task."""
    config, folder, _ = saved
    out = tmp_path / "plan"
    asked = replace(config, stage="plan", planner=planner, out=str(out), eval_steps=4, eval_episodes=2, plan_every=2)
    hgap.plan(asked, hgap.find(folder) if planner == "hgap" else None)
    told = json.loads((out / "plan.json").read_text())["tasks"]
    assert set(told) == set(Humanoid.tasks) and np.shape(told["forward"]["return"]) == (2, 2)
    assert told["speed"]["data"] == 6.0 and [path.stat().st_size > 1000 for path in (out / "videos").iterdir()] == [True]


def test_evaluations_say_the_returns_of_every_task(monkeypatch):
    """Traced: planned, by one sample, imitated; no types of 64 bits."""
    data = some_data()
    monkeypatch.setattr(hgap, "load_data", lambda config: data)
    with jax.enable_x64():
        train = hgap.make_train(TINY)
        state = jax.eval_shape(train.init, jax.eval_shape(lambda: jax.random.key(0)))
        found = jax.eval_shape(partial(hgap.evaluate, TINY, data), state)
    assert {f"{arm}return_{task}" for arm in ("", "unplanned_", "imitation_") for task in Humanoid.tasks} <= found.keys()
    assert {"open_loop_mse", "heldout_state_mse", "heldout_prior_loss", "perplexity"} <= found.keys()
    assert not {x.dtype for x in jax.tree.leaves(found)} & {np.dtype("int64"), np.dtype("float64")}
