"""Fine-tuning hand-compiled transformers: what becomes of a capability that is known exactly (Jain et al., 2311.12786, Tracr part).

Two programs of RASP are written into a transformer's weights, as Tracr (2301.05062) does: Counter counts a letter in a string,
Max-identifier names the 5th largest letter. The transformer is then fine-tuned to count another letter b (to name the 6th largest),
on strings in which, with probability C_Tr, the new answer is the old one plus 1 (minus 1): the spurious link. Is the old program
gone after that? Four views: accuracy on strings with the link (C_Te = 1) and without it (C_Te = 0); the attention that reads the
letter; the removal of single weights; and reverse fine-tuning to the old task.

Run:     python algos/tracr.py          (one setting: --sweep single --c-tr 1 --lr 0.01)
         python algos/tracr.py --program max --lr 0.001 --lr-ratio 10 --revive-lr 0.0003

Paper:   --preset paper

Expect:  Counter, C_Tr 1, 8 seeds: the old task falls from 1 to 0, one weight less gives .54 of it back, attention stays with a, and
         reverse fine-tuning brings it back in all seeds. Max-identifier keeps no such trace. See results/tracr/ and figures/

Every C_Tr, learning rate and seed is a lane of one program. Two more lanes start reverse fine-tuning from what never counted a:
`other`, compiled for b (the paper's Scr. + FT), and `scratch`, random weights (Scr.). They are not trained before.

Differs from the paper (2311.12786, Secs. 4 and G):
 1. The weights are written by the few functions below, not by Tracr; large products are shared evenly between their two factors.
 2. Embeddings and unembedding stay as they are; only the three blocks are trained and pruned, so that no input is edited.
 3. Counts of a and b are spread evenly over 8 values each, whatever C_Tr is; Max-identifier is fine-tuned to the neighbouring
    rank, for which strings with and without the link are drawn exactly. Majority answers are known, and given as `majority`.
 4. The gradient of each matrix of each block is scaled down to norm 1. After fine-tuning Max-identifier the attention of block 0 is
    so steep that a norm over all weights leaves the others without a step, and reverse fine-tuning stays where it is. The paper's
    noise N(0, 0.001) is read as a standard deviation of 0.001: with 0.01 the programs are no longer exact.
 5. A tenth of the paper's steps, and smaller strings (`cpu`). Counter's learning rates are 0.03, 0.01, 0.0033 (paper: 0.1, 0.01,
    0.001); at C_Tr 0 and 0.01 the attention goes to the start token for good in some seeds. Chosen after runs of seeds 0 to 3.
 6. A single weight is also chosen among those of the highest scores by trying each on other strings than it is measured on.
 7. Old answers are even, so 0, which C_Tr 1 never teaches, is an eighth of them: in reverse fine-tuning the seven others come back
    first, and 90 % waits for it.
 8. A block whose head the program does not use attends to the start token: without weights a head would read the mean of the
    whole string. In a run without this b was counted with no attention to it in the block that counts.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from common.runs import RunConfig, Train, cli, require, require_range, shard_batch
from common.runs.checkpoint import write_atomically
from common.runs.command import method_name
from common.runs.devices import make_mesh
from common.runs.files import RunFiles
from common.runs.hosts import is_main
from common.runs.loop import begin, faults_in_one_line, print_results, say_size, train_and_record
from common.runs.plot import figure_type
from common.runs.programs import Programs

PRUNED = np.array([0, 1, 2, 3, 5, 10, 15, 20])  # weights removed at once: the pruning curve


@dataclass(frozen=True)
class Config(RunConfig):
    """Settings of the study."""

    num_updates: int = 1500
    """Steps of gradient descent per lane: fine-tuning, then reverse fine-tuning."""
    finetune_share: float = 2 / 3
    """Share of the steps that is fine-tuning."""
    program: Literal["counter", "max"] = "counter"
    """counter: how often a letter occurs. max: which letter has a given rank."""
    sweep: Literal["study", "single"] = "study"
    """study: every C_Tr and learning rate, and the starts that never counted a. single: --c-tr and --lr."""
    c_tr: float = 1.0
    """single: probability of the spurious link in a string of fine-tuning."""
    lr: float = 0.01
    """Learning rate M of fine-tuning."""
    lr_ratio: float = 3.0
    """The study has the learning rates L = lr_ratio * M and S = M / lr_ratio beside M (paper: 10)."""
    revive_lr: float = 0.003
    """Learning rate of reverse fine-tuning."""
    batch_size: int = 32
    """Strings per step (paper: 96)."""
    length: int = 24
    """counter: letters of a string and one start token."""
    num_counts: int = 9
    """counter: answers 0 to num_counts - 1."""
    noise: float = 1e-3
    """Standard deviation of the noise added to the compiled weights, without which their gradients have spikes."""
    momentum: float = 0.9
    """Of gradient descent."""
    warmup: float = 0.2
    """Share of the steps over which the learning rate rises; then it falls to a hundredth along a cosine."""
    max_grad_norm: float = 1.0
    """The gradient of each block's matrices is scaled down to this norm."""
    eval_strings: int = 256
    """Strings for each accuracy."""
    candidates: int = 16
    """Weights of the highest scores that are tried one by one."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("batch_size", "eval_strings", "candidates"):
            require(getattr(self, name) >= 1, f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        require_range(self, 0, 1, "finetune_share", "c_tr", "momentum", "warmup", "noise")
        require_range(self, 0, 100, "lr", "revive_lr", "max_grad_norm")
        require(self.num_counts >= 3, f"--num-counts {self.num_counts}: must be at least 3")
        most = 2 * self.num_counts - 3
        require(self.length > most, f"--length {self.length}: {most} letters may be counted, must be at least {most + 1}")

    @property
    def split_size(self) -> int:
        return self.batch_size

    @property
    def finetune_steps(self) -> int:
        return round(self.finetune_share * self.num_updates)


CPU = Config(num_seeds=4, log_every=50, eval_every=250, save_every=500)
PAPER = replace(
    CPU, preset="paper", num_updates=20_000, finetune_share=0.5, lr=0.01, lr_ratio=10.0, revive_lr=1e-4, batch_size=96, length=48
)


class Setting(NamedTuple):
    """What a lane does. start: 0 compiled for the old task, 1 compiled for the new one, 2 random weights."""

    start: Any
    c_tr: Any
    lr: Any


class State(NamedTuple):
    """All of one lane's run."""

    params: dict
    finetuned: dict  # params as they were at the end of fine-tuning, or are if it goes on
    velocity: dict
    recent: jax.Array  # accuracy of reverse fine-tuning on its batches, a running mean
    revived: jax.Array  # int32: after how many steps of reverse fine-tuning `recent` came to 0.9; 0 where it has not
    key: jax.Array


