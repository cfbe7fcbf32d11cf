"""The grammar and its questions, beside plain Python."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs.pcfg import (
    EOS,
    EOT,
    FAMILIES,
    FIRST_FAMILY,
    FIRST_NUMBER,
    NONE,
    SHORTEST,
    SOS,
    SOT,
    Language,
    answer,
    ask,
    count,
    derive,
    edit,
    sample_finetuning,
    sample_pretraining,
    sample_test,
    sample_text,
    task_table,
)

GRAMMAR = {  # figure 14, written out again
    "s": ("rq", "qp"), "p": ("mno", "nom"), "q": ("nmo", "mn"), "r": ("om", "mon"),
    "m": ("lj", "jlk"), "n": ("kjl", "ljk"), "o": ("lkj", "kj"),
    "j": ("hi", "ih"), "k": ("hgi", "ghi"), "l": ("ihg", "hig"),
    "g": ("dfe", "fed"), "h": ("edf", "def"), "i": ("efd", "fde"),
    "d": ("ca", "abc"), "e": ("cb", "cab"), "f": ("cba", "ba"),
}  # fmt: skip
LANGUAGE = Language(length=30, window=10, occurrence=2)


def expand(symbols: str, coins) -> str:
    """A derivation level by level; the coins of a level are those of its places, three below every symbol (two below s)."""
    slots, at = list(symbols), 0
    for level in range(6):
        below = []
        for symbol, coin in zip(slots, coins[at : at + len(slots)], strict=True):
            rule = GRAMMAR[symbol][coin] if symbol else ""
            below += list(rule) + [""] * ((2 if level == 0 else 3) - len(rule))
        at += len(slots)
        slots = below
    return "".join(slots)


def letters(rows) -> list[str]:
    return ["".join("abc"[x] for x in row if x >= 0) for row in np.asarray(rows)]


def test_derives_what_the_grammar_does():
    coins = np.random.default_rng(0).integers(0, 2, (64, 256))
    coins[0], coins[1] = 0, 1
    found = letters(derive(jnp.asarray(coins)))
    assert found == [expand("s", row) for row in coins]
    assert min(map(len, found)) >= SHORTEST
    assert len(set(found)) == 64


def test_shortest_string():
    def shortest(symbol):
        if symbol not in GRAMMAR:
            return 1
        return min(sum(map(shortest, rule)) for rule in GRAMMAR[symbol])

    assert shortest("s") >= SHORTEST


def test_texts_are_windows_of_strings():
    """All four letters in a row that occur are the grammar's, but at the few places of long texts where two strings meet."""
    strings = [expand("s", row) for row in np.random.default_rng(1).integers(0, 2, (1000, 256))]
    known = {string[i : i + 4] for string in strings for i in range(len(string) - 3)}
    assert len(known) < 81 and "aaa" not in {four[:3] for four in known}
    for length, most in ((20, 0), (150, 3)):
        text = sample_text(jax.random.key(0), 300, length)
        assert text.shape == (300, length)
        fours = [[row[i : i + 4] for i in range(length - 3)] for row in letters(text)]
        assert max(sum(four not in known for four in row) for row in fours) <= most
        assert len(set(letters(text))) > 290


def in_python(text: str, family: str, operand: str, language) -> int:
    """The number (or letter's place) that answers a question, by slicing strings."""
    tail = text[-language.window :]
    if family in ("C", "J1", "J2"):
        return tail.count(operand)
    if family == "CC":
        return sum(tail[i : i + 2] == operand * 2 for i in range(len(tail) - 1))
    if family == "T":
        return "abc".index(text[-language.window])
    width = len(family)  # I, IC
    ends = [i for i in range(len(text), 0, -1) if text[:i].endswith(operand * width)]
    return len(text) - ends[language.occurrence - 1] + 1 if len(ends) >= language.occurrence else 0


def test_answers_are_right():
    text = jax.random.randint(jax.random.key(0), (40, 30), 0, 3)
    for (i, family), operand in itertools.product(enumerate(FAMILIES), range(3)):
        tokens = answer(text, jnp.full(40, i), jnp.full(40, operand), LANGUAGE)
        expected = [in_python(row, family, "abc"[operand], LANGUAGE) for row in letters(text)]
        np.testing.assert_array_equal(np.asarray(tokens), np.array(expected) + (0 if family == "T" else FIRST_NUMBER))


