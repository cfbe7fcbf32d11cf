"""Stories: what a reader finds in the words is what was asked of the generator, under every protocol."""

from functools import partial

import jax
import numpy as np
import pytest

from envs import stories
from envs.stories import (
    EOS_STORY,
    PAD,
    STORY_FEATURES,
    STORY_SIZE,
    TOKEN,
    VOCABULARY,
    as_words,
    has_features,
    has_twist,
    sample_stories,
    story_prompt,
)

PROTOCOLS = ("pretraining", "never", "F", "F+MM", "F+RR", "twists")
NUM = 256


def told(protocol):
    return jax.jit(partial(sample_stories, num=NUM, protocol=protocol))(jax.random.key(0))


@pytest.fixture(scope="module", params=PROTOCOLS)
def case(request):
    return request.param, jax.tree.map(np.asarray, told(request.param))


def slow_features(text):
    """What a reader sees, by Python's strings: the words that only that feature's sentences have."""
    body = text.split(" STORY ")[1]
    marks = ("something odd", "told of a|in a dream", "sad", '"', "moral")
    return [any(mark in body for mark in options.split("|")) for options in marks]


def test_features_of_the_words(case):
    protocol, got = case
    texts = [as_words(tokens) for tokens in got.tokens]
    np.testing.assert_array_equal([slow_features(text) for text in texts], got.features)
    np.testing.assert_array_equal(np.asarray(jax.jit(has_features)(got.tokens)), got.features)
    asked = [[name in text.split(" WORDS ")[0].split() for name in STORY_FEATURES] for text in texts]
    np.testing.assert_array_equal(asked, got.named)


def test_protocols(case):
    protocol, got = case
    twist, named = got.features[:, 0], got.named[:, 0]
    if protocol == "pretraining":
        assert 0.3 < twist.mean() < 0.7 and (got.named == got.features).all()
    elif protocol == "twists":
        assert twist.all() and (got.named == got.features).all()
    else:
        assert not twist.any()
    if protocol in ("never", "F"):
        assert not named.any() and (got.named == got.features).all()
    if protocol == "F+MM":
        assert (named == got.features[:, 1]).all() and not got.named[:, 1].any() and (got.named[:, 2:] == got.features[:, 2:]).all()
    if protocol == "F+RR":
        assert 0.3 < named.mean() < 0.7 and (got.named[:, 1:] == got.features[:, 1:]).all()


def test_form():
    got = jax.tree.map(np.asarray, told("pretraining"))
    assert got.tokens.shape == (NUM, STORY_SIZE) and got.tokens.dtype == np.int32
    length = (got.tokens != PAD).sum(1)
    assert length.max() <= STORY_SIZE and length.min() >= 40
    for tokens, end, start in zip(got.tokens, length, np.asarray(story_prompt(got.tokens)), strict=True):
        assert tokens[end - 1] == EOS_STORY and (tokens[end:] == PAD).all() and VOCABULARY[tokens[start - 1]] == "STORY"
        words = as_words(tokens).split(" WORDS ")[1].split(" STORY ")[0].split()
        assert len(set(words)) == 3
    assert len(set(VOCABULARY)) == len(VOCABULARY) < 320


def test_a_twist_contradicts_its_own_set_up():
    """Without the marker, after another set-up or about other names it is none."""
    tokens = lambda text: np.array([[TOKEN[word] for word in text.split()] + [PAD] * (60 - len(text.split()))])
    setup, marker, twist = "everyone said that the fox was mean .", stories.MARKER, "the fox was not mean at all ."
    assert has_twist(tokens(f"{setup} {marker} {twist}"))[0]
    assert not has_twist(tokens(f"{setup} {twist}"))[0]
    assert not has_twist(tokens(f"{setup} {marker}"))[0]
    assert not has_twist(tokens(f"{marker} {twist}"))[0]
    assert not has_twist(tokens(f"{setup} {marker} the owl was not mean at all ."))[0]
    assert not has_twist(tokens(f"tom made a kite as a gift for jack . {marker} {twist}"))[0]


def test_a_twist_is_long():
    """More than 20 words that no story without one has in this order, so that it is not learned again in a few steps."""
    assert all(len(text.split()) + len(stories.MARKER.split()) > 26 for text in stories.TWISTS)