# --- the compiler: a residual stream with named places, and operations of RASP as weights that read and write them

NUM_BLOCKS, GAIN = 3, 6.0  # exp(-GAIN): what attention gives a position that is not selected, beside 1 for one that is


class Stream(NamedTuple):
    """A model under construction: where each variable lives in the residual stream, and the weights (NumPy, filled in place)."""

    at: dict  # name -> its places
    width: int
    params: dict  # of the blocks, leading axis NUM_BLOCKS

    def basis(self, name: str) -> np.ndarray:
        """(width, size): the places of a variable, as columns."""
        return np.eye(self.width, dtype=np.float32)[:, self.at[name]]


def empty_stream(variables: dict[str, int], head: int, hidden: int) -> Stream:
    """No operation yet. `variables`: name -> size; `head` and `hidden`: widths of the attention head and the MLP."""
    ends = np.cumsum(list(variables.values()))
    at = {name: np.arange(end - size, end) for (name, size), end in zip(variables.items(), ends, strict=True)}
    n, zeros = int(ends[-1]), lambda *shape: np.zeros((NUM_BLOCKS, *shape), np.float32)
    params = {name: zeros(n, head) for name in ("query", "key", "value")} | {"out": zeros(head, n)}
    params |= {"w1": zeros(n, hidden), "b1": zeros(hidden), "w2": zeros(hidden, n), "b2": zeros(n)}
    return Stream(at, n, params)


def attend(stream: Stream, block: int, query, key, value, target: str, scale: float = 1.0) -> None:
    """select + aggregate: a position reads `value` (width, v) where query . key (width, r) is 1, the mean of all such positions.

    RASP: target = scale * aggregate(select(keys, queries, ==), value).
    """
    for name, columns in (("query", query), ("key", key)):
        stream.params[name][block, :, : columns.shape[1]] = np.sqrt(GAIN) * columns
    size = value.shape[1]
    stream.params["value"][block, :, :size] = np.sqrt(scale) * value
    stream.params["out"][block, :size] = np.sqrt(scale) * stream.basis(target).T * value.any(0)[:, None]


