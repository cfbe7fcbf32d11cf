"""The commands of README, run as a user runs them: those of ACCEL, and of its exported file."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from sizes import ROOT, flags

from algos import accel
from common.runs.command import cli
from common.runs.loop import run
from common.standalone import export

# Runs before a file: our packages, installed or not, cannot be imported.
BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("algos", "common", "envs", "results"):
            raise ImportError(f"{name} is imported from the repository")

sys.meta_path.insert(0, Block())
import runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')
"""
RUN = flags("accel")


def command(name, *args):
    return [sys.executable, str(ROOT / "algos" / f"{name}.py"), *args, "--cache", os.environ["JAX_COMPILATION_CACHE_DIR"]]


def start(folder, name, *args):
    return subprocess.run(command(name, *args), cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of ACCEL."""
    folder = tmp_path_factory.mktemp("run")
    done = start(folder, "accel", *RUN)
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
    assert [(row["update"], row["seed"]) for row in rows] == [(u, s) for u in "024" for s in "01"]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["00000002.npz", "00000004.npz"]
    assert not list(folder.rglob(".*.tmp"))


def isolated(folder, *args):
    """Runs a file where nothing of the repository can be imported."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([sys.executable, "-I", "-c", BLOCK, *args], cwd=folder, capture_output=True, text=True, env=env)


def test_an_exported_file_trains_as_the_original_does(finished, tmp_path):
    """In an empty folder, where an algorithm that was not exported fails: the same metrics, to the last bit, of the same seed."""
    (tmp_path / "my_accel.py").write_text(export(ROOT / "algos" / "accel.py"))
    done = isolated(tmp_path, "my_accel.py", *RUN, "--cache", os.environ["JAX_COMPILATION_CACHE_DIR"])
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "my_accel" / "1"
    assert (run / "metrics.csv").read_bytes() == (finished[0] / "metrics.csv").read_bytes()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["method"] == "my_accel" and summary["commit"] is None, "an empty folder is no checkout"
    done = isolated(tmp_path, str(ROOT / "algos" / "accel.py"), "--help")
    assert done.returncode == 1 and "common is imported from the repository" in done.stderr


@pytest.mark.slow
def test_a_stopped_run_resumes_to_the_same_end(finished, tmp_path):
    """SIGTERM in the middle: exit 0, a checkpoint, and after --resume the metrics of a run that was never stopped."""
    with subprocess.Popen(command("accel", *RUN, "--out", "run"), cwd=tmp_path, stdout=subprocess.PIPE) as process:
        while process.poll() is None and "\n2,1," not in read(tmp_path / "run" / "metrics.csv"):
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        output = process.communicate()[0].decode()
        assert process.returncode == 0 and ("--resume" in output or "summary.json" in output)
    assert start(tmp_path, "accel", *RUN, "--out", "run", "--resume").returncode == 0
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == (finished[0] / "metrics.csv").read_bytes()


def read(path):
    return path.read_text() if path.exists() else ""


def one_line(code, out, err):
    """The one line of a refusal: code 2, nothing on stdout."""
    lines = [line for line in err.splitlines() if line]
    assert (code, out, len(lines)) == (2, "", 1), out + err
    return lines[0]


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """Runs a request of ACCEL in this process, in an empty folder -> the one line with which it is refused."""
    monkeypatch.chdir(tmp_path)

    def ask(*args):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run(cli(accel.Config, accel.__doc__, {"cpu": accel.CPU, "paper": accel.PAPER}, list(args)), accel.make_train)
        return one_line(stop.value.code, *capsys.readouterr())

    return ask


def test_bad_requests_end_with_one_line(finished, refused, tmp_path):
    folder, _ = finished
    held = (folder / "metrics.csv").read_bytes()
    done = start(tmp_path, "accel", "--num-envs", "30", "--num-minibatches", "4")
    assert "multiple of --num-minibatches 4" in one_line(done.returncode, done.stdout, done.stderr)
    assert "between 0 and 1" in refused("--gamma", "1.5")
    assert "holds a run already" in refused(*RUN, "--out", str(folder))
    assert "hidden=8 (now 16)" in refused(*RUN, "--hidden", "16", "--out", str(folder), "--resume")
    assert "no run" in refused(*RUN, "--resume")
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(*RUN, "--out", str(tmp_path / "file" / "run"))
    assert (folder / "metrics.csv").read_bytes() == held
    assert not (tmp_path / "runs").exists()
