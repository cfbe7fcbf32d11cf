"""Several processes on this machine as one run: the same results, files by the first only, stopping and failing together."""

import csv
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[3]
FLAGS = ("--num-updates", "8", "--out", "run")


def start(folder, num, *flags, before=()):
    """`num` processes of the toy in folders of their own, as on hosts that share no files. `before` begins the first's command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = []
    for index in range(num):
        env = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
        if num > 1:
            env |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(num), "JAX_PROCESS_ID": str(index)}
        (folder / str(index)).mkdir(parents=True, exist_ok=True)
        command = [*(() if index else before), sys.executable, str(ROOT / "tests" / "toy.py"), *flags]
        options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        processes.append(subprocess.Popen(command, cwd=folder / str(index), env=env, **options))
    return processes


def end(processes):
    """Waits for all of them -> codes, outputs, error outputs. None of them outlives the test."""
    try:
        outputs = [process.communicate() for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], *zip(*outputs, strict=True)


def trained(folder, num, *flags):
    """The rows of metrics.csv of a run that must succeed."""
    codes, _, errors = end(start(folder, num, *flags))
    assert codes == [0] * num, errors
    return list(csv.DictReader((folder / "0" / "run" / "metrics.csv").open()))


def assert_close(rows, expected):
    """The same integers, and the same floats but for the order in which they were summed."""
    assert [row.keys() for row in rows] == [row.keys() for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert all(row[name] == other[name] for name in ("update", "seed", "env_steps"))
        floats = [[float(x[name] or "nan") for name in x] for x in (row, other)]
        np.testing.assert_allclose(*floats, rtol=1e-4)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process with one device gives for four seeds."""
    return trained(tmp_path_factory.mktemp("alone"), 1, *FLAGS, "--num-seeds", "4")


def test_two_processes_give_what_one_does(alone, tmp_path):
    assert_close(trained(tmp_path, 2, *FLAGS, "--num-seeds", "4"), alone)
    assert sorted(path.name for path in (tmp_path / "0" / "run" / "checkpoints").iterdir()) == ["00000004.npz", "00000008.npz"]
    assert list((tmp_path / "1").iterdir()) == []


@pytest.mark.slow
def test_four_processes_split_the_batches_of_two_seeds(alone, tmp_path):
    rows = trained(tmp_path, 4, *FLAGS, "--num-seeds", "2")
    assert_close(rows, [row for row in alone if row["seed"] in "01"])
    assert all(list((tmp_path / str(index)).iterdir()) == [] for index in (1, 2, 3))


@pytest.mark.slow
def test_a_signal_to_one_stops_all_and_all_resume(tmp_path):
    flags = ("--num-updates", "80", "--out", "run", "--num-seeds", "2", "--work", "2000")
    whole = trained(tmp_path / "whole", 2, *flags)
    processes, metrics = start(tmp_path, 2, *flags), tmp_path / "0" / "run" / "metrics.csv"
    while not (metrics.exists() and "\n4,1," in metrics.read_text()):
        assert not any(process.poll() for process in processes), end(processes)
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    codes, outputs, errors = end(processes)
    assert codes == [0, 0], errors
    saved = max((tmp_path / "0" / "run" / "checkpoints").iterdir())
    assert 4 <= int(saved.stem) < 80 and f"saved in run/checkpoints/{saved.name}" in outputs[0] and "saved" not in outputs[1]
    assert trained(tmp_path, 2, *flags, "--resume") == whole


@pytest.mark.slow
def test_what_the_first_cannot_write_ends_all(tmp_path):
    limit = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900)); os.execv(sys.argv[1], sys.argv[1:])"
    codes, _, errors = end(start(tmp_path, 2, *FLAGS, before=(sys.executable, "-c", limit)))
    assert codes == [1, 1] and "run cannot be written: File too large" in errors[0] and "error:" not in errors[1], errors
    (tmp_path / "0" / "run" / "config.json").touch()
    codes, _, errors = end(start(tmp_path, 2, *FLAGS))
    assert codes == [2, 2] and "holds a run already" in errors[0], errors


@pytest.mark.parametrize(
    ("variables", "words"), [({"JAX_NUM_PROCESSES": "2"}, "need all of"), ({"JAX_PROCESS_ID": "2"}, "need all of")]
)
def test_variables_that_do_not_fit_together_are_refused(tmp_path, variables, words):
    code = "from common.runs.config import UsageError\nfrom common.runs.hosts import join_hosts\n"
    code += f"try:\n    join_hosts(False)\nexcept UsageError as error:\n    assert {words!r} in str(error)\nelse:\n    assert 0"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | variables, check=True)