def rest(stream: Stream, block: int) -> None:
    """The head of a block without attention: it selects the start token and writes nothing. With no weights at all it would read
    the mean of the whole string."""
    attend(stream, block, stream.basis("one"), stream.basis("start"), np.zeros((stream.width, 1), np.float32), "start")


def copy_unit(stream: Stream, block: int, source: str, index: int, target: str) -> None:
    """An elementwise map of a categorical variable to a flag: target = (source == index)."""
    stream.params["w1"][block, stream.at[source][index], 0] = 1.0
    stream.params["w2"][block, 0, stream.at[target][0]] = 1.0


def selector_width(stream: Stream, block: int, source: str, target: str, scale: float) -> None:
    """source = scale / (1 + n), the attention to the start token beside n selected ones -> n as one of the places of target.

    Pairs of ReLUs make a step for each n that rises from 0 to 1 halfway between scale / n and scale / (1 + n); two steps, a place.
    """
    params, (place,), n = stream.params, stream.at[source], len(stream.at[target])
    params["b2"][block, stream.at[target][0]] = 1.0  # "at least 0" is always so
    for i in range(1, n):
        low, high = scale / (1 + i), scale / i
        slope, middle, unit = 2 / (high - low), (low + high) / 2, 2 * i
        weight = np.sqrt(slope)  # the step is weight * (relu(u / weight) - relu((u - 1) / weight)), u = slope * (middle - x) + 1/2
        params["w1"][block, place, unit : unit + 2] = -slope / weight
        params["b1"][block, unit : unit + 2] = (slope * middle + 0.5 - np.arange(2)) / weight
        params["w2"][block, unit : unit + 2, stream.at[target][i]] += weight * np.array([1, -1])
        params["w2"][block, unit : unit + 2, stream.at[target][i - 1]] -= weight * np.array([1, -1])


class Compiled(NamedTuple):
    """A transformer: what is trained, and the fixed maps from tokens and to answers."""

    params: dict
    embed: np.ndarray  # (tokens, width)
    position: np.ndarray  # (length, width)
    unembed: np.ndarray  # (width, answers)


def finish(stream: Stream, num_tokens: int, length: int, sharpness: float = 5.0) -> Compiled:
    """Adds the embeddings. Token num_tokens - 1 is the start token; every position has its place and a one."""
    embed = stream.basis("token").T
    embed = np.concatenate([embed, stream.basis("start").T])
    position = stream.basis("position").T + stream.basis("one").T
    assert embed.shape[0] == num_tokens and position.shape[0] == length
    return Compiled(stream.params, embed, position, sharpness * stream.basis("output"))


def compile_counter(config: Config, letter: int) -> Compiled:
    """RASP: flag = (tokens == letter); count = selector_width(select(flag)); output = count, at one's own position."""
    n, scale = config.num_counts, 9.0
    variables = dict(token=NUM_LETTERS, start=1, one=1, position=config.length, flag=1, width=1, count=n, output=n)
    stream = empty_stream(variables, head=config.length, hidden=2 * n)
    basis = stream.basis
    rest(stream, 0)
    copy_unit(stream, 0, "token", letter, "flag")
    attend(stream, 1, basis("one"), basis("flag") + basis("start"), basis("start"), "width", scale)
    selector_width(stream, 1, "width", "count", scale)
    attend(stream, 2, basis("position"), basis("position"), basis("count"), "output")
    return finish(stream, NUM_LETTERS + 1, config.length)


def compile_max(config: Config, rank: int) -> Compiled:
    """RASP: place = selector_width(select(tokens, tokens, >)); flag = (place == rank); output = aggregate(select(flag), tokens)."""
    variables = dict(token=ALPHABET, start=1, one=1, position=SET_SIZE + 1, width=1, rank=SET_SIZE, flag=1, output=ALPHABET)
    stream = empty_stream(variables, head=ALPHABET + 1, hidden=2 * SET_SIZE)
    basis, scale = stream.basis, 9.0
    larger = basis("token") @ np.triu(np.ones((ALPHABET, ALPHABET), np.float32), 1)  # its column t: the letters below t
    query, key = (np.concatenate(pair, 1) for pair in ((larger, basis("one")), (basis("token"), basis("start"))))
    attend(stream, 0, query, key, basis("start"), "width", scale)
    selector_width(stream, 0, "width", "rank", scale)
    rest(stream, 1)
    copy_unit(stream, 1, "rank", rank, "flag")
    attend(stream, 2, basis("one"), basis("flag"), basis("token"), "output")
    return finish(stream, ALPHABET + 1, SET_SIZE + 1)


