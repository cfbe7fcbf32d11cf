"""The true game beside a model: codes that mean an action play that action."""

import jax
import numpy as np
import pytest

from envs.clips import make_source
from envs.true_game import describe_codes, read_codes, truth_of

SIZE, CELL = 16, 2


def corner(frames):
    """Row and column, in cells, of the bright dot in each frame."""
    bright = np.asarray(frames, int).sum(-1) > 3 * 128
    first = bright.reshape(*bright.shape[:-2], -1).argmax(-1)
    return np.stack([first // SIZE // CELL, first % SIZE // CELL], axis=-1)


def infer(frames):
    """A model that knows: the code of a move is 2, 3, 4, 5 or 1 for left, right, up, down or none, and 0 is never used."""
    moved = np.diff(corner(frames), axis=-2)
    kinds = [(moved == move).all(-1) for move in ((0, 0), (0, -1), (0, 1), (-1, 0), (1, 0))]
    return np.select(kinds, [1, 2, 3, 4, 5])


@pytest.fixture(scope="module")
def known():
    source = make_source("dots", 6, SIZE, 1, 0.0)
    meaning = read_codes(infer, source, 6, 64)
    return source, meaning, truth_of(infer, source, meaning, 6, 2, 0.0)


def test_codes_are_described_by_what_moved(known):
    source, meaning, _ = known
    about = describe_codes(source, meaning)
    assert about["arrows"] == ["", "·", "←", "→", "↑", "↓"] and about["words"][0] == "never seen"
    assert all(word.startswith("100 % of") for word in about["words"][1:])
    assert meaning.changes.sum() == 64 * 5 and meaning.actions[3].argmax() == 2 and (meaning.actions[3] > 0).sum() == 1


def test_a_codes_action_is_played_from_any_frame_of_a_film(known):
    _, _, truth = known
    film = truth.film(5)
    assert film.frames.shape == (6, SIZE, SIZE, 3) and len(film.states) == 6
    np.testing.assert_array_equal(truth.film(5).frames, film.frames)
    assert (truth.film(6).frames != film.frames).any()
    for t in (1, 4):
        for code, move in ((2, (0, -1)), (3, (0, 1)), (4, (-1, 0)), (5, (1, 0)), (0, (0, 0))):
            _, frame, word = truth.step(0, t, film.states[t], code)
            wanted = np.clip(corner(film.frames[t]) + move, 0, 7)
            assert corner(frame).tolist() == wanted.tolist() and word == ""


def test_own_videos_have_films_and_no_game(tmp_path):
    videos = np.random.default_rng(0).integers(0, 256, (4, 6, SIZE, SIZE, 3)).astype(np.uint8)
    np.savez(tmp_path / "videos.npz", videos)
    source = make_source(str(tmp_path / "videos.npz"), 6, SIZE, 1, 0.0)
    meaning = read_codes(lambda frames: np.zeros((len(frames), 5), int), source, 2, 8)
    truth = truth_of(None, source, meaning, 6, 2, 0.0)
    assert truth.step is None and meaning.actions is None
    np.testing.assert_array_equal(truth.film(0).frames, videos[3])  # the only one that is held out
    assert describe_codes(source, meaning)["words"] == ["100 %", "0 %"]
    assert jax.tree.leaves(truth.film(0).states) == []
