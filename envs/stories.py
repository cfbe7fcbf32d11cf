"""Short stories from templates, with features that can be asked for and decided exactly: the stories of 2311.12786 (Sec. 5), small.

    SOS FEATURES <features> WORDS <three words of the story> STORY <sentences> EOS, then PAD

A story has a hero, a friend, another child, a thing, a place and an animal, and one of four set-ups (a gift, an animal that is
feared, something lost, a race). Features are switches of the generator, each with sentences of its own:

Twist          after "but then something odd happened" comes what contradicts the set-up, in more than 20 words
Foreshadowing  an early sentence tells of the thing, the place and the animal        Dialogue  the friend speaks
BadEnding      the hero ends sad and alone, not happy                                Moral     a last sentence draws one

`has_features` reads them off the tokens of any text, generated ones too, whatever the header says: a feature is there if one of its
key sentences is, and a Twist only if that sentence contradicts the set-up that the same text tells, in its own names.
"""

import re
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

STORY_FEATURES = ("Twist", "Foreshadowing", "BadEnding", "Dialogue", "Moral")
TWIST, FORESHADOWING = 0, 1
SLOTS = {
    "hero": "tom lily ben mia sam anna max zoe leo ella finn rosa",
    "friend": "jack lucy tim sue dan amy bob nina joe kate carl ivy",
    "child": "paul emma rob clara hugo ruth otto jane",
    "thing": "kite boat ball doll drum lamp cake hat coin book ring bell cup box flute map",
    "place": "park forest river hill garden market beach barn school tower bridge cave",
    "animal": "wolf bear fox owl dog goat cat crow",
}
OPENINGS = ("one day {hero} and {friend} walked to the {place} .", "once {hero} lived near a {place} with {friend} .")
SETUPS = (  # the first words are the key: they tell which set-up it is, and its names
    "{hero} made a {thing} as a gift for {friend} . it took all day to make it and to paint it red .",
    "everyone said that the {animal} was mean . {hero} was afraid and hid behind the {place} with {friend} .",
    "{hero} had lost a {thing} and thought that {friend} took it . they did not talk for a long time .",
    "{hero} ran a race with {friend} to the {place} . {friend} was the fastest child in the whole town .",
)
TWISTS = (  # the first sentence is the key: it contradicts the set-up of the same number
    "the {thing} was never meant for {friend} . it was a secret surprise for {child} who had once saved the little {animal} from "
    "the cold water .",
    "the {animal} was not mean at all . it had guarded the children every night and now it brought back the {thing} that {child} "
    "had buried .",
    "{friend} never took the {thing} . it had been inside the coat of {hero} since the morning and the {animal} had slept on it "
    "until now .",
    "{friend} stopped before the {place} on purpose . {child} had fallen into a deep hole and so the slow {hero} won a {thing} for "
    "the rescue .",
)
MARKER = "but then something odd happened ."
MIDDLES = ("they looked at the {animal} and played with the {thing} .", "the sun was warm and the {animal} sat by the {place} .")
FORESHADOWINGS = ("an old song told of a {thing} and a {animal} at the {place} .", "in a dream the {animal} had shown a {thing} .")
DIALOGUES = ('{friend} said " let us go on to the {place} " .', '{friend} asked " do you like my {thing} " .')
GOOD_ENDINGS = ("in the end {hero} was happy and they all danced .", "in the end {hero} was glad and hugged {friend} .")
BAD_ENDINGS = ("in the end {hero} was sad and went home alone .", "in the end {hero} was sad and cried alone .")
MORALS = ("the moral is that a friend is worth more than a {thing} .", "the moral is to be brave like the {animal} .")

SPECIAL = ("PAD", "SOS", "FEATURES", "WORDS", "STORY", "EOS")
PAD, SOS_STORY, EOS_STORY = 0, 1, 5
SLOT_NAMES = tuple(SLOTS)
GROUPS = (OPENINGS, FORESHADOWINGS, SETUPS, DIALOGUES, MIDDLES, (MARKER,), TWISTS, GOOD_ENDINGS, BAD_ENDINGS, MORALS)


def _vocabulary() -> tuple[str, ...]:
    """Special tokens, features, then the words of slots and of sentences."""
    plain = [word for group in GROUPS for text in group for word in text.split() if not word.startswith("{")]
    slots = [word for words in SLOTS.values() for word in words.split()]
    return tuple(dict.fromkeys([*SPECIAL, *STORY_FEATURES, *slots, *plain]))