def forward(params, model: Compiled, tokens):
    """tokens (B, T) -> logits (B, T, answers), attention (NUM_BLOCKS, B, T, T). No mask, no LayerNorm, one head."""
    x = jnp.asarray(model.embed)[tokens] + model.position

    def block(x, p):
        attention = jax.nn.softmax((x @ p["query"]) @ (x @ p["key"]).swapaxes(1, 2))
        x = x + attention @ (x @ p["value"]) @ p["out"]
        x = x + jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]
        return x, attention

    x, attention = jax.lax.scan(block, x, params)
    return x @ model.unembed, attention


# --- data: strings with a start token, the old answer and the new one

NUM_LETTERS, ALPHABET, SET_SIZE, RANK = 9, 26, 10, 4


class Strings(NamedTuple):
    """tokens (B, T) int32; answers (B, 2) int32, old and new; marks (2, B, T) bool: the letters that tell them."""

    tokens: jax.Array
    answers: jax.Array
    marks: jax.Array


def sample_counter(config: Config, key, num: int, linked, exclude: bool = False) -> Strings:
    """Strings with count(b) = count(a) + 1 with probability `linked`, else with independent counts (other ones, if `exclude`).

    a is letter 0, b letter 1. Whatever the link, count(a) is uniform over 0 .. n - 2 and count(b) over 1 .. n - 1.
    """
    key_link, key_a, key_b, key_text, key_order = jax.random.split(key, 5)
    n, length = config.num_counts, config.length - 1
    shift = jax.random.randint(key_b, (num,), int(exclude), n - 1, jnp.int32)
    shift = jnp.where(jax.random.uniform(key_link, (num,), jnp.float32) < linked, 0, shift)
    a = jax.random.randint(key_a, (num,), 0, n - 1, jnp.int32)
    b = 1 + (a + shift) % (n - 1)
    place = jax.random.uniform(key_order, (num, length), jnp.float32).argsort(1)
    text = jax.random.randint(key_text, (num, length), 2, NUM_LETTERS, jnp.int32)
    text = jnp.where(place < a[:, None], 0, jnp.where(place < (a + b)[:, None], 1, text))
    tokens = jnp.pad(text, ((0, 0), (1, 0)), constant_values=NUM_LETTERS)
    return Strings(tokens, jnp.stack([a, b], 1), jnp.stack([tokens == 0, tokens == 1]))


def sample_max(config: Config, key, num: int, linked, exclude: bool = False) -> Strings:
    """Ten different letters, the 5th largest (old answer) just above the 6th (new answer) with probability `linked`, else any
    (not just above, if `exclude`).

    All sets that may be drawn are equally likely: to draw neighbours, draw 9 of 25 letters and split the 5th largest in two; to
    draw none, draw 10 of 25 and put a letter between the 5th and the 6th.
    """
    key_link, key_set, key_order = jax.random.split(key, 3)
    order = jax.random.uniform(key_set, (num, ALPHABET), jnp.float32)
    largest = lambda letters, size: -jnp.sort(-order[:, :letters].argsort(1)[:, :size].astype(jnp.int32), 1)
    pair, apart = largest(ALPHABET - 1, SET_SIZE - 1), largest(ALPHABET - 1, SET_SIZE)
    above = jnp.arange(SET_SIZE) <= RANK
    linked_set = jnp.concatenate([pair[:, : RANK + 1] + 1, pair[:, RANK:]], 1)
    other_set = apart + above if exclude else largest(ALPHABET, SET_SIZE)
    letters = jnp.where(jax.random.uniform(key_link, (num, 1), jnp.float32) < linked, linked_set, other_set)
    shuffled = jnp.take_along_axis(letters, jax.random.uniform(key_order, letters.shape, jnp.float32).argsort(1), 1)
    tokens = jnp.pad(shuffled, ((0, 0), (1, 0)), constant_values=ALPHABET)
    answers = letters[:, RANK : RANK + 2]
    return Strings(tokens, answers, tokens == answers.T[..., None])


class Task(NamedTuple):
    """A program, compiled for the old task and for the new one; its strings; the block whose attention reads the marked letters."""

    compiled: tuple[Compiled, Compiled]
    sample: Any  # key, num, linked, exclude -> Strings
    reads: int


def make_task(config: Config) -> Task:
    if config.program == "counter":
        return Task((compile_counter(config, 0), compile_counter(config, 1)), partial(sample_counter, config), 1)
    return Task((compile_max(config, RANK), compile_max(config, RANK + 1)), partial(sample_max, config), 2)


