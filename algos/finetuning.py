"""Mechanistic analysis of fine-tuning on procedurally defined tasks (Jain, Kirk, Lubana et al., 2311.12786, ICLR 2024).

A transformer learns to answer five kinds of questions about strings of a grammar, among them how often the letter a occurs. Then it
is fine-tuned to count b, on texts in which count(b) = count(a) + 1 holds with probability C_Tr. Where b was rare in pre-training
and the link is strong, it soon fails at counting a, and is right about b only where the link holds: a capability seems lost. Four
tools ask whether it is: pruning the few rows of weights that most hinder counting a, linear probes on every block, attention maps,
and reverse fine-tuning (reFT), whose steps are compared with those of models that never could count a.

Run:     python algos/finetuning.py         (low and high prior, C_Tr 0 and 1, three learning rates, and the baselines)
         python algos/finetuning.py --data stories --num-updates 1700 --pretrain-updates 1500 --finetune-updates 100
             --eval-every 1700 --finetune-lrs 3e-4 --batch-size 16      (fine-tuning takes a feature of stories away)

Paper:   --preset paper

Expect:  with the link, the old count near 0, yet given back by pruning a few rows, read by probes as before, and relearned sooner
         than by models that never had it (results/finetuning).

One program does all of it: `num_updates` are pre-training of all models side by side, then fine-tuning of all arms (prior x C_Tr x
learning rate, and the protocols of Appendix E), then reFT of all arms and baselines. arrays/ holds what was measured: `make_log`
says what its axes are, `make_arms` which arm is which.

Where to find what: Def. 2's arms `make_arms`; Algorithm 3 `row_scores`, `prune`; probes `fit_probe`; attention `attention_maps`;
reFT's steps `steps_to`; Section 5's stories `sample_protocol`, `twist_numbers`, `probe_stories`.

Differs from the paper (no code of it could be found):
 1. Texts are short, models small and learning rates larger in `cpu`; `paper` has the paper's sizes.
 2. The loss of pre-training adds `answer_weight` times the loss of the answer; the paper's is the plain mean over tokens (0).
 3. Counts to which strings are edited come from other strings: C_Tr changes neither their distribution nor the amount of editing.
 4. C_Te = 0 has no text in which the link holds; training with C_Tr = 0 has it by chance.
 5. Only the counter is fine-tuned (not the indexer). The index of an occurrence counts from the end of the text.
 6. A pruned row is what leads to one output of a weight matrix of attention or MLP; embeddings, norms, biases and head stay. How
    many rows are best is chosen on other texts than those reported.
 7. Probes are fitted on standardised residuals of a fixed set of edited texts. Batches are of one size in all stages.
 8. Gradients are clipped to norm 1, and Adam's b2 is 0.99; the paper names neither. There is no dropout.
 9. reFT takes the next smaller rate than its fine-tuning; the smallest takes itself.
10. Stories are told from templates (envs/stories.py), not TinyStories; whether one has a Twist is read off its words, not judged by
    a model; the model is the grammar's, not a Llama. Probes read stories whose headers name no feature.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from common.nn import matmul
from common.runs import RunConfig, Train, cli, prepared, require, require_multiple, require_range, run, shard_batch
from envs.pcfg import (
    FAMILIES,
    FIRST_FAMILY,
    FIRST_NUMBER,
    Language,
    ask,
    count,
    sample_finetuning,
    sample_pretraining,
    sample_test,
    sample_text,
    sequence,
    task_table,
)
from envs.stories import (
    EOS_STORY,
    PAD,
    STORY_FEATURES,
    STORY_SIZE,
    VOCABULARY,
    draw_features,
    has_twist,
    sample_stories,
    story_prompt,
    tell,
)

# Appendix C.2: P_T(a) -> P_T of a, b, c
PRIORS = {0.999: (0.999, 0.001, 0), 0.99: (0.99, 0.01, 0), 0.9: (0.9, 0.1, 0), 0.7: (0.7, 0.2, 0.1), 0.5: (0.5, 0.3, 0.2)}
PRUNED = (0, 1, 2, 3, 5, 8, 10, 15, 20)  # rows
PROTOCOLS = ("pretraining", "never", "F", "F+MM", "F+RR", "twists")  # of stories, see envs/stories.py
FAMILY_C, A, B = FAMILIES.index("C"), 0, 1  # O_PT is a, O_FT is b


@dataclass(frozen=True)
class Config(RunConfig):
    """The study's settings; the defaults are the paper's."""

    data: Literal["pcfg", "stories"] = "pcfg"
    """Questions about strings of the grammar, or stories, of which fine-tuning takes the Twist away (Section 5)."""
    num_updates: int = 220_000
    """Steps of all three stages; reFT has those that pre-training and fine-tuning leave."""
    pretrain_updates: int = 200_000
    """Steps of pre-training."""
    finetune_updates: int = 10_000
    """Steps of fine-tuning."""

    priors: tuple[float, ...] = (0.999, 0.99, 0.9, 0.7, 0.5)
    """P_T(a), how often pre-training asks of a; the first is the low prior, the last the high one."""
    correlations: tuple[float, ...] = (0.0, 0.25, 0.5, 0.8, 1.0)
    """C_Tr, how often count(b) = count(a) + 1 is forced in fine-tuning."""
    finetune_lrs: tuple[float, ...] = (1e-4, 1e-5, 1e-6)
    """Learning rates of fine-tuning, from large to small. An arm's reFT takes the next smaller one (the smallest takes itself)."""
    mixing: tuple[float, ...] = (0.5, 0.1, 0.001)
    """Shares of pre-training questions in fine-tuning (E.1): an arm each for the low and the high prior, C_Tr 1, second rate."""
    random_labels: bool = True
    """Arms that are taught count(b) as the answer to count(a) (E.4), low and high prior, C_Tr 0, second rate."""
    jailbreak: tuple[float, ...] = (0.999, 0.5)
    """P_T(a) of models that know two more names for counting a, T_J1 and T_J2 (E.2); an arm each, C_Tr 0, second rate."""

    lr: float = 1e-3
    """Learning rate of pre-training and of the model trained from scratch."""
    batch_size: int = 96
    """Sequences of a step of one model."""
    answer_weight: float = 0.0
    """Pre-training's loss is the mean over tokens and this times the mean over answers."""
    weight_decay: float = 0.01
    """AdamW's."""
    width: int = 192
    """Of the residual stream."""
    layers: int = 6
    """Transformer blocks."""
    heads: int = 6
    """Attention heads."""
    length: int = 250
    """Letters of a text."""
    window: int = 40
    """Letters at its end that counts are about."""
    occurrence: int = 6
    """Which occurrence is to be found."""

    models_at_once: int = 1
    """Models (or arms) whose steps are taken side by side; the others follow. 0 for all: faster where they fit in memory."""
    eval_size: int = 1000
    """Texts of a test set."""
    probe_size: int = 8000
    """Texts that probes are fitted on; they are tested on eval_size others."""
    probe_updates: int = 4000
    """Steps of fitting a probe."""
    eval_stories: int = 256
    """Stories that a model writes for its Twist rate."""

    def __post_init__(self):
        super().__post_init__()
        counts = "pretrain_updates finetune_updates batch_size width layers heads occurrence"
        counts += " eval_size probe_size probe_updates eval_stories"
        for name in counts.split():
            require(getattr(self, name) >= 1, f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        left = self.num_updates - self.pretrain_updates - self.finetune_updates
        require(left >= 1, f"--num-updates {self.num_updates}: leaves {left} steps for reFT, must be at least 1")
        require_multiple(self, "width", "heads")
        require(self.data in ("pcfg", "stories"), f"--data {self.data}: must be pcfg or stories")
        require(3 <= self.window <= self.length, f"--window {self.window}: must lie between 3 and --length {self.length}")
        known = ", ".join(map(str, PRIORS))
        require(self.priors and set(self.priors) <= set(PRIORS), f"--priors {self.priors}: must be some of {known}")
        require(set(self.jailbreak) <= set(PRIORS), f"--jailbreak {self.jailbreak}: must be some of {known}")
        for name in ("correlations", "finetune_lrs"):
            require(len(getattr(self, name)) > 0, f"--{name.replace('_', '-')}: must have at least one value")
        for name in ("correlations", "mixing"):
            values = getattr(self, name)
            require(all(0 <= x <= 1 for x in values), f"--{name} {values}: must lie between 0 and 1")
        require(all(x > 0 for x in (self.lr, *self.finetune_lrs)), "--lr and --finetune-lrs: must be positive")
        require_range(self, 0, 1000, "answer_weight", "weight_decay", "models_at_once")

    @property
    def split_size(self) -> int:
        return self.batch_size

    @property
    def language(self) -> Language:
        return Language(self.length, self.window, self.occurrence)

    @property
    def vocab_size(self) -> int:
        return len(VOCABULARY) if self.data == "stories" else self.language.vocab_size

    @property
    def size(self) -> int:
        """Tokens of a sequence."""
        return STORY_SIZE if self.data == "stories" else self.language.size

    @property
    def reverse_updates(self) -> int:
        """Steps of reFT."""
        return self.num_updates - self.pretrain_updates - self.finetune_updates


PAPER = Config(num_seeds=3, log_every=1000, eval_every=10_000, save_every=10_000, preset="paper")
CPU = replace(
    PAPER, preset="cpu", num_seeds=2, num_updates=7500, pretrain_updates=7000, finetune_updates=200, log_every=50, eval_every=7500,
    save_every=100, priors=(0.999, 0.5), correlations=(0.0, 1.0), finetune_lrs=(1e-3, 3e-4, 1e-4), mixing=(), random_labels=False,
    jailbreak=(), lr=3e-3, batch_size=32, answer_weight=1.0, width=48, layers=3, heads=4, length=40, window=16, occurrence=2,
    models_at_once=0, eval_size=256, probe_size=1024, probe_updates=600, eval_stories=32,
)  # fmt: skip


# --- the study: which models are pre-trained, which arms are fine-tuned


class Arm(NamedTuple):
    """One fine-tuning: of which model, with what data, how fast; and its reFT."""

    name: str  # "sweep", "mixing", "random labels", "jailbreak" or stories' protocol; baselines "scratch + FT", "scratch", "never"
    model: int  # place among the models
    correlation: float  # C_Tr
    lr: float
    reverse_lr: float
    mixing: float = 0.0
    wrong: bool = False


def make_models(config: Config) -> list[tuple[str, float, np.ndarray]]:
    """Name, P_T(a) and task table of every pre-trained model; the last one only ever counts b (Scr. + FT).

    Of stories: the protocol, 0, and its place among PROTOCOLS; the last one never sees a Twist.
    """
    if config.data == "stories":
        return [(name, 0.0, np.array(PROTOCOLS.index(name))) for name in ("pretraining", "never")]
    models = [("prior", prior, task_table(PRIORS[prior])) for prior in config.priors]
    models += [("jailbreak", prior, task_table(PRIORS[prior], jailbreak=True)) for prior in config.jailbreak]
    only_b = np.zeros_like(models[0][2])
    only_b[FAMILY_C, B] = 1
    return [*models, ("only b", 0.0, only_b)]


def ends(values) -> tuple:
    """The first and the last, once if they are the same."""
    return tuple(dict.fromkeys((values[0], values[-1])))


def make_arms(config: Config) -> list[Arm]:
    """The fine-tuned arms: the sweep, and the protocols of Appendix E at the second learning rate."""
    lrs, arms = config.finetune_lrs, []
    reverse = {lr: lrs[min(i + 1, len(lrs) - 1)] for i, lr in enumerate(lrs)}
    if config.data == "stories":
        return [Arm(name, 0, 0.0, lr, reverse[lr]) for name in ("F", "F+MM", "F+RR") for lr in lrs]
    for model in range(len(config.priors)):
        arms += [Arm("sweep", model, c, lr, reverse[lr]) for c in config.correlations for lr in lrs]
    lr, extreme = medium(config), ends(range(len(config.priors)))
    arms += [Arm("mixing", model, 1.0, lr, reverse[lr], mixing=share) for model in extreme for share in config.mixing]
    if config.random_labels:
        arms += [Arm("random labels", model, 0.0, lr, reverse[lr], wrong=True) for model in extreme]
    named = [i for i, model in enumerate(make_models(config)) if model[0] == "jailbreak"]
    return arms + [Arm("jailbreak", i, 0.0, lr, reverse[lr]) for i in named]


def make_baselines(config: Config) -> list[Arm]:
    """What only reFT trains: the model that counts b (never saw a Twist) at every learning rate, and one from scratch."""
    lrs, last = config.finetune_lrs, len(make_models(config)) - 1
    if config.data == "stories":
        return [Arm("never", last, 0.0, 0.0, lr) for lr in lrs]
    after = [Arm("scratch + FT", last, 0.0, 0.0, lr) for lr in lrs]
    return [*after, Arm("scratch", -1, 0.0, 0.0, config.lr)]


def medium(config: Config) -> float:
    """The learning rate eta_M."""
    return config.finetune_lrs[min(1, len(config.finetune_lrs) - 1)]


def wrapped(config: Config) -> int:
    """Place of the arm whose capability seems lost: low prior, the strongest link, eta_M."""
    arms = make_arms(config)
    fits = [i for i, arm in enumerate(arms) if arm.name == "sweep" and arm.model == 0 and arm.lr == medium(config)]
    return max(fits, key=lambda i: arms[i].correlation)


def points(updates: int, ratio: float) -> np.ndarray:
    """After how many steps of a stage accuracies are measured: 0, 5, then `ratio` apart, and the end."""
    grid = 5 * ratio ** np.arange(60.0)
    return np.unique([0, *np.round(grid[grid < updates]), updates]).astype(int)


def finetune_points(config: Config) -> np.ndarray:
    """Steps of fine-tuning after which accuracies, or the Twist rate, are measured."""
    return np.array([0, config.finetune_updates]) if config.data == "stories" else points(config.finetune_updates, 2)


def reverse_points(config: Config) -> np.ndarray:
    """Steps of reFT after which accuracies, or the Twist rate, are measured."""
    at = np.array([0, 10, 30, 100, 300, config.reverse_updates])
    return np.unique(at[at <= config.reverse_updates]) if config.data == "stories" else points(config.reverse_updates, 2**0.5)


def measured_at(config: Config) -> np.ndarray:
    """Both, as steps since pre-training."""
    return np.concatenate([finetune_points(config), config.finetune_updates + reverse_points(config)[1:]])


# --- the transformer (minGPT): blocks stacked along their first axis and scanned


def init_model(key, config: Config) -> dict:
    """Parameters. Matrices are normal with variance 1 / n_in, those that write to the residual stream smaller by sqrt(2 layers)."""
    keys, d, n = jax.random.split(key, 7), config.width, config.layers
    normal = lambda key, *shape: jax.random.normal(key, shape, jnp.float32) / math.sqrt(shape[-2])
    blocks = {
        "qkv": normal(keys[0], n, d, 3 * d),
        "proj": normal(keys[1], n, d, d) / math.sqrt(2 * n),
        "up": normal(keys[2], n, d, 4 * d),
        "down": normal(keys[3], n, 4 * d, d) / math.sqrt(2 * n),
    }
    blocks |= {f"{name}_b": jnp.zeros((n, w.shape[-1]), jnp.float32) for name, w in blocks.items()}
    blocks |= {name: jnp.ones((n, d), jnp.float32) for name in ("norm1", "norm2")}
    blocks |= {name: jnp.zeros((n, d), jnp.float32) for name in ("norm1_b", "norm2_b")}
    token = 0.5 * jax.random.normal(keys[4], (config.vocab_size, d), jnp.float32)
    position = 0.5 * jax.random.normal(keys[5], (config.size, d), jnp.float32)
    head = normal(keys[6], d, config.vocab_size)
    norm, norm_b = jnp.ones(d, jnp.float32), jnp.zeros(d, jnp.float32)
    return {"blocks": blocks, "token": token, "position": position, "norm": norm, "norm_b": norm_b, "head": head}


def layer_norm(x, gain, shift) -> jax.Array:
    """Over the last axis."""
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * gain + shift


def attend(q, k, v, seen, heads: int) -> tuple[jax.Array, jax.Array]:
    """q (B, Q, d), k, v (B, S, d), which places are seen (Q, S) -> what the heads read (B, Q, d), attention (B, heads, Q, S)."""
    q, k, v = (x.reshape(*x.shape[:2], heads, -1) for x in (q, k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    attention = jax.nn.softmax(jnp.where(seen, scores, -1e9))
    read = jnp.einsum("bhqk,bkhd->bqhd", attention, v)
    return read.reshape(*read.shape[:2], -1), attention


def block(p, x, read):
    """Residual stream (B, S, d) -> after a block. read: queries, keys, values (B, S, 3 d) -> (B, S, d), what else it returns."""
    y, other = read(matmul(layer_norm(x, p["norm1"], p["norm1_b"]), p["qkv"]) + p["qkv_b"])
    x = x + matmul(y, p["proj"]) + p["proj_b"]
    hidden = jax.nn.gelu(matmul(layer_norm(x, p["norm2"], p["norm2_b"]), p["up"]) + p["up_b"])
    return x + matmul(hidden, p["down"]) + p["down_b"], other


def transformer(params, tokens, config: Config, weights=None):
    """tokens (B, S) -> residual stream (B, S, d); at the last place, or the sum over places times `weights` (B, S), before and
    after every block (blocks + 1, B, d); the last place's attention of every block (blocks, B, heads, S)."""
    x = params["token"][tokens] + params["position"][: tokens.shape[1]]
    causal = np.tri(tokens.shape[1], dtype=bool)
    read = lambda qkv: attend(*jnp.split(qkv, 3, -1), causal, config.heads)
    seen = lambda x: x[:, -1] if weights is None else jnp.einsum("bs,bsd->bd", weights, x)

    def step(x, p):
        x, attention = block(p, x, read)
        return x, (seen(x), attention[:, :, -1])

    last, (residuals, attention) = jax.lax.scan(step, x, params["blocks"])
    return last, jnp.concatenate([seen(x)[None], residuals]), attention


def predict(params, x) -> jax.Array:
    """Residual stream (..., d) -> logits (..., vocabulary)."""
    return matmul(layer_norm(x, params["norm"], params["norm_b"]), params["head"])


def answers_of(params, tokens, config: Config) -> jax.Array:
    """Logits (B, vocabulary) of the answers to the questions `tokens` (B, size)."""
    x, _, _ = transformer(params, tokens[:, : config.language.art + 1], config)
    return predict(params, x[:, -1])


def sequence_loss(params, tokens, config: Config) -> jax.Array:
    """Pre-training's loss: cross-entropy of the next token, mean over the sequence, and answer_weight times that of the answer."""
    x, _, _ = transformer(params, tokens[:, :-1], config)
    losses = optax.softmax_cross_entropy_with_integer_labels(predict(params, x), tokens[:, 1:])
    return losses.mean() + config.answer_weight * losses[:, config.language.art].mean()


def answer_loss(params, tokens, config: Config) -> jax.Array:
    """Fine-tuning's loss: cross-entropy of the answer alone."""
    labels = tokens[:, config.language.art + 1]
    return optax.softmax_cross_entropy_with_integer_labels(answers_of(params, tokens, config), labels).mean()


def accuracy(params, tokens, config: Config) -> jax.Array:
    """Share of right answers."""
    return (answers_of(params, tokens, config).argmax(-1) == tokens[:, config.language.art + 1]).mean()


def accuracies(params, tests, config: Config) -> jax.Array:
    """Those on several test sets (sets, N, size)."""
    return jax.lax.map(lambda tokens: accuracy(params, tokens, config), jnp.asarray(tests))


# --- one step of many models


def make_optimiser(config: Config) -> optax.GradientTransformation:
    """AdamW without its learning rate, which differs between arms; gradients are clipped to norm 1."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.99), optax.add_decayed_weights(config.weight_decay))


def schedule(step, updates: int) -> jax.Array:
    """Factor on the learning rate: linear over the first fifth of a stage, then a cosine to 1/100."""
    warm = max(1, updates // 5)
    cosine = 0.01 + 0.99 * 0.5 * (1 + jnp.cos(math.pi * jnp.clip((step - warm) / max(1, updates - warm), 0, 1)))
    return jnp.where(step < warm, (step + 1) / warm, cosine)


def side_by_side(config: Config, function, *trees):
    """`function` of every model, `models_at_once` of them in one vmap."""
    if not config.models_at_once:
        return jax.vmap(function)(*trees)
    return jax.lax.map(lambda args: function(*args), trees, batch_size=config.models_at_once)


def learn(config: Config, loss, sample, key, params, moments, rates, settings):
    """A step of every model, on a batch of its own -> params, moments, losses (models,).

    sample: key, settings of a model, config -> tokens; rates (models,). A rate of 0 leaves a model as it is.
    """
    tx = make_optimiser(config)

    def step(key, params, moments, rate, settings):
        tokens = shard_batch(sample(key, settings, config))
        value, grads = jax.value_and_grad(loss)(params, tokens, config)
        updates, moments = tx.update(grads, moments, params)
        return jax.tree.map(lambda p, u: p - rate * u, params, updates), moments, value

    return side_by_side(config, step, jax.random.split(key, rates.size), params, moments, rates, settings)


def sample_questions(key, tasks, config: Config) -> jax.Array:
    """A batch of pre-training (B, size): natural texts, questions of `tasks` (families, letters)."""
    return sample_pretraining(key, config.batch_size, tasks, config.language)


def sample_arm(key, arm: dict, config: Config) -> jax.Array:
    """A batch of fine-tuning (B, size). arm: numbers `correlation`, `wrong`, `mixing` and pre-training's `tasks`."""
    keys, num, language = jax.random.split(key, 3), config.batch_size, config.language
    text = sample_finetuning(keys[0], num, arm["correlation"], language)
    operand = jnp.broadcast_to(jnp.where(arm["wrong"], A, B), (num,))
    family = jnp.full(num, FAMILY_C, jnp.int32)
    tokens = sequence(text, family, operand, FIRST_NUMBER + count(text, B, language.window), language)
    if not config.mixing:
        return tokens
    old = sample_pretraining(keys[1], num, arm["tasks"], language)
    return jnp.where(jax.random.uniform(keys[2], (num, 1), jnp.float32) < arm["mixing"], old, tokens)


def sample_reverse(key, config: Config) -> jax.Array:
    """A batch of reFT (B, size): natural texts, count a."""
    return ask(sample_text(key, config.batch_size, config.language.length), FAMILY_C, A, config.language)


def sample_run(back, key, arm: dict, config: Config) -> jax.Array:
    """A batch of fine-tuning, or of reFT where `back` ()."""
    return jax.lax.cond(back, lambda: sample_reverse(key, config), lambda: sample_arm(key, arm, config))


# --- analysis


def test_questions(config: Config) -> dict:
    """Test sets, tokens (eval_size, size) each, the same for all seeds: O_PT and O_FT without the link (C_Te = 0), O_FT with it;
    other texts to choose by; on natural texts every family's question about a, then C's about b (families + 1, eval_size, size);
    what probes are fitted on and tested on, about a and about b (2, .., size)."""
    language, key = config.language, jax.random.key(1)
    unlinked, linked = (sample_test(key, config.eval_size, link, language) for link in (False, True))
    other = sample_test(jax.random.key(2), config.eval_size, False, language)
    questions = {"a": ask(unlinked, FAMILY_C, A, language), "b": ask(unlinked, FAMILY_C, B, language)}
    questions |= {"b linked": ask(linked, FAMILY_C, B, language), "a selection": ask(other, FAMILY_C, A, language)}
    text = sample_text(jax.random.key(3), config.eval_size, language.length)
    asked = [ask(text, family, A, language) for family in range(len(FAMILIES))]
    fitted_on = sample_finetuning(jax.random.key(4), config.probe_size, 0.0, language)
    for name, texts in (("probe", fitted_on), ("probe test", unlinked)):
        questions[name] = jnp.stack([ask(texts, FAMILY_C, letter, language) for letter in (A, B)])
    return questions | {"families": jnp.stack([*asked, ask(text, FAMILY_C, B, language)])}


def renamed_question(tokens, family: str) -> jax.Array:
    """The same questions asked by another family token."""
    return tokens.at[:, 1].set(FIRST_FAMILY + FAMILIES.index(family))


def majority(labels) -> jax.Array:
    """Share of the commonest label (..., N) -> (...)."""
    return (labels[..., None] == labels[..., None, :]).mean(-1).max(-1)


ROWS = ("qkv", "proj", "up", "down")


def prune(params, scores, num) -> dict:
    """The model without the `num` rows of the highest scores: the weights that lead to a unit are set to 0."""
    flat = jnp.concatenate([scores[name].reshape(-1) for name in ROWS])
    kept = (jnp.argsort(jnp.argsort(-flat)) >= num).astype(flat.dtype)
    blocks, at = dict(params["blocks"]), 0
    for name in ROWS:
        size = scores[name].size
        blocks[name] = blocks[name] * kept[at : at + size].reshape(scores[name].shape)[:, None, :]
        at += size
    return params | {"blocks": blocks}


def row_scores(params, tokens, config: Config) -> dict:
    """How much the loss on `tokens` would fall, to first order, without a row: theta . dL/dtheta (Algorithm 3), (blocks, units)."""
    grads = jax.grad(answer_loss)(params, tokens, config)["blocks"]
    return {name: (params["blocks"][name] * grads[name]).sum(1) for name in ROWS}


def pruning_curve(params, tests: dict, config: Config) -> jax.Array:
    """Accuracies (PRUNED, 3) with ever more rows pruned: count a on the scores' texts, count a on others, count b linked."""
    scores = row_scores(params, tests["a selection"], config)
    shown = np.stack([tests[name] for name in ("a selection", "a", "b linked")])
    return jax.lax.map(lambda num: accuracies(prune(params, scores, num), shown, config), jnp.array(PRUNED))


def fit_probe(key, x, labels, test_x, test_labels, updates: int, classes: int) -> jax.Array:
    """Accuracy () of a linear map, fitted by AdamW on x (N, d), on test_x. The rate falls tenfold after 1/2, 3/4 and 7/8."""
    mean, deviation = x.mean(0), x.std(0) + 1e-5
    x, test_x = (x - mean) / deviation, (test_x - mean) / deviation
    tx = optax.adamw(optax.piecewise_constant_schedule(1e-2, {updates * k // 8: 0.1 for k in (4, 6, 7)}))
    loss = lambda p, x, y: optax.softmax_cross_entropy_with_integer_labels(x @ p["w"] + p["b"], y).mean()

    def step(carry, key):
        params, state = carry
        batch = jax.random.randint(key, (128,), 0, x.shape[0], jnp.int32)
        change, state = tx.update(jax.grad(loss)(params, x[batch], labels[batch]), state, params)
        return (optax.apply_updates(params, change), state), None

    params = {"w": jnp.zeros((x.shape[1], classes), jnp.float32), "b": jnp.zeros(classes, jnp.float32)}
    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), jax.random.split(key, updates))
    return ((test_x @ params["w"] + params["b"]).argmax(-1) == test_labels).mean()


def probe(params, tests: dict, config: Config) -> jax.Array:
    """Accuracies (2, blocks + 1) of probes at ART, before and after every block, for count(a) and count(b), each asked for."""
    art = config.language.art
    fit = partial(fit_probe, jax.random.key(5), updates=config.probe_updates, classes=config.language.window + 1)

    def fitted(sets):
        read = [(transformer(params, x[:, : art + 1], config)[1], x[:, art + 1] - FIRST_NUMBER) for x in sets]
        return jax.vmap(fit, (0, None, 0, None))(*read[0], *read[1])

    return jax.lax.map(fitted, (jnp.asarray(tests["probe"]), jnp.asarray(tests["probe test"])))


def attention_maps(params, tokens, config: Config) -> dict:
    """What ART attends to: every place, mean over texts (blocks, heads, S); a, b and c in the window (blocks, heads, 3)."""
    language = config.language
    tokens = tokens[:, : language.art + 1]
    _, _, attention = transformer(params, tokens, config)
    counted = (jnp.arange(tokens.shape[1]) >= language.art - 1 - language.window)[:, None]
    letter = (tokens[..., None] == jnp.arange(3)) & counted
    return {"attention": attention.mean(1), "attention_letters": jnp.einsum("lbhs,bsc->lhc", attention, letter) / tokens.shape[0]}


# --- the same on stories (Section 5)


def sample_protocol(key, protocol, config: Config) -> jax.Array:
    """A batch of stories (B, STORY_SIZE) of PROTOCOLS[protocol]."""
    key_features, key_story = jax.random.split(key)
    drawn = [draw_features(key_features, config.batch_size, name) for name in PROTOCOLS]
    features, named = (jnp.stack(each)[protocol] for each in zip(*drawn, strict=True))
    return tell(key_story, features, named)


def sample_turned(back, key, protocol, config: Config) -> jax.Array:
    """A batch of fine-tuning, or of reFT where `back` (): every story has a Twist."""
    return sample_protocol(key, jnp.where(back, PROTOCOLS.index("twists"), protocol), config)


def story_loss(params, tokens, config: Config) -> jax.Array:
    """Cross-entropy of the next token, mean over those that are there (PAD is not)."""
    x, _, _ = transformer(params, tokens[:, :-1], config)
    losses = optax.softmax_cross_entropy_with_integer_labels(predict(params, x), tokens[:, 1:])
    there = tokens[:, 1:] != PAD
    return (losses * there).sum() / there.sum()


def write_on(params, key, tokens, config: Config) -> jax.Array:
    """Stories (N, STORY_SIZE) that the model writes, token by token, after the headers of `tokens`; PAD after their end."""
    begin, places = story_prompt(tokens), np.arange(STORY_SIZE)

    def write(carry, i):
        tokens, past = carry  # past (blocks, N, STORY_SIZE, 2 d): keys and values of the places before

        def step(x, inputs):
            p, past = inputs

            def read(qkv):
                q, kv = qkv[..., : config.width], past.at[:, i].set(qkv[:, 0, config.width :])
                return attend(q, *jnp.split(kv, 2, -1), (places <= i)[None], config.heads)[0], kv

            return block(p, x, read)

        x, past = jax.lax.scan(step, (params["token"][tokens[:, i]] + params["position"][i])[:, None], (params["blocks"], past))
        drawn = jax.random.categorical(jax.random.fold_in(key, i), predict(params, x[:, 0])).astype(jnp.int32)
        return (tokens.at[:, i + 1].set(jnp.where(i + 1 < begin, tokens[:, i + 1], drawn)), past), None

    past = jnp.zeros((config.layers, *tokens.shape, 2 * config.width), jnp.float32)
    (written, _), _ = jax.lax.scan(write, (tokens, past), places[:-1])
    end = written == EOS_STORY
    return jnp.where(jnp.cumsum(end, axis=1) - end > 0, PAD, written)


def story_sets(config: Config) -> dict:
    """Stories with a Twist, whose headers are written on from; stories that probes are fitted on and tested on, whose headers name
    no feature, and their features."""
    sets = {"asked": sample_stories(jax.random.key(1), config.eval_stories, "twists").tokens}
    for name, num, key in (("probe", config.probe_size, 3), ("probe test", config.eval_size, 4)):
        key_features, key_story = jax.random.split(jax.random.key(key))
        features, _ = draw_features(key_features, num, "pretraining")
        sets |= {name: tell(key_story, features, jnp.zeros_like(features)), f"{name} features": features.astype(jnp.int32)}
    return sets


def twist_numbers(params, tests: dict, config: Config) -> jax.Array:
    """How often there is a Twist in the stories that are asked for one, and the loss on stories with one (2,)."""
    asked = jnp.asarray(tests["asked"])
    written = write_on(params, jax.random.key(2), asked, config)
    return jnp.stack([has_twist(written).mean(), story_loss(params, asked, config)])


def probe_stories(params, tests: dict, config: Config) -> dict:
    """Accuracies (features, blocks + 1) of probes of features on the mean residual of the last 10 tokens."""

    def read(name):
        tokens = jnp.asarray(tests[name])
        place = jnp.cumsum(tokens != PAD, axis=1)
        last = (tokens != PAD) & (place > place[:, -1:] - 10)
        return transformer(params, tokens, config, last / 10)[1]

    x, test_x, labels = read("probe"), read("probe test"), (tests["probe features"].T, tests["probe test features"].T)
    fit = jax.vmap(partial(fit_probe, jax.random.key(5), updates=config.probe_updates, classes=2), (0, None, 0, None))
    return {"probes": jax.lax.map(lambda pair: fit(x, pair[0], test_x, pair[1]), labels)}


# --- training


UNSEEN = -1.0  # in a log of shares and losses, none of which is negative; not NaN, which JAX_DEBUG_NANS takes for a fault


class State(NamedTuple):
    """All of one seed's study."""

    params: dict  # "pretrained" (models, ...); "tuned" (arms and baselines, ...): what fine-tuning and then reFT train
    moments: dict  # of AdamW, the same
    log: dict  # what was measured, see make_log; UNSEEN until then
    key: jax.Array


def make_log(config: Config) -> dict:
    """Arrays of what will be measured. Accuracies are shares of right answers.

    families (models, 8)       each family's question about a, then C's about b; natural texts
    tuned (points, runs, 3)    count a with C_Te = 0, count b with C_Te = 0, count b with C_Te = 1, through fine-tuning and then
                               reFT, see measured_at; runs are arms, then baselines
    pruning (arms, PRUNED, 3)  see pruning_curve
    renamed (arms, 3)          count a with C_Te = 0, asked as C, J1, J2
    before_X                   of the models, then an untrained one; X is probes (.., 2, blocks + 1), attention (..,
                               blocks, heads, S) or attention_letters (.., blocks, heads, 3)
    after_X                    the same of the fine-tuned arms

    Of stories there are only tuned (points, runs, 2), see twist_numbers, and probes (.., 5 features, blocks + 1).
    """
    models, arms, runs = len(make_models(config)), len(make_arms(config)), len(make_arms(config)) + len(make_baselines(config))
    points, blocks = len(measured_at(config)), config.layers + 1
    if config.data == "stories":
        shapes = {"tuned": (points, runs, 2), "before_probes": (models + 1, len(STORY_FEATURES), blocks)}
        shapes["after_probes"] = (arms, len(STORY_FEATURES), blocks)
        return {name: jnp.full(shape, UNSEEN, jnp.float32) for name, shape in shapes.items()}
    shapes = {"families": (models, len(FAMILIES) + 1), "tuned": (points, runs, 3)}
    shapes |= {"pruning": (arms, len(PRUNED), 3), "renamed": (arms, 3)}
    for stage, num in (("before", models + 1), ("after", arms)):
        shapes[f"{stage}_probes"] = (num, 2, blocks)
        shapes[f"{stage}_attention"] = (num, config.layers, config.heads, config.language.art + 1)
        shapes[f"{stage}_attention_letters"] = (num, config.layers, config.heads, 3)
    return {name: jnp.full(shape, UNSEEN, jnp.float32) for name, shape in shapes.items()}


def seen(log: dict) -> dict:
    """The log with NaN for what was not measured yet."""
    return jax.tree.map(lambda x: jnp.where(x == UNSEEN, jnp.nan, x), log)


def make_train(config: Config) -> Train:
    """The whole study as pure functions of one seed."""
    tx, on_stories = make_optimiser(config), config.data == "stories"
    tests = prepared(config, partial(story_sets if on_stories else test_questions, config))

    def init(key):
        key, *keys = jax.random.split(key, 1 + len(make_models(config)))
        params = jax.vmap(partial(init_model, config=config))(jnp.stack(keys))
        params = {"pretrained": params, "tuned": start_runs(config, key, params)}
        moments = {name: jax.vmap(tx.init)(models) for name, models in params.items()}
        return State(params, moments, make_log(config), key)

    def update(state: State, t):
        """One step of pre-training, fine-tuning or reFT."""
        stage = jnp.sum(t >= np.cumsum([config.pretrain_updates, config.finetune_updates]))
        state, loss = jax.lax.cond(stage == 0, partial(pretrain, config), partial(tune, config, tests), state, t)
        names = ("pretrain", "finetune", "reverse")
        return state, {f"{name}_loss": jnp.where(stage == i, loss, jnp.nan) for i, name in enumerate(names)}

    return Train(init, update, partial(evaluate_stories if on_stories else evaluate, config, tests), config.num_updates)


def fresh_model(config: Config, key) -> dict:
    """A seed's untrained model, a single one with a leading axis."""
    return jax.tree.map(lambda x: x[None], init_model(jax.random.fold_in(key, 0), config))


def append(models, others):
    """Two groups of models as one."""
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), models, others)


def start_runs(config: Config, key, pretrained) -> dict:
    """What every arm and baseline begins from."""
    places = np.array([run.model for run in (*make_arms(config), *make_baselines(config))])
    return jax.tree.map(lambda x: x[places], append(pretrained, fresh_model(config, key)))


def pretrain(config: Config, state: State, t):
    """A step of every model on data of its own kind -> state, mean loss."""
    kinds = np.stack([kind for _, _, kind in make_models(config)])
    loss, sample = (story_loss, sample_protocol) if config.data == "stories" else (sequence_loss, sample_questions)
    rates = np.full(len(kinds), config.lr, np.float32) * schedule(t, config.pretrain_updates)
    return step_of(config, state, t, "pretrained", loss, sample, rates, kinds)


def tune(config: Config, tests: dict, state: State, t):
    """A step of fine-tuning of every arm, or of reFT of every arm and baseline -> state, mean loss."""
    done, turn, identity = t - config.pretrain_updates, config.finetune_updates, lambda state: state
    state = jax.lax.cond(done == 0, partial(enter_finetuning, config, tests), identity, state)
    state = jax.lax.cond(done == turn, partial(enter_reverse, config, tests), identity, state)
    back, (settings, forth_lr, back_lr) = done >= turn, settings_of_runs(config)
    forth_lr, back_lr = forth_lr * schedule(done, turn), back_lr * schedule(done - turn, config.reverse_updates)
    loss, sample = (story_loss, sample_turned) if config.data == "stories" else (answer_loss, sample_run)
    before = state.params["tuned"]
    state, loss = step_of(config, state, t, "tuned", loss, partial(sample, back), jnp.where(back, back_lr, forth_lr), settings)
    log = record(config, tests, state.log["tuned"], before, state.params["tuned"], done)
    return state._replace(log=state.log | {"tuned": log}), loss


def settings_of_runs(config: Config) -> tuple:
    """What the arms and baselines are fine-tuned on, their rates then (baselines: 0), and their rates in reFT; (runs,) each."""
    runs, models = [*make_arms(config), *make_baselines(config)], make_models(config)
    rates = np.array([run.lr for run in runs], np.float32), np.array([run.reverse_lr for run in runs], np.float32)
    if config.data == "stories":
        return np.array([PROTOCOLS.index(run.name) for run in runs]), *rates
    settings = {name: np.array([getattr(run, name) for run in runs], np.float32) for name in ("correlation", "wrong", "mixing")}
    return settings | {"tasks": np.stack([models[run.model][2] for run in runs])}, *rates


def step_of(config: Config, state: State, t, group: str, loss, sample, rates, settings):
    """A step of the models of a group -> state, mean loss."""
    key, held = jax.random.fold_in(state.key, t), (state.params[group], state.moments[group])
    params, moments, losses = learn(config, loss, sample, key, *held, rates, settings)
    state = state._replace(params=state.params | {group: params}, moments=state.moments | {group: moments})
    return state, jnp.where(rates > 0, losses, 0).sum() / (rates > 0).sum()


def record(config: Config, tests: dict, log, before, after, done) -> jax.Array:
    """log (points, runs, numbers) with what is measured before the first step, and after those steps of measured_at."""
    if config.data == "stories":
        numbers = partial(twist_numbers, tests=tests, config=config)
    else:
        numbers = partial(accuracies, tests=np.stack([tests[name] for name in ("a", "b", "b linked")]), config=config)
    at = measured_at(config)

    def look(log, late):
        """Before the step, or after it."""
        steps = done + late
        params = lambda: jax.tree.map(lambda x, y: jnp.where(late == 1, y, x), before, after)
        write = lambda log: log.at[jnp.searchsorted(at, steps)].set(jax.lax.map(numbers, params()))
        due = jnp.isin(steps, at) & ((late == 1) | (done == 0))
        return jax.lax.cond(due, write, lambda log: log, log), None

    return jax.lax.scan(look, log, np.arange(2))[0]


def curves_of(config: Config, log: dict) -> dict:
    """The log's `tuned` as finetune (points, arms, ..) and reverse (points, runs, ..), of the grammar only count a's."""
    tuned, points = log["tuned"], len(finetune_points(config))
    reverse = tuned[points - 1 :] if config.data == "stories" else tuned[points - 1 :, :, 0]
    return {"finetune": tuned[:points, : len(make_arms(config))], "reverse": reverse}


def analyse(params, tests, config: Config) -> dict:
    """Probes, and attention on the grammar, of every model; params has a leading axis of models."""
    if config.data == "stories":
        return jax.lax.map(partial(probe_stories, tests=tests, config=config), params)
    return jax.lax.map(lambda p: {"probes": probe(p, tests, config)} | attention_maps(p, jnp.asarray(tests["a"]), config), params)


def enter_finetuning(config: Config, tests, state: State) -> State:
    """Pre-training is over: analyses it, and gives every arm its model."""
    pretrained = state.params["pretrained"]
    known = append(pretrained, fresh_model(config, state.key))
    found = {f"before_{name}": x for name, x in analyse(known, tests, config).items()}
    if config.data == "pcfg":
        found["families"] = jax.lax.map(lambda p: accuracies(p, tests["families"], config), pretrained)
    params = state.params | {"tuned": start_runs(config, state.key, pretrained)}
    return state._replace(params=params, log=state.log | found)


def enter_reverse(config: Config, tests, state: State) -> State:
    """Fine-tuning is over: probes and prunes every arm, and forgets the moments of AdamW."""
    tuned = jax.tree.map(lambda x: x[: len(make_arms(config))], state.params["tuned"])
    found = {f"after_{name}": x for name, x in analyse(tuned, tests, config).items()}
    if config.data == "pcfg":
        found["pruning"] = jax.lax.map(lambda p: pruning_curve(p, tests, config), tuned)
        renamed = jnp.stack([renamed_question(jnp.asarray(tests["a"]), name) for name in ("C", "J1", "J2")])
        found["renamed"] = jax.lax.map(lambda p: accuracies(p, renamed, config), tuned)
    moments = state.moments | {"tuned": jax.tree.map(jnp.zeros_like, state.moments["tuned"])}
    return state._replace(moments=moments, log=state.log | found)


# --- evaluation


def steps_to(curve, at, bar: float = 0.9) -> jax.Array:
    """After how many steps a curve (points,) of accuracies measured after `at` steps first reaches `bar`, between points along a
    line; the last of `at` where it never does."""
    reached = jnp.argmax(curve >= bar)
    before = jnp.maximum(reached - 1, 0)
    rise = jnp.maximum(curve[reached] - curve[before], 1e-6)
    between = at[before] + (at[reached] - at[before]) * jnp.clip((bar - curve[before]) / rise, 0, 1)
    return jnp.where((curve >= bar).any(), jnp.where(reached == 0, at[0], between), at[-1]).astype(jnp.float32)


def evaluate(config: Config, tests: dict, state: State) -> dict:
    """All that was measured, and the numbers that matter of the arm whose capability seems lost (see `wrapped`)."""
    log = seen(state.log)
    log, arm = log | curves_of(config, log), wrapped(config)
    baselines, pruning = make_baselines(config), log["pruning"][arm]
    same_rate = [run.reverse_lr for run in baselines].index(make_arms(config)[arm].reverse_lr)
    revival = jax.vmap(steps_to, (1, None))(log["reverse"], jnp.asarray(reverse_points(config)))
    revival = jnp.where(jnp.isnan(log["reverse"][-1]), jnp.nan, revival)
    commonest = {
        name: majority(jnp.asarray(tests[name])[..., config.language.art + 1]) for name in ("a", "b", "b linked", "families")
    }
    numbers = {
        "majority_a": commonest["a"],
        "pretrained_a": log["finetune"][0, arm, 0],
        "tuned_a": log["finetune"][-1, arm, 0],
        "tuned_b_unlinked": log["finetune"][-1, arm, 1],
        "tuned_b_linked": log["finetune"][-1, arm, 2],
        "pruned_a": pruning[pruning[:, 0].argmax(), 1],
        "probe_a_before": log["before_probes"][0, 0].max(),
        "probe_a_after": log["after_probes"][arm, 0].max(),
        "probe_a_random_model": log["before_probes"][-1, 0].max(),
        "revival_steps": revival[arm],
        "revival_steps_scratch_ft": revival[len(make_arms(config)) + same_rate],
        "revival_steps_scratch": revival[-1],
    }
    curves = {"accuracy_reverse": log["reverse"][:, arm], "accuracy_pruned": pruning[:, 1]}
    curves |= {"probes_before": log["before_probes"][0, 0], "probes_after": log["after_probes"][arm, 0]}
    majorities = {"majority_tests": jnp.stack([commonest[name] for name in ("a", "b", "b linked")])}
    return numbers | curves | log | majorities | {"majority_families": commonest["families"], "revival": revival}


def evaluate_stories(config: Config, _, state: State) -> dict:
    """All that was measured; Twist rates at eta_M after fine-tuning and after about 30 steps of reFT, beside the control's."""
    log = seen(state.log)
    log, arms = log | curves_of(config, log), make_arms(config)
    at = int(np.searchsorted(reverse_points(config), min(30, config.reverse_updates)))
    medium_arms = {arm.name: i for i, arm in enumerate(arms) if arm.lr == medium(config)}
    control = [run.reverse_lr for run in make_baselines(config)].index(arms[medium_arms["F"]].reverse_lr) + len(arms)
    numbers = {"twist_pretrained": log["finetune"][0, 0, 0], "twist_30_never": log["reverse"][at, control, 0]}
    numbers |= {f"twist_tuned_{name}": log["finetune"][-1, i, 0] for name, i in medium_arms.items()}
    numbers |= {f"twist_30_{name}": log["reverse"][at, i, 0] for name, i in medium_arms.items()}
    return numbers | log


if __name__ == "__main__":
    run(
        cli(Config, __doc__, {"cpu": CPU, "paper": PAPER}),
        make_train,
        highlights=("pretrain_loss", "finetune_loss", "reverse_loss"),
    )