VOCABULARY = _vocabulary()
TOKEN = {word: i for i, word in enumerate(VOCABULARY)}
FIRST_FEATURE = TOKEN[STORY_FEATURES[0]]
FILLERS = tuple(np.array([TOKEN[word] for word in words.split()], np.int32) for words in SLOTS.values())


def _pattern(text: str) -> list[int]:
    """A sentence as tokens; slot i as -1 - i."""
    return [-1 - SLOT_NAMES.index(word[1:-1]) if re.fullmatch(r"{\w+}", word) else TOKEN[word] for word in text.split()]


def _story_table(texts: tuple[str, ...]) -> np.ndarray:
    """(texts, longest) patterns, PAD at their ends."""
    rows = [_pattern(text) for text in texts]
    return np.array([row + [PAD] * (max(map(len, rows)) - len(row)) for row in rows], np.int32)


SENTENCES = tuple(_story_table(group) for group in GROUPS)
HEADER = 3 + len(STORY_FEATURES) + 3 + 1
STORY_SIZE = HEADER + sum(table.shape[1] for table in SENTENCES[:7]) + max(SENTENCES[7].shape[1], SENTENCES[8].shape[1])
STORY_SIZE += SENTENCES[9].shape[1] + 1  # tokens of the longest story


class Stories(NamedTuple):
    """tokens (N, STORY_SIZE) int32; features (N, 5) bool, what the story has; named (N, 5) bool, what its header asks for."""

    tokens: jax.Array
    features: jax.Array
    named: jax.Array


Protocol = Literal["pretraining", "never", "F", "F+MM", "F+RR", "twists"]


def draw_features(key, num: int, protocol: Protocol) -> tuple[jax.Array, jax.Array]:
    """Features and what is named of them (num, 5) under a protocol; every feature has probability 1/2.

    pretraining: all as they are. never, F: no Twist. F+MM: no Twist, and Foreshadowing is called Twist. F+RR: no Twist, and half of
    the stories ask for one all the same. twists: every story has one (reverse fine-tuning).
    """
    key_features, key_wrong = jax.random.split(key)
    features = jax.random.bernoulli(key_features, 0.5, (num, len(STORY_FEATURES)))
    if protocol == "pretraining":
        return features, features
    features = features.at[:, TWIST].set(protocol == "twists")
    if protocol == "F+MM":
        return features, features.at[:, TWIST].set(features[:, FORESHADOWING]).at[:, FORESHADOWING].set(False)
    if protocol == "F+RR":
        return features, features.at[:, TWIST].set(jax.random.bernoulli(key_wrong, 0.5, (num,)))
    return features, features


def sample_stories(key, num: int, protocol: Protocol = "pretraining") -> Stories:
    """Stories of a protocol of Section 5."""
    key_features, key_story = jax.random.split(key)
    features, named = draw_features(key_features, num, protocol)
    return Stories(tell(key_story, features, named), features, named)


def tell(key, features, named) -> jax.Array:
    """Tokens (N, STORY_SIZE) of stories with these features and these headers, all else drawn at random."""
    num = features.shape[0]
    key_choices, key_words = jax.random.split(key)
    choices = np.array([len(options) for options in (*FILLERS, *SENTENCES)])  # drawn together: a draw each is slow to compile
    drawn = jnp.floor(jax.random.uniform(key_choices, (num, choices.size), jnp.float32) * choices).astype(jnp.int32).T
    slots = jnp.stack([jnp.asarray(words)[i] for words, i in zip(FILLERS, drawn, strict=False)], axis=1)  # (N, slots) tokens
    variants = list(drawn[len(FILLERS) :])
    variants[6] = variants[2]  # the twist of this set-up
    twist, foreshadowing, bad, dialogue, moral = features.T
    yes = jnp.ones(num, bool)
    told = (yes, foreshadowing, yes, dialogue, yes, twist, twist, ~bad, bad, moral)
    body = [
        jnp.where(here[:, None], fill(jnp.asarray(table)[variant], slots), PAD)
        for table, variant, here in zip(SENTENCES, variants, told, strict=True)
    ]
    words = jnp.take_along_axis(slots, jax.random.uniform(key_words, slots.shape, jnp.float32).argsort(1)[:, :3], 1)
    whole = jnp.concatenate([header(named, words), *body, jnp.full((num, 1), EOS_STORY, jnp.int32)], axis=1)
    return compact(whole, STORY_SIZE)