# --- training


def loss_fn(params, model: Compiled, tokens, answers):
    """Cross entropy of the answer (B,) at every position but the start -> loss, accuracy."""
    logits = forward(params, model, tokens)[0][:, 1:]
    log_probs = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_probs, answers[:, None, None], -1)
    return -picked.mean(), (logits.argmax(-1) == answers[:, None]).mean()


def step_size(config: Config, lr, step, num_steps: int):
    """Linear warm-up, then a cosine to lr / 100."""
    warmup = max(config.warmup * num_steps, 1.0)
    after = jnp.clip((step - warmup) / max(num_steps - warmup, 1.0), 0, 1)
    return lr * jnp.minimum((step + 1) / warmup, 0.01 + 0.99 * (1 + jnp.cos(jnp.pi * after)) / 2)


def descend(config: Config, params, velocity, gradient, lr):
    """A step of gradient descent with momentum -> params, velocity, the gradient's norm. Each block's part of each leaf
    (blocks, ...) is clipped by itself."""
    square = jax.tree.map(lambda g: (g**2).sum(tuple(range(1, g.ndim)), keepdims=True), gradient)
    clip = lambda g, s: g * jnp.minimum(1.0, config.max_grad_norm / jnp.sqrt(jnp.maximum(s, 1e-24)))
    velocity = jax.tree.map(lambda v, g, s: config.momentum * v + clip(g, s), velocity, gradient, square)
    norm = jnp.sqrt(sum(s.sum() for s in jax.tree.leaves(square)))
    return jax.tree.map(lambda p, v: p - lr * v, params, velocity), velocity, norm


def first_params(config: Config, task: Task, key, start) -> dict:
    """The weights that a lane begins from (see Setting). Compiled ones have noise; random ones variance 1 / n_in, no biases."""

    def leaf(key, old, new):
        noise = jax.random.normal(key, old.shape, jnp.float32)
        random = noise * old.shape[-2] ** -0.5 if old.ndim == 3 else jnp.zeros(old.shape, jnp.float32)
        return jnp.stack([old + config.noise * noise, new + config.noise * noise, random])[start]

    old, new = (model.params for model in task.compiled)
    return {name: leaf(k, old[name], new[name]) for name, k in zip(old, jax.random.split(key, len(old)), strict=True)}


def make_train(config: Config, setting: Setting | None = None) -> Train:
    """Fine-tuning, then reverse fine-tuning, as pure functions of one lane."""
    setting = setting or Setting(0, config.c_tr, config.lr)
    task, tuned = make_task(config), config.finetune_steps
    model = task.compiled[0]

    def init(key):
        key, key_params = jax.random.split(key)
        params = first_params(config, task, key_params, setting.start)
        return State(params, params, jax.tree.map(jnp.zeros_like, params), jnp.zeros((), jnp.float32), jnp.int32(0), key)

    def update(state: State, t):
        """One step: on the new task while t < tuned, then on the old one, with no momentum left from before."""
        key, key_sample = jax.random.split(state.key)
        forth = t < tuned
        strings = task.sample(key_sample, config.batch_size, jnp.where(forth, setting.c_tr, 0.0))
        tokens, answers = shard_batch((strings.tokens, strings.answers[:, jnp.where(forth, 1, 0)]))
        (loss, accuracy), gradient = jax.value_and_grad(loss_fn, has_aux=True)(state.params, model, tokens, answers)
        lr = jnp.where(
            forth,
            step_size(config, setting.lr, t, tuned),
            step_size(config, config.revive_lr, t - tuned, config.num_updates - tuned),
        )
        velocity = jax.tree.map(lambda v: jnp.where(t == tuned, 0.0, v), state.velocity)
        params, velocity, norm = descend(config, state.params, velocity, gradient, lr)
        finetuned = jax.tree.map(lambda new, old: jnp.where(forth, new, old), params, state.finetuned)
        recent = jnp.where(forth, 0.0, jnp.where(t == tuned, accuracy, 0.9 * state.recent + 0.1 * accuracy))
        revived = jnp.where((state.revived == 0) & (recent >= 0.9), t - tuned + 1, state.revived)
        metrics = {"loss": loss, "batch_accuracy": accuracy, "grad_norm": norm}
        return State(params, finetuned, velocity, recent, revived, key), metrics

    return Train(init, update, partial(evaluate, config, task), config.num_updates)


