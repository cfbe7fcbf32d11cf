"""The commands of README's scaling section, word by word where one machine can run them."""

import csv
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def commands(language="bash"):
    """The fenced commands of README's section on scaling."""
    section = (ROOT / "README.md").read_text().split("## Scaling")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.S)


@pytest.mark.timeout(280)
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
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=270)
    assert done.returncode == 0 and "error" not in done.stderr.lower(), done.stderr
    assert done.stdout.count("dr: 4 seeds on") == 1, done.stdout
    folder = tmp_path / "runs" / "loopback"
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [(row["update"], row["seed"]) for row in rows] == [(str(u), str(s)) for u in (0, 2, 4, 6, 8) for s in range(4)]
    assert (folder / "summary.json").exists() and (folder / "checkpoints" / "00000008.npz").exists()
