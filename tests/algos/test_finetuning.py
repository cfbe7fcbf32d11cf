"""Fine-tuning's parts, beside numpy and plain loops."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algos.finetuning import (
    CPU,
    PAPER,
    PROTOCOLS,
    Config,
    accuracy,
    answer_loss,
    attention_maps,
    fit_probe,
    init_model,
    make_arms,
    make_baselines,
    make_models,
    make_train,
    points,
    predict,
    prune,
    row_scores,
    sample_arm,
    sample_protocol,
    sample_reverse,
    schedule,
    sequence_loss,
    steps_to,
    story_loss,
    transformer,
    wrapped,
    write_on,
)
from algos.finetuning import (
    test_questions as questions,
)
from common.runs.config import UsageError
from common.runs.programs import train_fn
from envs.pcfg import FIRST_FAMILY, FIRST_NUMBER, count, task_table
from envs.stories import EOS_STORY, PAD, STORY_SIZE, TOKEN, VOCABULARY, has_twist, sample_stories, story_prompt

SMALL = dict(width=8, layers=2, heads=2, length=16, window=6, occurrence=1, batch_size=8, eval_size=16, probe_size=16)
CONFIG = dataclasses.replace(CPU, **SMALL)


def model(seed=0):
    """A model whose biases and gains are not trivial."""
    params = init_model(jax.random.key(seed), CONFIG)
    keys = iter(jax.random.split(jax.random.key(seed + 1), 100))
    return jax.tree.map(lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape), params)


def in_numpy(params, tokens):
    """Logits (S, vocabulary) of one sequence, head by head and place by place."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    size, heads, wide = len(tokens), CONFIG.heads, CONFIG.width // CONFIG.heads
    norm = lambda x, g, b: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * g + b
    gelu = lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    x = p["token"][tokens] + p["position"][:size]
    for i in range(CONFIG.layers):
        w = {name: value[i] for name, value in p["blocks"].items()}
        qkv = norm(x, w["norm1"], w["norm1_b"]) @ w["qkv"] + w["qkv_b"]
        q, k, v = (qkv[:, j * CONFIG.width : (j + 1) * CONFIG.width] for j in range(3))
        read = np.zeros_like(q)
        for head, at in ((h, t) for h in range(heads) for t in range(size)):
            part = slice(head * wide, (head + 1) * wide)
            score = np.array([q[at, part] @ k[j, part] / math.sqrt(wide) for j in range(at + 1)])
            weight = np.exp(score - score.max())
            read[at, part] = weight / weight.sum() @ v[: at + 1, part]
        x = x + read @ w["proj"] + w["proj_b"]
        x = x + gelu(norm(x, w["norm2"], w["norm2_b"]) @ w["up"] + w["up_b"]) @ w["down"] + w["down_b"]
    return norm(x, p["norm"], p["norm_b"]) @ p["head"]


def cross_entropy(logits, label):
    return np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[label]


def test_transformer_and_losses_agree_with_numpy():
    params, tokens = model(), sample_reverse(jax.random.key(0), CONFIG)[:3]
    art = CONFIG.language.art
    every = [
        [cross_entropy(row, label) for row, label in zip(in_numpy(params, t[:-1]), t[1:], strict=True)] for t in np.asarray(tokens)
    ]
    every = np.array(every)
    expected = every.mean() + CONFIG.answer_weight * every[:, art].mean()
    assert float(sequence_loss(params, tokens, CONFIG)) == pytest.approx(expected, rel=1e-4)
    assert float(answer_loss(params, tokens, CONFIG)) == pytest.approx(every[:, art].mean(), rel=1e-4)


def test_accuracy_reads_the_answer_after_art():
    params = model()
    tokens = sample_reverse(jax.random.key(0), CONFIG)
    guessed = [in_numpy(params, np.asarray(t[: CONFIG.language.art + 1]))[-1].argmax() for t in tokens]
    half = tokens.at[:4, -2].set(jnp.array(guessed[:4])).at[4:, -2].set((jnp.array(guessed[4:]) + 1) % 20)
    assert float(accuracy(params, half, CONFIG)) == 0.5


def test_what_arms_are_taught():
    """C_Tr 1 links the labels to the number of a; wrong labels answer the question about a with the number of b."""
    config = dataclasses.replace(CONFIG, mixing=(0.5,), batch_size=64)
    language = config.language
    arm = dict(correlation=1.0, wrong=0.0, mixing=0.0, tasks=jnp.asarray(task_table((0, 0, 1))))
    tokens = sample_arm(jax.random.key(0), arm, config)
    text, labels = tokens[:, 5 : 5 + language.length], tokens[:, -2] - FIRST_NUMBER
    np.testing.assert_array_equal(labels, count(text, 0, language.window) + 1)
    assert (tokens[:, 1] == FIRST_FAMILY).all() and (tokens[:, 2] == 1).all()
    wrong = sample_arm(jax.random.key(0), arm | dict(wrong=1.0), config)
    assert (wrong[:, 2] == 0).all() and (wrong[:, -2] == tokens[:, -2]).all()
    mixed = sample_arm(jax.random.key(0), arm | dict(mixing=0.5), config)
    assert 10 < int((mixed[:, 2] != 1).sum()) < 54, "half of the questions are not pre-training's, about c or the token"