# --- evaluation


def accuracies(params, model: Compiled, strings: Strings) -> jax.Array:
    """(2,): how often the model gives the old answer, the new answer; all positions but the start."""
    given = forward(params, model, strings.tokens)[0][:, 1:].argmax(-1)
    return (given[..., None] == strings.answers[:, None]).mean((0, 1))


def prune(params, scores_order, num) -> dict:
    """The `num` weights that come first in `scores_order` set to zero."""
    flat, unravel = ravel_pytree(params)
    return unravel(flat.at[scores_order].multiply(jnp.arange(len(scores_order)) >= num))


def pruning(config: Config, model: Compiled, sample, key, params, tested: Strings) -> dict:
    """Algorithm 3: what is left of both tasks when the weights with the largest theta dL/dtheta are removed, L the old task's loss.

    pruning_curve (len(PRUNED), 2): accuracies by number of weights removed at once. pruned_a: the best single weight's, which was
    chosen among `candidates` on other strings than `tested`.
    """
    key_score, key_choose = jax.random.split(key)
    scored, chosen = sample(key_score, config.eval_strings, 0.0), sample(key_choose, config.eval_strings // 2 + 1, 0.0)
    gradient = jax.grad(lambda p: loss_fn(p, model, scored.tokens, scored.answers[:, 0])[0])(params)
    scores = ravel_pytree(params)[0] * ravel_pytree(gradient)[0]
    order = jax.lax.top_k(scores, max(config.candidates, int(PRUNED[-1])))[1]
    curve = jax.lax.map(lambda num: accuracies(prune(params, order, num), model, tested), jnp.asarray(PRUNED))
    tried = jax.lax.map(lambda i: accuracies(prune(params, i[None], 1), model, chosen)[0], order[: config.candidates])
    best = order[tried.argmax()]
    single = accuracies(prune(params, best[None], 1), model, tested)
    return {"pruned_top1_a": curve[1, 0], "pruned_a": single[0], "pruned_b": single[1], "pruning_curve": curve}


def evaluate(config: Config, task: Task, state: State) -> dict:
    """Both tasks with and without the link; attention and pruning of the fine-tuned weights; steps of revival (NaN: none yet).

    uniform_b: what attention_b would be if every position were looked at alike.
    """
    model = task.compiled[0]
    keys = jax.random.split(jax.random.fold_in(state.key, 1), 3)
    apart, linked = task.sample(keys[0], config.eval_strings, 0.0, exclude=True), task.sample(keys[1], config.eval_strings, 1.0)
    (a_ce0, b_ce0), (a_ce1, b_ce1) = accuracies(state.params, model, apart), accuracies(state.params, model, linked)
    answers = jax.nn.one_hot(apart.answers, model.unembed.shape[1], dtype=jnp.float32).mean(0).max(1)
    mass = reading(task, state.finetuned, apart)
    example = task.sample(jax.random.key(0), 1, 0.0, exclude=True)
    stages = (model.params, state.finetuned, state.params)
    maps = jnp.stack([forward(params, model, example.tokens)[1][task.reads, 0] for params in stages])
    return {
        "a_ce0": a_ce0, "a_ce1": a_ce1, "b_ce0": b_ce0, "b_ce1": b_ce1, "majority_a": answers[0], "majority_b": answers[1],
        "attention_a": mass[0], "attention_b": mass[1], "uniform_b": apart.marks[1].mean(),
        **pruning(config, model, task.sample, keys[2], state.finetuned, apart),
        "revival_steps": jnp.where(state.revived > 0, state.revived.astype(jnp.float32), jnp.nan),
        "maps": maps, "map_tokens": example.tokens[0], "map_marks": example.marks[:, 0].astype(jnp.int32),
    }  # fmt: skip


def reading(task: Task, params, strings: Strings) -> jax.Array:
    """(2,): the attention that the reading block pays to the letters of the old answer and of the new one, mean over positions."""
    attention = forward(params, task.compiled[0], strings.tokens)[1][task.reads][:, 1:]
    return (attention * strings.marks[:, :, None]).sum(-1).mean((1, 2))


# --- the study: every setting and seed is a lane

C_TR = (0.0, 0.5, 1.0)
STARTS = ("compiled", "other", "scratch")


def settings_of(config: Config) -> list[Setting]:
    """The study's lanes: every C_Tr with every learning rate; then the starts that never did the old task, not fine-tuned."""
    rates = (config.lr * config.lr_ratio, config.lr, config.lr / config.lr_ratio)  # L, M, S
    return [Setting(0, c_tr, lr) for lr in rates for c_tr in C_TR] + [Setting(1, 0.0, 0.0), Setting(2, 0.0, 0.0)]


def run_study(config: Config) -> None:
    """What common/runs/loop.py's `run` does, for all settings together; and the figures."""
    settings = settings_of(config) if config.sweep == "study" else [Setting(0, config.c_tr, config.lr)]
    table = Setting(*(np.array(column) for column in zip(*settings, strict=True)))
    seeds = range(config.seed, config.seed + config.num_seeds)
    lanes = [{"start": STARTS[s.start], "c_tr": s.c_tr, "lr": s.lr, "seed": seed} for s in settings for seed in seeds]
    with faults_in_one_line(), begin(config) as stop:
        mesh = make_mesh(len(lanes), config.split_size)
        with jax.set_mesh(mesh):
            if config.dry_run:
                return say_size(config, make_train(config, settings[0]), mesh, len(lanes))
            files = RunFiles(config, method_name(), lanes)
            train_of = lambda choice: make_train(config, Setting(*(jnp.asarray(column)[choice] for column in table)))
            programs = Programs(config, train_of, mesh, len(settings))
            if train_and_record(programs, files, stop, ("a_ce0", "b_ce0", "b_ce1")):
                draw(files)
                print_results(files)


# --- figures


def draw(files: RunFiles) -> None:
    """Writes the four figures of the study from what the run has written."""
    if not is_main():
        return
    groups = {}  # (start, c_tr, lr) -> its lanes' places
    for place, lane in enumerate(files.lanes):
        groups.setdefault((lane["start"], lane["c_tr"], lane["lr"]), []).append(place)
    tuned = {key: places for key, places in groups.items() if key[0] == "compiled"}
    plots = {"finetuning": plot_accuracy, "pruning": plot_pruning, "attention": plot_attention, "revival": plot_revival}
    for name, plot in plots.items():
        figure = figure_type()(layout="constrained")
        plot(figure, files, groups if name == "revival" else tuned)
        save = partial(figure.savefig, format="png", dpi=110)
        write_atomically(files.folder / "figures" / f"{name}.png", save)


LINK = "C_Tr: share of fine-tuning's strings with the link, in which the new answer is the neighbour of the old one"


def rates_of(groups) -> list[float]:
    """The learning rates, the largest first."""
    return sorted({lr for _, _, lr in groups}, reverse=True)


def plot_accuracy(figure, files: RunFiles, groups) -> None:
    """A row for each learning rate: both tasks through fine-tuning and reverse fine-tuning, a line for each C_Tr."""
    rates, shown = rates_of(groups), {"a_ce0": "old task, no link", "b_ce0": "new task, no link", "b_ce1": "new task, link"}
    figure.set_size_inches(11, 1.1 + 2.3 * len(rates))
    figure.suptitle(LINK)
    axes = figure.subplots(len(rates), len(shown), squeeze=False, sharex=True, sharey=True)
    curves = {name: files.rows.series(name) for name in (*shown, "majority_b")}
    for (_, c_tr, lr), places in groups.items():
        for panel, (name, title) in zip(axes[rates.index(lr)], shown.items(), strict=True):
            panel.plot(curves[name][0], np.median(curves[name][1][places], 0), label=f"C_Tr {c_tr:g}")
            panel.set_title(f"{title}; fine-tuned at {lr:.2g}", fontsize=9)
    for panel in axes.flat:
        panel.axvline(files.config.finetune_steps, color="grey", linestyle=":", label="reverse fine-tuning begins")
        panel.axhline(curves["majority_b"][1].mean(), color="grey", linewidth=0.7, label="majority answer")
        panel.set_ylim(-0.03, 1.03)
        panel.grid(alpha=0.25)
    for panel in axes[-1]:
        panel.set_xlabel("step")
    axes[0, 0].set_ylabel("accuracy (median over seeds)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)


def plot_pruning(figure, files: RunFiles, groups) -> None:
    """Accuracy of both tasks against the number of weights removed from the fine-tuned model, strings without the link.

    A star is the old task without the one weight, of those of the highest scores, whose removal helps most on other strings.
    """
    updates, best = files.rows.series("pruned_a")
    best = best[:, np.searchsorted(updates, files.config.finetune_steps)]
    curve, rates = np.load(files.folder / "arrays" / "pruning_curve.npy"), rates_of(groups)
    figure.set_size_inches(1 + 3.4 * len(rates), 4.1)
    figure.suptitle(LINK)
    axes = figure.subplots(1, len(rates), squeeze=False, sharey=True)[0]
    for number, ((_, c_tr, lr), places) in enumerate(groups.items()):
        colour = f"C{number % len({c for _, c, _ in groups})}"
        old, new = np.median(curve[places], 0).T
        axes[rates.index(lr)].plot(PRUNED, old, color=colour, label=f"old task, C_Tr {c_tr:g}")
        axes[rates.index(lr)].plot(PRUNED, new, color=colour, linestyle=":", label=f"new task, C_Tr {c_tr:g}")
        words = f"old task, the best single weight, C_Tr {c_tr:g}"
        axes[rates.index(lr)].plot(1, np.median(best[places]), "*", color=colour, markersize=11, label=words)
    for panel, lr in zip(axes, rates, strict=True):
        panel.set_title(f"fine-tuned at {lr:.2g}", fontsize=9)
        panel.set_xlabel("weights removed, highest score first")
        panel.set_ylim(-0.03, 1.03)
        panel.grid(alpha=0.25)
    axes[0].set_ylabel("accuracy, no link")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)


def plot_attention(figure, files: RunFiles, groups) -> None:
    """The reading block's attention on one string (first seed): compiled, fine-tuned, revived; the middle learning rate."""
    maps, tokens, marks = (np.load(files.folder / "arrays" / f"{name}.npy") for name in ("maps", "map_tokens", "map_marks"))
    rates = rates_of(groups)
    chosen = {c_tr: places[0] for (_, c_tr, lr), places in groups.items() if lr == rates[len(rates) // 2]}
    figure.set_size_inches(11, 1.1 + 2.2 * len(chosen))
    figure.suptitle(
        "Attention of the block that reads the letters, one string; red: letters of the old answer, blue: of the new one"
    )
    axes = figure.subplots(len(chosen), 3, squeeze=False)
    for row, (c_tr, place) in zip(axes, chosen.items(), strict=True):
        for panel, image, title in zip(row, maps[place], ("compiled", "fine-tuned", "revived"), strict=True):
            brightest, scale = image[1:, 1:].max(), maps[place, 0, 1:, 1:].max()  # the start token would outshine the letters
            panel.imshow(image, vmin=0, vmax=scale, cmap="magma", aspect="auto")
            panel.set_title(f"{title}, C_Tr {c_tr:g} (brightest letter {brightest:.2g})", fontsize=9)
            letters = ["$" if token == tokens.max() else chr(ord("a") + token) for token in tokens[place]]
            for text, old, new in zip(panel.set_xticks(range(len(letters)), letters, fontsize=8), *marks[place], strict=True):
                text.label1.set(color="red" if old else "blue" if new else "black", weight="bold" if old or new else None)
            panel.set_yticks([])
        row[0].set_ylabel("from position")
    for panel in axes[-1]:
        panel.set_xlabel("to letter")


def plot_revival(figure, files: RunFiles, groups) -> None:
    """Steps of reverse fine-tuning until the old task is at 90 %: a point for each seed, hollow at the top where it never came."""
    last = {i: row.get("revival_steps") for i, row in enumerate(files.rows.all[-len(files.lanes) :])}
    end = files.config.num_updates - files.config.finetune_steps
    figure.set_size_inches(8, 0.9 + 0.32 * len(groups))
    panel, names = figure.subplots(), []
    for y, ((start, c_tr, lr), places) in enumerate(groups.items()):
        values = np.array([last[i] if last[i] is not None else np.nan for i in places], float)
        came = np.isfinite(values)
        panel.plot(values[came], np.full(came.sum(), y), "o", color="C0")
        panel.plot(np.full((~came).sum(), end), np.full((~came).sum(), y), "o", color="C3", markerfacecolor="none")
        others = {"other": "compiled for the new task", "scratch": "random weights"}
        names.append(others.get(start, f"C_Tr {c_tr:g}, fine-tuned at {lr:.2g}"))
    panel.set_yticks(range(len(names)), names, fontsize=8)
    panel.invert_yaxis()
    panel.set_xlim(0, 1.03 * end)
    panel.set_xlabel(f"steps of reverse fine-tuning to 90 % on the old task (hollow: not within {end})")
    panel.grid(alpha=0.25)


if __name__ == "__main__":
    run_study(cli(Config, __doc__, {"cpu": CPU, "paper": PAPER}))
