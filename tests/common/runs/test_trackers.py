"""TensorBoard, Weights & Biases and JAX's profiler, each only where it is asked for."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.runs import trackers
from common.runs.config import UsageError

ROOT = Path(__file__).resolve().parents[3]

# Stand-ins that write what they are told to a file; the real packages are not needed for the tests.
WANDB = """
import json
def init(project, name, group, config, dir):
    class Run:
        def log(self, values, step):
            with open("wandb.jsonl", "a") as file:
                file.write(json.dumps([name, config["lr"], step, values]) + "\\n")
        def finish(self):
            open("wandb.finished", "w").close()
    return Run()
"""
SUMMARY = """
class Writer:
    def __init__(self, folder):
        self.path = folder + ".txt"
    def add_scalar(self, tag, data, step):
        with open(self.path, "a") as file:
            file.write(f"{step} {tag} {data}\\n")
    def flush(self):
        pass
    def close(self):
        open(self.path + ".closed", "w").close()
"""


def test_a_run_with_everything(tmp_path):
    packages = tmp_path / "packages"
    (packages / "tensorboard").mkdir(parents=True)
    (packages / "wandb.py").write_text(WANDB)
    (packages / "tensorboard" / "__init__.py").write_text("")
    (packages / "tensorboard" / "summary.py").write_text(SUMMARY)
    flags = ["--out", "run", "--num-seeds", "2", "--tensorboard", "--wandb", "--profile"]
    env = os.environ | {"PYTHONPATH": f"{packages}:{ROOT}"}
    subprocess.run([sys.executable, str(ROOT / "tests" / "toy.py"), *flags], cwd=tmp_path, env=env, check=True)

    told = [json.loads(line) for line in (tmp_path / "wandb.jsonl").read_text().splitlines()]
    assert [line[:3] for line in told] == [["toy-run", 0.05, update] for update in (0, 2, 4, 6, 8)]
    values = told[-1][3]
    assert values["env_steps/seed0"] == values["env_steps/seed1"] == values["env_steps"] == 64
    assert values["error"] == pytest.approx((values["error/seed0"] + values["error/seed1"]) / 2)
    written = (tmp_path / "run" / "tensorboard.txt").read_text().splitlines()
    assert f"8 error {values['error']}" in written and "2 env_steps/seed1 16.0" in written
    assert sum(path.stat().st_size for path in (tmp_path / "run" / "profile").rglob("*.xplane.pb")) > 0

    assert (tmp_path / "wandb.finished").exists() and (tmp_path / "run" / "tensorboard.txt.closed").exists()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["compile_s"] > 0 and summary["train_s"] > 0
    assert summary["compile_s"] + summary["train_s"] < summary["wall_s"]


@pytest.mark.parametrize("flag", ["tensorboard", "wandb"])
def test_a_package_that_is_missing_is_named(monkeypatch, flag):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    asked = dict(tensorboard=False, wandb=False)
    trackers.require_trackers(SimpleNamespace(**asked))
    with pytest.raises(UsageError, match=rf"--{flag}: the package {flag} is not installed: pip install 'nightjax\[{flag}\]'"):
        trackers.require_trackers(SimpleNamespace(**asked | {flag: True}))