def test_scores_are_the_losss_slope_and_pruning_zeroes_the_highest():
    """A row scaled by 1 - e changes the loss by -e times its score; the rows of the highest scores go, and only they."""
    params, tokens = model(), questions(CONFIG)["a"]
    scores = row_scores(params, tokens, CONFIG)
    flat = sorted(
        ((float(scores[n][b, u]), n, b, u) for n in scores for b in range(2) for u in range(scores[n].shape[1])), reverse=True
    )
    _, name, block, unit = flat[0]
    shrunk = params["blocks"][name].at[block, :, unit].multiply(1 - 1e-2)
    change = answer_loss(params | {"blocks": params["blocks"] | {name: shrunk}}, tokens, CONFIG) - answer_loss(
        params, tokens, CONFIG
    )
    assert float(change) == pytest.approx(-1e-2 * flat[0][0], rel=0.1)
    pruned = prune(params, scores, 3)
    expected = {name: np.array(params["blocks"][name]) for name in scores}
    for _, name, block, unit in flat[:3]:
        expected[name][block, :, unit] = 0
    for name, value in pruned["blocks"].items():
        np.testing.assert_array_equal(value, expected.get(name, params["blocks"][name]))
    assert all(pruned[name] is params[name] for name in ("token", "position", "head"))


def test_a_probe_finds_what_is_linear_and_nothing_else():
    key_x, key_noise = jax.random.split(jax.random.key(0))
    x = jax.random.normal(key_x, (600, 6)) * jnp.array([1, 10, 1, 0.1, 1, 1]) + 3
    labels = (x[:, 3] > 3).astype(jnp.int32) + 2
    noise = jax.random.randint(key_noise, (600,), 0, 4)
    fit = jax.jit(lambda y: fit_probe(jax.random.key(1), x[:400], y[:400], x[400:], y[400:], 300, 5))
    assert float(fit(labels)) > 0.93
    assert float(fit(noise)) < 0.4


def test_attention_is_summed_over_letters_in_the_window():
    params, tokens = model(), questions(CONFIG)["a"]
    maps = attention_maps(params, tokens, CONFIG)
    _, _, attention = transformer(params, tokens[:, : CONFIG.language.art + 1], CONFIG)
    np.testing.assert_allclose(attention.sum(-1), 1, rtol=1e-5)
    expected = np.zeros((2, 2, 3))
    for n, row in enumerate(np.asarray(tokens)):
        for place in range(5 + 16 - 6, 5 + 16):
            expected[:, :, row[place]] += np.asarray(attention)[:, n, :, place] / len(tokens)
    np.testing.assert_allclose(maps["attention_letters"], expected, rtol=1e-4)
    np.testing.assert_allclose(maps["attention"].sum(-1), 1, rtol=1e-5)


def test_steps_to_a_bar():
    at = jnp.array([0, 10, 20, 40])
    assert float(steps_to(jnp.array([0.1, 0.5, 0.9, 1.0]), at, 0.7)) == pytest.approx(15)
    assert float(steps_to(jnp.array([0.1, 0.5, 0.5, 0.6]), at, 0.7)) == 40
    assert float(steps_to(jnp.array([0.8, 0.5, 0.9, 1.0]), at, 0.7)) == 0
    assert points(100, 2).tolist() == [0, 5, 10, 20, 40, 80, 100]


def test_learning_rates_rise_over_a_fifth_and_fall_to_a_hundredth():
    factors = [float(schedule(step, 100)) for step in (0, 9, 19, 20, 60, 100)]
    np.testing.assert_allclose(factors, [0.05, 0.5, 1, 1, 0.505, 0.01], rtol=1e-5)


def test_the_papers_arms():
    """5 priors x 5 C_Tr x 3 rates, 6 mixtures, 2 with wrong labels, 2 jailbreaks; reFT never learns faster than the fine-tuning."""
    arms = make_arms(PAPER)
    assert [sum(arm.name == name for arm in arms) for name in ("sweep", "mixing", "random labels", "jailbreak")] == [75, 6, 2, 2]
    assert all(arm.reverse_lr <= arm.lr for arm in arms)
    assert [run.name for run in make_baselines(PAPER)] == ["scratch + FT"] * 3 + ["scratch"]
    models = make_models(PAPER)
    assert [name for name, _, _ in models] == ["prior"] * 5 + ["jailbreak"] * 2 + ["only b"]
    assert models[-1][2][0].tolist() == [0, 1, 0] and all(models[arm.model][0] == "jailbreak" for arm in arms[-2:])
    assert arms[wrapped(PAPER)]._asdict() | dict(model=0, correlation=1.0, lr=1e-5) == arms[wrapped(PAPER)]._asdict()


