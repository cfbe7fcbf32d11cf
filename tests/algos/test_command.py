"""The commands of README, run as a user runs them."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(280)
ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "--num-envs 4 --num-steps 256 --hidden 8 --eval-episodes 1 --num-epochs 1 --num-minibatches 1 --buffer-size 16 --min-fill 0.2"
)
RUN = f"--num-seeds 2 --num-updates 8 --log-every 2 --eval-every 4 --save-every 4 {SMALL}"


def command(name, *flags):
    return [sys.executable, str(ROOT / "algos" / f"{name}.py"), *flags, "--cache", os.environ["JAX_COMPILATION_CACHE_DIR"]]


def start(folder, name, *flags):
    done = subprocess.run(command(name, *flags), cwd=folder, capture_output=True, text=True, timeout=240)
    return done


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of ACCEL."""
    folder = tmp_path_factory.mktemp("run")
    done = start(folder, "accel", *RUN.split())
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "accel" / "1", done.stdout


def test_a_run_leaves_all_its_files(finished):
    folder, output = finished
    assert "heldout_solve_rate" in output and "solve/Labyrinth" in output
    for name in ("config.json", "metrics.csv", "summary.json", "figures/curves.png", "figures/mazes.png", "videos/labyrinth.gif"):
        assert (folder / name).stat().st_size > 0, name
    summary = json.loads((folder / "summary.json").read_text())
    assert len(summary["final"]["heldout_solve_rate"]) == 2 and summary["steps_per_s"] > 0
    assert {"commit", "versions", "devices", "compile_s", "wall_s", "peak_rss_mb", "start"} <= set(summary)
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [(row["update"], row["seed"]) for row in rows] == [(str(u), str(s)) for u in (0, 2, 4, 6, 8) for s in (0, 1)]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["00000004.npz", "00000008.npz"]
    assert not list(folder.rglob(".*.tmp"))


def test_the_same_seed_gives_the_same_metrics(finished, tmp_path):
    assert start(tmp_path, "accel", *RUN.split(), "--out", "again").returncode == 0
    assert (tmp_path / "again" / "metrics.csv").read_bytes() == (finished[0] / "metrics.csv").read_bytes()


def test_a_stopped_run_resumes_to_the_same_end(finished, tmp_path):
    """SIGTERM in the middle: exit 0, a checkpoint, and after --resume the metrics of a run that was never stopped."""
    with subprocess.Popen(command("accel", *RUN.split(), "--out", "run"), cwd=tmp_path, stdout=subprocess.PIPE) as process:
        wait_for(lambda: "\n2,1," in read(tmp_path / "run" / "metrics.csv"))
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=120)[0].decode()
        assert process.returncode == 0 and ("--resume" in output or "summary.json" in output)
    assert start(tmp_path, "accel", *RUN.split(), "--out", "run", "--resume").returncode == 0
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == (finished[0] / "metrics.csv").read_bytes()


def wait_for(condition, seconds=200):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def read(path):
    return path.read_text() if path.exists() else ""


def refused(folder, *flags):
    """The one line of a refusal: code 2, nothing on stdout, quickly."""
    done = start(folder, "accel", *flags)
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 1, done.stderr
    assert done.stdout == ""
    return lines[0]


def test_bad_requests_end_with_one_line(finished, tmp_path):
    folder, _ = finished
    held = (folder / "metrics.csv").read_bytes()
    assert "multiple of --num-minibatches 4" in refused(tmp_path, "--num-envs", "30", "--num-minibatches", "4")
    assert "between 0 and 1" in refused(tmp_path, "--gamma", "1.5")
    assert "holds a run already" in refused(tmp_path, *RUN.split(), "--out", str(folder))
    assert "hidden=8 (now 16)" in refused(
        tmp_path, *RUN.replace("--hidden 8", "--hidden 16").split(), "--out", str(folder), "--resume"
    )
    assert "no run" in refused(tmp_path, *RUN.split(), "--resume")
    assert "multiple of 2" in refused(tmp_path, *RUN.split(), "--num-envs", "5", "--num-seeds", "1")
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(tmp_path, *RUN.split(), "--out", str(tmp_path / "file" / "run"))
    assert (folder / "metrics.csv").read_bytes() == held
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["accel", "plr", "dr", "paired", "sfl"])
def test_help_names_every_flag(name, tmp_path):
    done = start(tmp_path, name, "--help")
    assert done.returncode == 0
    for word in ("--preset", "--num-seeds", "--lr", "--resume", "Learning rate", "minimax"):
        assert word in done.stdout
