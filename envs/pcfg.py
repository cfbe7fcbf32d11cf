"""Questions about strings of a probabilistic context-free grammar: the data of 2311.12786 (Appendix C.2).

A string is derived in six levels, every rule with probability 1/2; a text is a window of `length` letters of it. A sequence is

    SOS  family  operand  second operand  SOT  text  EOT  ART  answer  EOS

C     how often the operand O is among the text's last `window` letters          CC   the same for the pair OO
I     how far from the text's end O is found for the `occurrence`-th time         IC   the same for OO
T     the letter `window` places before the end (operand: none)
J1 J2 other names for C, that pre-training only ever asks of the letter a (jailbreak, Appendix E.2)

I and IC count occurrences backwards from the end, distance 1 is the last letter, and 0 says that there are too few. The second
operand is `window` or `occurrence`. In C_Tr and C_Te the spurious link is count(b) = count(a) + 1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

LETTERS = "abc"
NONE, SOS, SOT, EOT, ART, EOS = range(3, 9)
FAMILIES = ("C", "CC", "I", "IC", "T", "J1", "J2")
FIRST_FAMILY, FIRST_NUMBER = 9, 16
SHORTEST = 96  # letters that every string of the grammar has at least
RULES = (  # figure 14: for each level's symbols, their two rules
    ("s", "rq qp", "pqr"),
    ("pqr", "mno nom / nmo mn / om mon", "mno"),
    ("mno", "lj jlk / kjl ljk / lkj kj", "jkl"),
    ("jkl", "hi ih / hgi ghi / ihg hig", "ghi"),
    ("ghi", "dfe fed / edf def / efd fde", "def"),
    ("def", "ca abc / cb cab / cba ba", "abc"),
)


class Language(NamedTuple):
    """The sizes of texts and questions."""

    length: int = 250
    window: int = 40
    occurrence: int = 6

    @property
    def vocab_size(self) -> int:
        """Letters, marks, families and the numbers 0 to length."""
        return FIRST_NUMBER + self.length + 1

    @property
    def size(self) -> int:
        """Tokens of a sequence."""
        return self.length + 9

    @property
    def art(self) -> int:
        """Where ART is; the answer comes next."""
        return self.length + 6


def _table(symbols: str, rules: str, below: str) -> np.ndarray:
    """(symbols + 1, 2 rules, 3 places) -> symbol of the level below; -1 for an empty place, and so for all of the last row."""
    table = np.full((len(symbols) + 1, 2, 3), -1, np.int32)
    for i, pair in enumerate(rules.split(" / ")):
        for j, rule in enumerate(pair.split()):
            table[i, j, : len(rule)] = [below.index(x) for x in rule]
    return table


TABLES = tuple(_table(*level) for level in RULES)


def derive(coins) -> jax.Array:
    """Which rule (0 or 1) is taken at each of the tree's 243 places (N, >= 243) -> letters (N, 486), -1 where a place is empty."""
    symbols, at = jnp.zeros((coins.shape[0], 1), jnp.int32), 0
    for table in TABLES:
        num = symbols.shape[1]
        symbols = jnp.asarray(table)[symbols, coins[:, at : at + num]].reshape(coins.shape[0], -1)
        at += num
        if num == 1:
            symbols = symbols[:, :2]  # no rule of s has a third symbol
    return symbols