# --- stories


STORIES = dataclasses.replace(CONFIG, data="stories", eval_stories=4, finetune_lrs=(1e-3,))


def test_stories_of_a_protocol():
    """F+RR: no Twist is told, half of the headers ask for one; twists: both always."""
    config = dataclasses.replace(STORIES, batch_size=64)
    draw = jax.jit(lambda protocol: sample_protocol(jax.random.key(0), protocol, config))
    for protocol, told, low, high in (("F+RR", 0, 20, 44), ("twists", 64, 64, 64)):
        tokens = draw(PROTOCOLS.index(protocol))
        asked = int((tokens[:, 2:12] == TOKEN["Twist"]).any(1).sum())
        assert int(has_twist(tokens).sum()) == told and low <= asked <= high


def test_loss_of_stories_passes_over_pad():
    params = init_model(jax.random.key(0), STORIES)
    tokens = sample_stories(jax.random.key(1), 2).tokens
    losses = [
        cross_entropy(row, label)
        for story in np.asarray(tokens)
        for row, label in zip(in_numpy(params, story[:-1]), story[1:], strict=True)
        if label != PAD
    ]
    assert len(losses) < 2 * (STORY_SIZE - 1)
    assert float(story_loss(params, tokens, STORIES)) == pytest.approx(np.mean(losses), rel=1e-4)


def test_a_model_writes_on_from_the_header_to_the_end():
    """A model that always says one word writes it after each header; one that always ends leaves PAD behind."""
    tokens = sample_stories(jax.random.key(2), 3, "twists").tokens
    params = jax.tree.map(jnp.zeros_like, init_model(jax.random.key(0), STORIES)) | {"norm_b": jnp.ones(STORIES.width)}
    begin = np.asarray(story_prompt(tokens))
    for said, after in ((TOKEN["kite"], TOKEN["kite"]), (EOS_STORY, PAD)):
        head = jnp.zeros((STORIES.width, len(VOCABULARY))).at[:, said].set(10.0)
        written = np.asarray(write_on(params | {"head": head}, jax.random.key(3), tokens, STORIES))
        for story, old, start in zip(written, np.asarray(tokens), begin, strict=True):
            np.testing.assert_array_equal(story[:start], old[:start])
            assert story[start] == said and (story[start + 1 :] == after).all()


def test_words_written_one_by_one_are_those_that_the_whole_story_makes_likeliest():
    tokens, params = sample_stories(jax.random.key(2), 3, "twists").tokens, init_model(jax.random.key(4), STORIES)
    params |= {"head": 1e4 * params["head"]}  # so that drawing takes the likeliest
    written = np.asarray(jax.jit(partial(write_on, config=STORIES))(params, jax.random.key(3), tokens))
    likeliest = np.asarray(predict(params, transformer(params, written, STORIES)[0]).argmax(-1))
    for story, best, start in zip(written, likeliest, np.asarray(story_prompt(tokens)), strict=True):
        end = next((i for i, word in enumerate(story) if word == EOS_STORY), STORY_SIZE - 1)
        assert end > start + 5
        np.testing.assert_array_equal(story[start : end + 1], best[start - 1 : end])


@pytest.mark.slow
def test_the_study_on_stories_fills_its_log():
    """Every number is measured, and the control is left alone until reFT."""
    config = dataclasses.replace(
        STORIES, layers=1, num_updates=6, pretrain_updates=2, finetune_updates=2, log_every=2, eval_every=2
    )
    train = make_train(dataclasses.replace(config, save_every=2, probe_updates=2))
    state, _ = jax.jit(train_fn(train))(jax.random.key(0))
    assert all((np.asarray(x) >= 0).all() and np.isfinite(x).all() for x in jax.tree.leaves(state.log))
    results = train.evaluate(state)
    assert results["finetune"].shape == (2, 3, 2) and results["reverse"].shape == (2, 4, 2)
    start, turn, end = np.asarray(state.log["tuned"][..., 1])  # losses on stories with a Twist, (points, runs)
    assert start[0] == start[1] == start[2] != start[3] == turn[3] != end[3]
    assert len(set(turn.tolist())) == 4 and results["twist_30_never"] == results["reverse"][-1, 3, 0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(priors=(0.6,)), "--priors"),
        (dict(num_updates=4000, pretrain_updates=4900), "leaves -1100 steps"),
        (dict(heads=5), "--width 48"),
        (dict(window=41), "--window 41"),
        (dict(correlations=(1.5,)), "--correlations"),
        (dict(finetune_lrs=()), "--finetune-lrs"),
        (dict(lr=0.0), "must be positive"),
    ],
)
def test_refuses_what_does_not_fit(changes, words):
    with pytest.raises(UsageError, match=words):
        dataclasses.replace(CPU, **changes)
    assert isinstance(CPU, Config)