def test_a_sequence_reads_as_in_the_paper():
    text = jnp.array([[0, 1, 2, 1, 1, 0, 2, 1]])
    language = Language(length=8, window=5, occurrence=2)
    n = lambda number: FIRST_NUMBER + number
    head = lambda family: FIRST_FAMILY + FAMILIES.index(family)
    middle = [SOT, 0, 1, 2, 1, 1, 0, 2, 1, EOT, 7]
    assert ask(text, FAMILIES.index("C"), 1, language).tolist() == [[SOS, head("C"), 1, n(5), *middle, n(3), EOS]]
    assert ask(text, FAMILIES.index("I"), 1, language).tolist() == [[SOS, head("I"), 1, n(2), *middle, n(4), EOS]]
    assert ask(text, FAMILIES.index("IC"), 1, language).tolist() == [[SOS, head("IC"), 1, n(2), *middle, n(0), EOS]]
    assert ask(text, FAMILIES.index("T"), 1, language).tolist() == [[SOS, head("T"), NONE, n(5), *middle, 1, EOS]]
    assert language.size == len(ask(text, 0, 1, language)[0]) and language.vocab_size == n(8) + 1


def test_priors_of_questions():
    table = task_table((0.7, 0.2, 0.1), jailbreak=True)
    np.testing.assert_allclose(table.sum(1), 1 / 7, rtol=1e-5)
    np.testing.assert_allclose(table[5:], [[1 / 7, 0, 0]] * 2, rtol=1e-5)
    assert not task_table((0.7, 0.2, 0.1))[5:].any()
    tokens = np.asarray(sample_pretraining(jax.random.key(0), 4000, table, LANGUAGE))
    family, operand = tokens[:, 1] - FIRST_FAMILY, tokens[:, 2]
    np.testing.assert_allclose(np.bincount(family, minlength=7) / 4000, 1 / 7, atol=0.03)
    np.testing.assert_allclose(np.bincount(operand[family == 0], minlength=3) / (family == 0).sum(), [0.7, 0.2, 0.1], atol=0.1)
    assert set(operand[family >= 5]) == {0} and set(operand[family == 4]) == {NONE}


def test_editing_is_exact_and_minimal():
    rng = np.random.default_rng(0)
    text = jnp.asarray(rng.integers(0, 3, (200, 30)))
    num_a = rng.integers(0, 11, 200)
    num_b = rng.integers(0, 11 - num_a)
    edited = np.asarray(edit(jax.random.key(0), text, jnp.asarray(num_a), jnp.asarray(num_b), 10))
    text = np.asarray(text)
    wanted = np.stack([num_a, num_b, 10 - num_a - num_b], axis=1)
    have, got = (np.stack([(x[:, -10:] == i).sum(1) for i in range(3)], axis=1) for x in (text, edited))
    np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal((text != edited).sum(1), np.abs(wanted - have).sum(1) // 2)
    np.testing.assert_array_equal(text[:, :20], edited[:, :20])


def test_the_link_changes_neither_labels_nor_the_amount_of_editing():
    """With C_Tr 0, 0.5 and 1: the link's frequency, and the same histograms of counts, edits and their mean."""
    counts = {}
    for correlation in (0.0, 0.5, 1.0):
        text = sample_finetuning(jax.random.key(0), 6000, correlation, LANGUAGE)
        counts[correlation] = np.stack([np.asarray(count(text, letter, 10)) for letter in (0, 1)])
    linked = {c: (b == a + 1).mean() for c, (a, b) in counts.items()}
    assert linked[1.0] == 1.0 and linked[0.0] < 0.7
    assert linked[0.5] == pytest.approx((linked[0.0] + 1) / 2, abs=0.03)
    for correlation in (0.5, 1.0):
        for letter in (0, 1):
            histograms = [np.bincount(counts[c][letter], minlength=11) / 6000 for c in (0.0, correlation)]
            np.testing.assert_allclose(*histograms, atol=0.03)
    a, b = counts[0.0]
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.05, "without a link the counts are not independent"


@pytest.mark.parametrize("linked", [True, False])
def test_test_sets_are_exact(linked):
    text = sample_test(jax.random.key(0), 4000, linked, LANGUAGE)
    a, b = (np.asarray(count(text, letter, 10)) for letter in (0, 1))
    assert ((b == a + 1) == linked).all()
    assert len(np.unique(b)) > 2
