"""Genie's commands on a run of a tiny model, which is not trained: what they write, and what they refuse."""

import http.client
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from test_genie import TINY

from algos import genie
from common.runs.checkpoint import save
from common.runs.config import UsageError, as_dict
from common.runs.loop import with_given

ROOT = Path(__file__).resolve().parents[2]
SMALL = replace(TINY, encoder_blocks=1, decoder_blocks=1, lam_blocks=1, dynamics_blocks=1)


@cache
def begin(config):
    """The first state of a run."""
    return jax.jit(jax.vmap(genie.make_train(config).init))(jax.vmap(jax.random.key)(np.arange(config.num_seeds)))


def save_run(folder, config=SMALL, stage="dynamics", settings=None):
    """A run's folder with the checkpoint of a model that begins."""
    config = replace(config, stage=stage)
    state = begin(config)
    save(folder / "checkpoints" / "00000004.npz", state, {"config": as_dict(config) | (settings or {}), "update": 4})
    return folder, jax.tree.map(np.asarray, state.params)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("run"))


def command(*flags):
    cache = os.environ["JAX_COMPILATION_CACHE_DIR"]
    return [sys.executable, str(ROOT / "algos" / "genie.py"), *map(str, flags), "--maskgit-steps", "2", "--cache", cache]


def test_sample_films_every_code(saved, tmp_path):
    done = subprocess.run(command("sample", "--load", saved[0], "--out", tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    film = Image.open(tmp_path / "videos" / "sample.gif")
    assert film.size == (6 * 16, 4 * 16) and "columns are codes 0 to 5" in done.stdout


def test_play_serves_its_page_until_it_is_stopped(saved):
    program = subprocess.Popen(command("play", "--load", saved[0], "--port", "0"), stdout=subprocess.PIPE, text=True)
    try:
        line = program.stdout.readline()
        port = int(line.split(":")[2].split("/")[0])

        def ask(path, value=None):
            connection = http.client.HTTPConnection("127.0.0.1", port)
            method, data = ("GET", None) if value is None else ("POST", json.dumps(value))
            connection.request(method, path, data, {"Content-Type": "application/json"})
            return json.loads(connection.getresponse().read())

        about = ask("/about")
        assert (about["codes"], about["height"], about["films"], about["game"]) == (6, 16, 64, True)
        first, second = (ask("/do", {"do": "step", "code": code}) for code in (1, 2))
        assert (first["time"], second["time"], second["prompt"]) == (1, 2, "held-out level 0")
        assert np.array(second["sure"]).shape == (2, 2) and second["true"] is not None
        assert ask("/do", {"do": "undo"})["frame"] == first["frame"]
        assert ask("/do", {"do": "step", "code": 2})["frame"] == second["frame"]  # the same seed
        assert ask("/do", {"do": "step", "code": 6})["error"].startswith("code 6: must be")
        program.send_signal(signal.SIGTERM)
        assert program.wait() == 0 and program.stdout.read() == "stopped\n"
    finally:
        program.kill()


@pytest.mark.slow
def test_cloning_fits_coinrun(tmp_path, monkeypatch):
    """`bc` as it is run on the real game, traced alone: what it would train, and what it would measure."""
    shapes = dict(data="coinrun", num_levels=2, patch=32, lam_patch=32, bc_batch=2, bc_blocks=1, labels=8, dry_run=True)
    folder, params = save_run(tmp_path, replace(SMALL, **shapes))
    calls = []
    monkeypatch.setattr(genie, "run", lambda config, make, highlights, given: calls.append((config, make(config), given())))
    genie.clone(replace(SMALL, **shapes, stage="bc"), folder)
    ((config, train, given),) = calls
    assert (config.stage, config.num_updates) == ("bc", SMALL.bc_updates)
    jax.tree.map(np.testing.assert_array_equal, given["params"], params)
    keys = jax.eval_shape(jax.vmap(jax.random.key), np.arange(1))
    state = jax.eval_shape(jax.vmap(train.init), keys)
    assert jax.tree.map(np.shape, state.params) == jax.tree.map(np.shape, params)
    after, losses = jax.eval_shape(jax.vmap(train.update, (0, None)), state, jax.ShapeDtypeStruct((), np.int32))
    assert jax.tree.map(np.shape, after) == jax.tree.map(np.shape, state) and set(losses) == {"latent_loss", "oracle_loss"}
    results = jax.eval_shape(jax.vmap(train.evaluate), state)
    assert results["dictionary"].shape == (1, 15, 15) and {"won_latent", "won_oracle_3", "won_right_up"} <= set(results)


NOWHERE = ("--load", "nowhere")


@pytest.mark.parametrize(
    "flags", [("play",), ("sample", *NOWHERE), ("dynamics", *NOWHERE), ("play", "--port", "70000"), ("dynamics", "--load-parts")]
)
def test_what_cannot_be_loaded_is_one_line(flags, tmp_path):
    done = subprocess.run(command(*flags), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("genie: error: --") and done.stderr.count("\n") == 1, done.stderr


def test_a_run_begins_from_anothers_parameters(saved):
    folder, params = saved
    found = genie.starting_params(replace(SMALL, stage="lam"), folder)["params"]
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_part_alone_fits_whatever_the_sizes_of_the_others(saved):
    folder, params = saved
    changes = dict(stage="dynamics", load_parts=("tokenizer",), dynamics_width=24, num_actions=4)
    found = genie.starting_params(replace(SMALL, **changes), folder)["params"]
    assert set(found) == {"tokenizer"}
    jax.tree.map(np.testing.assert_array_equal, found["tokenizer"], params["tokenizer"])
    state = with_given(begin(replace(SMALL, num_actions=4)), {"params": found})
    assert state.params["tokenizer"] is found["tokenizer"] and state.params["lam"]["codebook"].shape == (1, 4, 8)
    with pytest.raises(UsageError, match="tokenizer/codebook is"):
        genie.starting_params(replace(SMALL, **changes, num_codes=8), folder)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(dynamics_width=24), r"dynamics/action is \[1, 8, 16\], this run has \[1, 8, 24\]"),
        (dict(num_actions=4), r"lam/codebook is \[1, 6, 8\], this run has \[1, 4, 8\]"),
        (dict(tokenizer="vit"), "tokenizer/decoder/blocks/time/.* this run has none"),
        (dict(num_seeds=2), "has 1 seeds, this run 2: give --num-seeds 1"),
    ],
)
def test_other_sizes_are_one_line(saved, changes, words):
    with pytest.raises(UsageError, match=words) as error:
        genie.starting_params(replace(SMALL, **changes), saved[0])
    assert "\n" not in str(error.value)


def test_runs_that_cannot_be_played_are_one_line(tmp_path):
    cases = [
        (dict(stage="lam"), "only its lam was trained"),
        (dict(stage="all", config=replace(SMALL, tokenizer_updates=4)), "only its tokenizer was trained"),
        (dict(settings={"dynamics_width": 24}), "this run has"),  # the settings do not fit the numbers beside them
        (dict(settings={"more": 1}), "no run of this version"),
        (dict(settings={"heads": "two"}), "no run of this version"),
    ]
    for i, (changes, words) in enumerate(cases):
        folder, _ = save_run(tmp_path / str(i), **changes)
        with pytest.raises(UsageError, match=words) as error:
            genie.trained_run(TINY, folder)
        assert "\n" not in str(error.value)
    (folder / "checkpoints" / "00000004.npz").write_bytes(b"damaged")
    with pytest.raises(UsageError, match="no checkpoint"):
        genie.trained_run(TINY, folder)
