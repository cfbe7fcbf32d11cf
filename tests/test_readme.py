"""What README shows, word by word where one machine can run it: its commands, what they print, and its snippets."""

import csv
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from sizes import tiny

ROOT = Path(__file__).resolve().parents[1]


def commands(language="bash", section="Scaling"):
    """The fenced blocks of a section of README."""
    section = (ROOT / "README.md").read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.S)


@pytest.mark.slow
def test_loopback(tmp_path):
    """As it is printed, but for the port, which must be free here; in a copy of the tree, so that its runs/ stay there."""
    (command,) = (text for text in commands() if "127.0.0.1" in text)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        command = command.replace(":9911", f":{free.getsockname()[1]}")
    for name in ("algos", "common", "envs"):
        (tmp_path / name).symlink_to(ROOT / name)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "HOME": str(ROOT / ".cache" / "home")}
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "error" not in done.stderr.lower(), done.stderr
    assert done.stdout.count("dr: 4 seeds on") == 1, done.stdout
    folder = tmp_path / "runs" / "loopback"
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [(row["update"], row["seed"]) for row in rows] == [(str(u), str(s)) for u in (0, 2, 4, 6, 8) for s in range(4)]
    assert (folder / "summary.json").exists() and (folder / "checkpoints" / "00000008.npz").exists()


def test_what_a_dry_run_prints():
    shown = next(text for text in commands("") if text.startswith("accel, preset"))
    command = [sys.executable, str(ROOT / "algos" / "accel.py"), "--preset", "paper", "--num-seeds", "4", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_NUM_CPU_DEVICES": "2"})
    upper_bounds = r"^  (update|evaluation) .*$"  # what a program holds is JAX's, and its versions differ
    assert re.sub(upper_bounds, "", done.stdout, flags=re.M) == re.sub(upper_bounds, "", shown, flags=re.M)
    assert len(re.findall(upper_bounds, done.stdout, re.M)) == 2


@pytest.mark.slow
def test_snippets(monkeypatch, tmp_path):
    """In one session after another, at the tests' sizes."""
    first, notebook = commands("python", "Use it as a library")
    monkeypatch.setattr("algos.accel.CPU", tiny("accel")[1])
    monkeypatch.chdir(tmp_path)
    for text in (first, notebook):
        exec(text, names := {})
    assert names["folder"] == Path("runs/accel/1") and (names["folder"] / "summary.json").exists()
