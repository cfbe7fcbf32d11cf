"""Sweeps: what shares a program, that a lane is what a run of its own is, results, resuming, refusals."""

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.runs.sweep import can_vary, config_of, group_configs, load_method, main, vary

ROOT = Path(__file__).resolve().parents[3]
TOY = ROOT / "tests" / "toy.py"


def command(*flags):
    return [sys.executable, "-m", "common.runs.sweep", str(TOY), *flags]


def sweep(folder, *flags):
    return subprocess.run(command(*flags), cwd=folder, capture_output=True, text=True)


def rows_of(path):
    return list(csv.DictReader(path.open()))


@pytest.fixture(scope="module")
def toy():
    return load_method(TOY)


# --- which settings share a program


@pytest.mark.parametrize(
    ("name", "values", "together"),
    [
        ("lr", (0.01, 0.1), True),
        ("noise", (0.1, 1.0), True),
        ("nan_at", (3, 5), True),  # an integer that is only compared
        ("batch", (8, 16), False),  # a shape
        ("decay", (0.0, 0.1), False),  # decides in Python
        ("preset", ("cpu", "paper"), False),  # no number
    ],
)
def test_what_changes_no_shape_shares_a_program(toy, name, values, together):
    assert can_vary(toy.make_train, toy.CPU, [{name: value} for value in values]) == together


def test_what_cannot_share_is_apart(toy):
    grid = [dict(lr=lr, batch=batch, num_updates=n) for lr in (0.01, 0.1) for batch in (8, 16) for n in (4, 8)]
    configs = [replace(toy.CPU, **combination) for combination in grid]
    groups = group_configs(toy.make_train, ["lr", "batch", "num_updates"], configs)
    assert [[(c.lr, c.batch, c.num_updates) for c in group] for group in groups] == [
        [(0.01, 8, 4), (0.1, 8, 4)], [(0.01, 8, 8), (0.1, 8, 8)], [(0.01, 16, 4), (0.1, 16, 4)], [(0.01, 16, 8), (0.1, 16, 8)]
    ]  # fmt: skip


def test_vary_chooses_and_keeps_types(toy):
    """A number stays of Python's kind: with a bfloat16 it gives a bfloat16. What all variants share stays a Python number."""
    variants = [dict(lr=0.1, noise=0.5, width=3), dict(lr=0.2, noise=0.5, width=5), dict(lr=0.4, noise=0.5, width=7)]

    def values(choice):
        config = vary(toy.CPU, variants, choice)
        assert config.noise == 0.5 and isinstance(config.noise, float)
        return config.lr * jnp.bfloat16(1), config.lr * jnp.float32(1), config.width * jnp.int8(1)

    for choice, expected in enumerate(variants):
        half, single, byte = jax.jit(values)(choice)
        assert (half.dtype, single.dtype, byte.dtype) == (jnp.bfloat16, jnp.float32, jnp.int8)
        assert single == np.float32(expected["lr"]) and byte == expected["width"]
    assert toy.CPU.lr == 0.05


def test_configs_are_read_and_checked_as_the_methods_own(toy):
    config = config_of(toy, ["--num-seeds", "3", "--noise", "0"], {"lr": "1e-2", "batch": "16"})
    assert config == replace(toy.CPU, num_seeds=3, noise=0.0, lr=0.01, batch=16)


# --- sweeps

FLAGS = ("--grid", "lr=0.01,0.1", "batch=8,16", "--num-seeds", "2", "--num-updates", "8")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    done = sweep(folder, *FLAGS)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "sweep-toy" / "1", done.stdout


def test_results(finished):
    folder, output = finished
    assert "4 combinations in 2 programs" in output and "error" in output
    rows = rows_of(folder / "results.csv")
    assert [(row["lr"], row["batch"], row["seed"]) for row in rows] == [
        (lr, batch, seed) for batch in ("8", "16") for lr in ("0.01", "0.1") for seed in ("0", "1")
    ]
    results = json.loads((folder / "results.json").read_text())
    for result in results["combinations"]:
        own = [float(row["error"]) for row in rows if float(row["lr"]) == result["lr"] and int(row["batch"]) == result["batch"]]
        stats = result["metrics"]["error"]
        np.testing.assert_allclose([stats["mean"], stats["stderr"]], [np.mean(own), np.std(own, ddof=1) / 2**0.5], rtol=1e-6)
    assert (folder / "results.png").stat().st_size > 0 and results["programs"] == 2