def sample_text(key, num: int, length: int) -> jax.Array:
    """Windows of derived strings (num, length), letters 0 to 2; strings follow one another where one may be too short."""
    key_rules, key_start = jax.random.split(key)
    strings = -(-length // SHORTEST)
    words = jax.random.bits(key_rules, (num * strings, 8), jnp.uint32)
    coins = (words[..., None] >> np.arange(32, dtype=np.uint32)) & 1
    slots = derive(coins.reshape(num * strings, 256)).reshape(num, -1)
    place = jnp.cumsum(slots >= 0, axis=1) - 1
    spare = place[:, -1:] + 1 - length
    start = jnp.floor(jax.random.uniform(key_start, (num, 1), jnp.float32) * (spare + 1)).astype(jnp.int32)
    place = jnp.where((slots >= 0) & (place >= start), place - start, length)
    return jnp.zeros((num, length), jnp.int32).at[jnp.arange(num)[:, None], place].set(slots, mode="drop")


# --- answers


def count(text, letter, window: int) -> jax.Array:
    """How often letter () or (N,) is among the last `window` of text (N, L)."""
    return (text[:, -window:] == jnp.reshape(letter, (-1, 1))).sum(1)


def distance(found, occurrence: int) -> jax.Array:
    """found (N, L) bool -> how far from the end (1: the last place) the occurrence-th True from the end is; 0 if there is none."""
    back = found[:, ::-1]
    hit = back & (jnp.cumsum(back, axis=1) == occurrence)
    return jnp.where(hit.any(1), 1 + hit.argmax(1), 0)


def answer(text, family, operand, language: Language) -> jax.Array:
    """The token that answers the question; text (N, L), family and operand (N,)."""
    window, here = language.window, text == operand[:, None]
    pair = here & jnp.pad(here[:, :-1], ((0, 0), (1, 0)))  # at the second letter of OO
    counts = here[:, -window:].sum(1), pair[:, -window + 1 :].sum(1)
    distances = (distance(x, language.occurrence) for x in (here, pair))
    numbers = jnp.stack([*counts, *distances], axis=1) + FIRST_NUMBER
    answers = jnp.concatenate([numbers, text[:, -window, None], numbers[:, :1], numbers[:, :1]], axis=1)
    return jnp.take_along_axis(answers, family[:, None], axis=1)[:, 0]


def sequence(text, family, operand, answers, language: Language) -> jax.Array:
    """The tokens (N, size) of questions with these answers (N,)."""
    row = lambda token: jnp.full(family.shape, token)
    indexing = (family == FAMILIES.index("I")) | (family == FAMILIES.index("IC"))
    second = FIRST_NUMBER + jnp.where(indexing, language.occurrence, language.window)
    first = jnp.where(family == FAMILIES.index("T"), NONE, operand)
    before = jnp.stack([row(SOS), FIRST_FAMILY + family, first, second, row(SOT)], axis=1)
    after = jnp.stack([row(EOT), row(ART), answers, row(EOS)], axis=1)
    return jnp.concatenate([before, text, after], axis=1).astype(jnp.int32)


def ask(text, family, operand, language: Language) -> jax.Array:
    """Questions with right answers: tokens (N, size); family and operand may be numbers."""
    family, operand = (jnp.broadcast_to(x, text.shape[:1]) for x in (family, operand))
    return sequence(text, family, operand, answer(text, family, operand, language), language)


# --- pre-training


def task_table(prior, jailbreak: bool = False) -> np.ndarray:
    """Probabilities (families, letters) of a question: uniform over families, `prior` over operands; J1 and J2 only ask of a."""
    table = np.zeros((len(FAMILIES), 3))
    table[:5] = prior
    table[5:, 0] = jailbreak
    return (table / table.sum()).astype(np.float32)


def sample_pretraining(key, num: int, tasks, language: Language) -> jax.Array:
    """Sequences (num, size) of the questions that `tasks` (families, letters) gives probabilities to."""
    key_text, key_task = jax.random.split(key)
    text = sample_text(key_text, num, language.length)
    cumulated = jnp.cumsum(jnp.reshape(tasks, -1))
    drawn = jax.random.uniform(key_task, (num, 1), jnp.float32) * cumulated[-1]
    task = jnp.minimum((drawn >= cumulated).sum(1), cumulated.size - 1)
    return ask(text, task // 3, task % 3, language)


# --- fine-tuning: strings edited so that count(b) is, or is not, tied to count(a)


def edit(key, text, num_a, num_b, window: int) -> jax.Array:
    """Texts (N, L) with num_a and num_b (N,) of the letters a and b among the last `window`: as few letters changed as can be,
    which ones and in which order at random. num_a + num_b must be at most `window`."""
    tail = text[:, -window:]
    wanted = jnp.stack([num_a, num_b, window - num_a - num_b], axis=1)
    missing = wanted - jnp.stack([(tail == letter).sum(1) for letter in range(3)], axis=1)
    order = jax.random.uniform(key, tail.shape, jnp.float32)
    earlier = order[:, None, :] < order[:, :, None]  # (N, i, j): j comes before i
    same = tail[:, None, :] == tail[:, :, None]
    surplus = jnp.take_along_axis(-missing, tail, axis=1)
    taken = (earlier & same).sum(2) < surplus
    rank = (earlier & taken[:, None, :]).sum(2)
    until = jnp.cumsum(jnp.maximum(missing, 0), axis=1)[:, None]
    return text.at[:, -window:].set(jnp.where(taken, (rank[..., None] >= until[..., :2]).sum(2, dtype=jnp.int32), tail))


def targets(text, window: int) -> jax.Array:
    """Counts (N,) to edit other strings to: natural ones of a, small enough that a and one more b fit in."""
    return jnp.minimum(count(text, 0, window), (window - 1) // 2)


def sample_finetuning(key, num: int, correlation, language: Language) -> jax.Array:
    """Texts (num, L) in which count(b) = count(a) + 1 holds with probability `correlation` (C_Tr), and else by chance.

    Every string is edited, to counts of a and of b that come from other strings. Whatever C_Tr is, either count has the same
    distribution and is independent of the string, so that labels and numbers of edits are distributed alike.
    """
    keys = jax.random.split(key, 3)
    text = sample_text(keys[0], num, language.length)
    natural = targets(text, language.window)
    num_a = jnp.roll(natural, 1)
    linked = jax.random.uniform(keys[1], (num,), jnp.float32) < correlation
    num_b = 1 + jnp.where(linked, num_a, jnp.roll(natural, 2))
    return edit(keys[2], text, num_a, num_b, language.window)


def sample_test(key, num: int, linked: bool, language: Language) -> jax.Array:
    """Texts (num, L) of a test set: count(b) = count(a) + 1 in all of them (C_Te = 1), or in none (C_Te = 0)."""
    key_text, key_edit = jax.random.split(key)
    text = sample_text(key_text, num, language.length)
    natural = targets(text, language.window)
    num_a = jnp.roll(natural, 1)
    others = jnp.stack([jnp.roll(natural, 2 + i) for i in range(8)] + [num_a + 1], axis=1)  # the last one always differs
    first = (others != num_a[:, None]).argmax(1)
    other = jnp.take_along_axis(others, first[:, None], axis=1)[:, 0]
    other = jnp.where((other > num_a) & (num_a + 1 + other > language.window), 0, other)
    return edit(key_edit, text, num_a, 1 + (num_a if linked else other), language.window)
