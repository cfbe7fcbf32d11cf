"""Hand-compiled transformers against the programs they stand for; data, pruning and the two stages of training."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algos import tracr
from algos.tracr import CPU, Setting, first_params, forward, make_task, make_train, prune, pruning, settings_of, step_size
from common.runs.config import UsageError

SMALL = replace(CPU, num_seeds=1, batch_size=8, eval_strings=64, candidates=8)


def symbolic(program, which, tokens):
    """What the RASP program says of one string, its start token first."""
    letters = [int(x) for x in tokens[1:]]
    return letters.count(which) if program == "counter" else sorted(letters, reverse=True)[4 + which]


@pytest.fixture(scope="module", params=["counter", "max"])
def case(request):
    config = replace(SMALL, program=request.param)
    return request.param, config, make_task(config)


def strings_of(program, rng):
    """Tokens (N, T): every pair of counts from 0 to 8 in random order; or random sets of letters."""
    if program == "max":
        return np.array([[26, *rng.choice(26, 10, replace=False)] for _ in range(300)])
    pairs = [(a, b) for a in range(9) for b in range(9)]
    texts = [[0] * a + [1] * b + list(rng.integers(2, 9, 23 - a - b)) for a, b in pairs]
    return np.array([[9, *rng.permutation(text)] for text in texts])


# --- the compiled programs


@pytest.mark.parametrize("which", [0, 1])
def test_compiled_models_are_the_programs(case, which):
    """At every position of every string, without noise and with it."""
    program, config, task = case
    tokens, model = strings_of(program, np.random.default_rng(0)), task.compiled[which]
    expected = np.array([symbolic(program, which, text) for text in tokens])
    run = jax.jit(lambda params: forward(params, model, tokens)[0][:, 1:].argmax(-1))
    for params in (model.params, *(first_params(config, task, jax.random.key(seed), which) for seed in range(3))):
        np.testing.assert_array_equal(np.asarray(run(params)), np.repeat(expected[:, None], tokens.shape[1] - 1, 1))


def test_the_reading_block_looks_at_the_marked_letters(case):
    program, _, task = case
    strings = task.sample(jax.random.key(0), 64, 0.0, exclude=True)
    mass = tracr.reading(task, task.compiled[0].params, strings)
    count = np.asarray(strings.marks[0].sum(1))
    assert mass[0] == pytest.approx((count / (1 + count)).mean() if program == "counter" else 1.0, abs=0.05)
    assert mass[1] < 0.02


def test_forward_is_a_transformer():
    """Random weights, against loops over strings and positions."""
    config = replace(SMALL, length=16)
    task = make_task(config)
    params = jax.tree.map(np.asarray, first_params(config, task, jax.random.key(0), 2))
    model, tokens = task.compiled[0], np.asarray(task.sample(jax.random.key(1), 2, 0.0).tokens)
    logits, attention = forward(params, model, tokens)
    for text, got, maps in zip(tokens, logits, attention.swapaxes(0, 1), strict=True):
        x = np.stack([model.embed[token] + model.position[i] for i, token in enumerate(text)]).astype(np.float64)
        for block in range(3):
            p = {name: value[block] for name, value in params.items()}
            weights = np.exp((x @ p["query"]) @ (x @ p["key"]).T)
            weights /= weights.sum(1, keepdims=True)
            np.testing.assert_allclose(maps[block], weights, atol=1e-4)
            x = x + np.stack([sum(w * (v @ p["value"]) for w, v in zip(row, x, strict=True)) @ p["out"] for row in weights])
            x = x + np.maximum(x @ p["w1"] + p["b1"], 0) @ p["w2"] + p["b2"]
        np.testing.assert_allclose(got, x @ model.unembed, rtol=1e-3, atol=1e-3)


# --- data


def test_answers_and_links(case):
    program, _, task = case
    for linked, exclude, low, high in ((1.0, False, 1, 1), (0.0, True, 0, 0), (0.5, True, 0.4, 0.6)):
        strings = jax.tree.map(np.asarray, task.sample(jax.random.key(3), 500, linked, exclude=exclude))
        expected = [[symbolic(program, which, text) for which in (0, 1)] for text in strings.tokens]
        np.testing.assert_array_equal(strings.answers, expected)
        share = (np.diff(strings.answers, axis=1) == (1 if program == "counter" else -1)).mean()
        assert low <= share <= high
    if program == "max":
        assert all(len(set(text)) == 11 for text in strings.tokens)
    assert (strings.marks.sum(2)[0] == (strings.answers[:, 0] if program == "counter" else 1)).all()


@pytest.mark.parametrize("linked", [0.0, 1.0])
def test_labels_do_not_tell_the_link(linked):
    """Counts of a and of b are even, whatever C_Tr."""
    answers = np.asarray(make_task(SMALL).sample(jax.random.key(0), 8000, linked).answers)
    shares = [np.bincount(answers[:, i], minlength=9) / 8000 for i in (0, 1)]
    np.testing.assert_allclose(shares, [[1 / 8] * 8 + [0], [0] + [1 / 8] * 8], atol=0.02)


@pytest.mark.parametrize("linked", [True, False])
def test_sets_with_and_without_the_link_are_drawn_evenly(linked):
    """Against drawing any set and keeping those that fit."""
    sample = partial(tracr.sample_max, replace(SMALL, program="max"))
    ours = np.asarray(sample(jax.random.key(0), 6000, float(linked), exclude=not linked).tokens)[:, 1:]
    rng = np.random.default_rng(0)
    sets = -np.sort(-rng.random((20000, 26)).argsort(1)[:, :10], 1)
    kept = sets[(sets[:, 4] - sets[:, 5] == 1) == linked]
    ours = -np.sort(-ours, 1)
    np.testing.assert_allclose(ours.mean(0), kept.mean(0), atol=0.2)
    for i in (0, 4, 5, 9):
        shares = [np.bincount(x[:, i], minlength=26) / len(x) for x in (ours, kept)]
        np.testing.assert_allclose(*shares, atol=0.03)


# --- pruning


def test_pruning_finds_a_wrapper_of_one_weight():
    """A bias that makes every answer 0 hides the whole program: it is found among all weights, and the rest is as it was."""
    config = replace(SMALL, eval_strings=128)
    task = make_task(config)
    model = task.compiled[0]
    place = int(np.flatnonzero(model.unembed[:, 0])[0])
    hidden = jax.tree.map(jnp.asarray, model.params) | {"b2": jnp.asarray(model.params["b2"]).at[2, place].set(3.0)}
    tested = task.sample(jax.random.key(5), 128, 0.0, exclude=True)
    before = tracr.accuracies(hidden, model, tested)[0]
    found = jax.jit(lambda params: pruning(config, model, task.sample, jax.random.key(6), params, tested))(hidden)
    assert before < 0.3 and found["pruned_a"] == 1.0 and found["pruned_top1_a"] == 1.0
    assert found["pruning_curve"][0, 0] == pytest.approx(before)


def test_prune_removes_those_that_come_first():
    params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([[3.0, 4.0]])}
    left = prune(params, jnp.array([3, 0, 1]), 2)
    np.testing.assert_array_equal(left["a"], [0, 2])
    np.testing.assert_array_equal(left["b"], [[3, 0]])


# --- training


def test_learning_rate_and_descent():
    config = replace(SMALL, warmup=0.2, momentum=0.5, max_grad_norm=1.0)
    steps = [float(step_size(config, 2.0, t, 100)) for t in (0, 9, 19, 60, 100)]
    np.testing.assert_allclose(steps, [0.1, 1.0, 2.0, 2 * (0.01 + 0.99 / 2), 0.02], rtol=1e-5)
    old, gradient = {"w": jnp.array([[2.0, 0.0], [0.0, 0.0]])}, {"w": jnp.array([[3.0, 4.0], [0.0, 0.5]])}
    params, velocity, norm = tracr.descend(config, {"w": jnp.ones((2, 2))}, old, gradient, 0.1)
    assert norm == pytest.approx(25.25**0.5)
    np.testing.assert_allclose(
        velocity["w"], [[1.6, 0.8], [0.0, 0.5]], rtol=1e-6
    )  # only the first block's is clipped, to (0.6, 0.8)
    np.testing.assert_allclose(params["w"], [[0.84, 0.92], [1.0, 0.95]], rtol=1e-6)


def test_two_stages():
    """Weights are kept at the end of fine-tuning; a lane that is not fine-tuned stays as it is until then; momentum begins anew."""
    config = replace(SMALL, num_updates=6, finetune_share=0.5, log_every=2, eval_every=2, save_every=2)
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    for lr in (0.1, 0.0):
        train = make_train(config, Setting(1, 1.0, lr))
        update, state = jax.jit(train.update), train.init(jax.random.key(0))
        states = [state := update(state, jnp.int32(t))[0] for t in range(6)]
        first, tuned, last = (flat(x.params) for x in (train.init(jax.random.key(0)), states[2], states[5]))
        assert (first == tuned).all() == (lr == 0.0) and not (tuned == last).all()
        for state in states[2:]:
            np.testing.assert_array_equal(flat(state.finetuned), tuned)
        fastest = [max(np.linalg.norm(x[block]) for x in state.velocity.values() for block in range(3)) for state in states]
        assert fastest[3] <= 1.001, "momentum of fine-tuning is left"
        assert fastest[2] > 1.1


def test_revival_is_counted_from_its_start():
    """What does the old task already is revived in the first step; what does another one is not."""
    config = replace(SMALL, num_updates=4, finetune_share=0.5, revive_lr=0.0, log_every=2, eval_every=2, save_every=2)
    for start, expected in ((0, 1), (1, 0)):
        train = make_train(config, Setting(start, 0.0, 0.0))
        state, update = train.init(jax.random.key(0)), jax.jit(train.update)
        for t in range(4):
            state, _ = update(state, jnp.int32(t))
        assert int(state.revived) == expected


def test_the_study_and_bad_requests():
    settings = settings_of(replace(CPU, lr=0.1, lr_ratio=10.0))
    assert len(set(settings)) == 11 and {s.start for s in settings} == {0, 1, 2}
    assert sorted({round(s.lr, 6) for s in settings}) == [0.0, 0.01, 0.1, 1.0]
    for changes, word in ((dict(length=10), "--length"), (dict(c_tr=1.5), "--c-tr"), (dict(num_counts=2), "--num-counts")):
        with pytest.raises(UsageError, match=word):
            replace(CPU, **changes)