def test_a_lane_is_a_run_of_its_own(finished, tmp_path):
    flags = ("--lr", "0.1", "--batch", "16", "--num-seeds", "2", "--num-updates", "8", "--out", "run")
    subprocess.run([sys.executable, str(TOY), *flags], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    rows = [row for row in rows_of(finished[0] / "programs" / "1" / "metrics.csv") if row["lr"] == "0.1"]
    expected = rows_of(tmp_path / "run" / "metrics.csv")
    assert len(rows) == len(expected) == 10
    for row, other in zip(rows, expected, strict=True):
        np.testing.assert_allclose(*([float(x[name] or "nan") for name in other] for x in (row, other)), rtol=1e-4)


@pytest.mark.slow
def test_an_interrupted_sweep_resumes(finished, tmp_path):
    """A signal while the second program trains: the first is used as it is, the second goes on."""
    flags = (
        *FLAGS[:-1],
        "2000",
        "--out",
        "sweep",
        "--work",
        "300",
        "--save-every",
        "20",
        "--eval-every",
        "20",
        "--log-every",
        "20",
    )
    with subprocess.Popen(command(*flags), cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        folder = tmp_path / "sweep" / "programs"
        while not list((folder / "1" / "checkpoints").glob("*.npz")):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        output = process.communicate()[0]
    assert process.returncode == 0 and "--resume --out sweep\n" in output, output
    assert not (folder / "1" / "summary.json").exists()
    first = (folder / "0" / "summary.json").stat().st_mtime_ns
    done = sweep(tmp_path, *flags, "--resume")
    assert done.returncode == 0, done.stderr
    assert (folder / "0" / "summary.json").stat().st_mtime_ns == first and len(rows_of(tmp_path / "sweep" / "results.csv")) == 8
    assert [int(row["update"]) for row in rows_of(folder / "1" / "metrics.csv")] == [
        t for t in range(0, 2001, 20) for _ in range(4)
    ]
    assert "another sweep" in sweep(tmp_path, *flags, "--resume", "--seed", "1").stderr


def test_a_lane_that_diverges_ends_no_other(tmp_path):
    done = sweep(tmp_path, "--grid", "nan_at=-1,3", "--out", "sweep")
    assert done.returncode == 0, done.stderr
    fine, broken = rows_of(tmp_path / "sweep" / "results.csv")
    assert broken["error"] == "nan" and float(fine["error"]) > 0


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """The one line with which a sweep of the toy is refused, in this process, in an empty folder, in which nothing is left."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["sweep.py"])

    def ask(*args):
        with pytest.raises(SystemExit) as stop:
            main(list(args))
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1, err
        assert list(tmp_path.iterdir()) == []
        return err

    return ask


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--grid", "lr"], "must look like lr=1e-4,3e-4"),
        (["--grid", "speed=1"], "toy has no such setting"),
        (["--grid", "seed=1,2"], "is the same for the whole sweep"),
        (["--grid", "lr=0.1,-1"], "--lr -1.0: must be positive"),
        (["--grid", "lr=0.1,fast"], "fast"),
        (["--grid", "lr=0.1,1e-1"], "--grid: lr=0.1 is there twice"),
        (["--grid", "lr=0.1", "lr=0.2"], "lr is there twice"),
        (["--grid", "lr=0.1,0.2", "--metric", "error", "speed"], "--metric speed: there is env_steps, loss, never, rare, error"),
        (["--grid", "lr=0.1,0.2", "--out", ""], "--out: must not be empty"),
        (["--grid", "lr=0.1,0.2", "--resume"], "there is no run in runs/sweep-toy"),
        (["--grid", "lr=0.1,0.2", "--resume", "--out", "sweep"], "sweep holds no sweep"),
        ([], "are needed"),
    ],
)
def test_refusals(refused, flags, words):
    assert words in refused(str(TOY), *flags)


def test_a_dry_run_says_how_large_each_program_is(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    main([str(TOY), "--grid", "lr=0.01,0.1", "batch=8,16", "--num-seeds", "2", "--dry-run"])
    out = capsys.readouterr().out
    assert out.count("2 combinations: ") == 2 and "program 1" in out and "2 of 4 lanes on each" in out
    assert list(tmp_path.iterdir()) == []


def test_what_goes_on_needs_no_more_than_its_folder(finished, monkeypatch, tmp_path, capsys):
    """--resume and --out say it all; and what sweep.json does not say is refused."""
    shutil.copytree(finished[0].parents[2], tmp_path / "there")
    monkeypatch.chdir(tmp_path / "there")
    monkeypatch.setattr("sys.argv", ["sweep.py"])
    folder = Path("runs/sweep-toy/1")
    shutil.rmtree(folder / "programs" / "1")
    (folder / "programs" / "notes").mkdir()
    held = (folder / "results.csv").read_bytes()
    main(["--resume", "--out", str(folder)])
    assert (folder / "results.csv").read_bytes() == held and "4 combinations in 2 programs" in capsys.readouterr().out
    (folder / "sweep.json").write_text("{}")
    with pytest.raises(SystemExit):
        main(["--resume", "--out", str(folder)])
    assert "sweep.json is no sweep's" in capsys.readouterr().err