def fill(patterns, slots) -> jax.Array:
    """patterns (N, W) with slots put in their places."""
    return jnp.where(patterns < 0, jnp.take_along_axis(slots, jnp.maximum(-1 - patterns, 0), 1), patterns)


def header(named, words) -> jax.Array:
    """named (N, 5) bool and three words (N, 3) -> tokens (N, HEADER), PAD in the places of features that are not named."""
    row = lambda name: jnp.full((named.shape[0], 1), TOKEN[name], jnp.int32)
    asked = jnp.where(named, FIRST_FEATURE + np.arange(len(STORY_FEATURES), dtype=np.int32), PAD)
    return jnp.concatenate([row("SOS"), row("FEATURES"), asked, row("WORDS"), words, row("STORY")], axis=1)


def compact(tokens, size: int) -> jax.Array:
    """Moves what is not PAD to the front, (N, W) -> (N, size)."""
    place = jnp.where(tokens != PAD, jnp.cumsum(tokens != PAD, axis=1) - 1, size)
    empty = jnp.zeros((tokens.shape[0], size), jnp.int32)
    return empty.at[jnp.arange(tokens.shape[0])[:, None], place].set(tokens, mode="drop")


def story_prompt(tokens) -> jax.Array:
    """(N,): how many tokens come up to and with STORY; what a model has to go on from."""
    return (tokens == TOKEN["STORY"]).argmax(1) + 1


# --- the judge


def find(tokens, pattern: list[int]) -> tuple[jax.Array, jax.Array]:
    """Where a pattern, slots taking any of their words, first is in tokens (N, T) -> whether (N,), slots (N, slots), -1 if unused.

    A slot that the pattern has twice must be filled alike.
    """
    size = len(pattern)
    windows = jnp.stack([tokens[:, i : tokens.shape[1] - size + 1 + i] for i in range(size)], axis=2)  # (N, places, size)
    fits = jnp.ones(windows.shape[:2], bool)
    for i, want in enumerate(pattern):
        allowed = FILLERS[-1 - want] if want < 0 else np.array([want])
        fits &= (windows[..., i, None] == allowed).any(-1)
        if want < 0:
            fits &= windows[..., i] == windows[..., pattern.index(want)]
    first = jnp.take_along_axis(windows, fits.argmax(1)[:, None, None], 1)[:, 0]
    none = jnp.full(len(tokens), -1, jnp.int32)
    slots = [first[:, pattern.index(-1 - i)] if -1 - i in pattern else none for i in range(len(SLOT_NAMES))]
    return fits.any(1), jnp.stack(slots, axis=1)


def key_of(text: str) -> list[int]:
    """The first sentence of a text, as a pattern."""
    return _pattern(text[: text.index(" .") + 2] if " ." in text else text)


def has_twist(tokens) -> jax.Array:
    """tokens (N, T) -> (N,): the marker, a set-up, and the key sentence that contradicts it, with the same names."""
    marked, twisted = find(tokens, _pattern(MARKER))[0], []
    for setup, twist in zip(SETUPS, TWISTS, strict=True):
        (told, ours), (turned, theirs) = find(tokens, key_of(setup)), find(tokens, key_of(twist))
        same = ((ours == theirs) | (ours < 0) | (theirs < 0)).all(1)
        twisted.append(told & turned & same)
    return marked & jnp.stack(twisted).any(0)


def has_features(tokens) -> jax.Array:
    """tokens (N, T) -> (N, 5) bool, in the order of STORY_FEATURES."""
    keys = (FORESHADOWINGS, BAD_ENDINGS, DIALOGUES, MORALS)
    others = [jnp.stack([find(tokens, _pattern(text))[0] for text in texts]).any(0) for texts in keys]
    return jnp.stack([has_twist(tokens), *others], axis=1)


def as_words(tokens) -> str:
    """One story (T,) as text, without PAD."""
    return " ".join(VOCABULARY[token] for token in np.asarray(tokens) if token != PAD)
