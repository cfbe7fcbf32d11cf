"""What a run survives: being killed or told to stop at any moment, full disks, read-only folders, numbers that are not finite.

NIGHTJAX_KILLS=20 kills the run of the long test 20 times rather than 3.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[3]
KILLS = int(os.environ.get("NIGHTJAX_KILLS", "3"))


def command(*flags):
    return [sys.executable, str(ROOT / "tests" / "toy.py"), *map(str, flags)]


def toy(folder, *flags, before=()):
    """Runs the toy in a folder; `before` comes before its command: without a cache then, whose files would be cut off too."""
    env = os.environ | ({"JAX_ENABLE_COMPILATION_CACHE": "false"} if before else {})
    return subprocess.run([*before, *command(*flags)], cwd=folder, capture_output=True, text=True, env=env)


# Runs a command with the signals as a terminal leaves them: a background's and nohup's children ignore some.
HEED = "import os, signal, sys; [signal.signal(x, signal.SIG_DFL) for x in (1, 2, 15)]; os.execv(sys.argv[1], sys.argv[1:])"


def begun(folder, *flags):
    """The toy, running."""
    heeding = [sys.executable, "-c", HEED, *command(*flags)]
    return subprocess.Popen(heeding, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition):
    while not condition():
        time.sleep(0.01)


def one_line(done, code):
    """The only line on stderr of a run that ended with `code`."""
    assert done.returncode == code, done.stdout + done.stderr
    assert done.stderr.startswith("toy: error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def assert_same_end(folder, expected):
    """The same metrics.csv and, bit for bit, the same last checkpoint."""
    assert (folder / "metrics.csv").read_bytes() == (expected / "metrics.csv").read_bytes()
    ours, theirs = (max((path / "checkpoints").glob("*.npz")) for path in (folder, expected))
    assert ours.name == theirs.name
    with np.load(ours) as ours, np.load(theirs) as theirs:
        assert set(ours.files) == set(theirs.files)
        for name in set(ours.files) - {"__meta__"}:  # which says how long it took
            assert ours[name].tobytes() == theirs[name].tobytes(), name
    assert not list(folder.rglob(".*.tmp"))


# --- killed, and told to stop

UPDATES = 300 * (KILLS + 1)
LONG = f"--num-seeds 2 --num-updates {UPDATES} --log-every 5 --eval-every 20 --save-every 10 --work 300".split()


def last_update(folder):
    """The update of the newest whole line of metrics.csv."""
    lines = read(folder / "metrics.csv").split("\n")[1:-1]
    return int(lines[-1].split(",")[0]) if lines else 0


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_where_an_uninterrupted_run_does(tmp_path):
    """Three kills of four fall while it trains, the others while it starts."""
    done = toy(tmp_path, *LONG, "--out", "whole")
    assert done.returncode == 0, done.stderr
    folder, chance, moments, resume = tmp_path / "killed", random.Random(), [], []
    for kill in range(KILLS):
        with begun(tmp_path, *LONG, "--out", "killed", *resume) as process:
            if chance.random() < 0.75:
                last = last_update(folder)
                target = last + chance.random() * (UPDATES - last) / (KILLS - kill + 1)
                wait_for(lambda process=process, target=target: last_update(folder) > target or process.poll() is not None)
                time.sleep(chance.uniform(0, 0.05))
            else:
                time.sleep(chance.uniform(0, 2))
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL, process.stdout.read()
        moments.append(last_update(folder))
        resume = ["--resume"] if (folder / "config.json").exists() else []
    done = toy(tmp_path, *LONG, "--out", "killed", *resume)
    assert done.returncode == 0, done.stdout + done.stderr
    print("killed after updates", *moments, "of", UPDATES)
    assert_same_end(folder, tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_stops(tmp_path, number):
    flags = ("--out", "run", "--num-updates", "100000", "--save-every", "100000", "--eval-every", "100000", "--work", "1000")
    with begun(tmp_path, *flags) as process:
        wait_for(lambda: "\n2,0," in read(tmp_path / "run" / "metrics.csv"))
        process.send_signal(number)
        output = process.communicate()[0]
    assert process.returncode == 0, output
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert f"stopped after {int(saved.stem)} updates" in output
    assert f"saved in run/checkpoints/{saved.name}; to go on: --resume --out run" in output


def read(path):
    return path.read_text() if path.exists() else ""


STOP = """
import os, signal, sys, time
import common.runs.stop
common.runs.stop.GRACE = 0.3
with common.runs.stop.StopSignal(lambda: print("gave up", flush=True)) as stop:
    for _ in range({signals}):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
    while {notice} and not stop.notice():
        time.sleep(0.01)
    time.sleep({wait})
print("went on", stop.asked)
"""


STOPS = [(1, False, 0, "gave up"), (1, True, 0, "went on True"), (2, True, 1, ""), (0, False, 0, "went on False")]


@pytest.mark.parametrize(("signals", "notice", "code", "said"), STOPS)
def test_a_chunk_that_does_not_end_in_time_is_given_up(signals, notice, code, said):
    """One signal and no notice, noticed in time, a second signal, none."""
    wait = 1 if "went on" in said else 600
    program = [sys.executable, "-c", STOP.format(signals=signals, notice=notice, wait=wait)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (code, said), done.stderr


# --- disks


def limit_files(size):
    """What runs a command so that no file may grow beyond `size` bytes, as if the disk were full."""
    limit = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))"
    return sys.executable, "-c", f"import os, resource, sys; {limit}; os.execv(sys.argv[1], sys.argv[1:])"


def test_a_full_disk_ends_the_run_and_loses_nothing(tmp_path):
    """First next to nothing fits, then no checkpoint, then no later one (they grow with the rows of metrics.csv)."""
    flags = ("--num-updates", 80, "--log-every", 1, "--eval-every", 80, "--num-seeds", 2, "--width", 500)
    assert toy(tmp_path, *flags, "--out", "whole").returncode == 0
    first, last = 4 * 3 * 2 * 500, max((tmp_path / "whole" / "checkpoints").iterdir()).stat().st_size  # parameters, Adam's moments
    for limit, resume in ((1000, []), (first, ["--resume"])):
        line = one_line(toy(tmp_path, *flags, "--out", "run", *resume, before=limit_files(limit)), 1)
        assert "run cannot be written: File too large" in line and "nothing was saved yet" in line
    line = one_line(toy(tmp_path, *flags, "--out", "run", "--resume", before=limit_files((first + last) // 2)), 1)
    saved = sorted((tmp_path / "run" / "checkpoints").glob("*.npz"))
    assert len(saved) == 2 and f"saved in {saved[-1].relative_to(tmp_path)}" in line
    assert toy(tmp_path, *flags, "--out", "run", "--resume").returncode == 0
    assert_same_end(tmp_path / "run", tmp_path / "whole")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_is_full_or_read_only(small_disk):
    flags = ("--num-updates", "8", "--log-every", "2", "--save-every", "2", "--width", "20000", "--keep", "9")
    line = one_line(toy(small_disk, *flags, "--out", "run"), 1)
    assert "run cannot be written: No space left on device" in line
    saved = max((small_disk / "run" / "checkpoints").glob("*.npz"))
    assert f"saved in run/checkpoints/{saved.name}" in line
    held = saved.read_bytes()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert "run cannot be written: Read-only file system" in one_line(toy(small_disk, *flags, "--out", "run", "--resume"), 2)
    assert "new cannot be written: Read-only file system" in one_line(toy(small_disk, *flags, "--out", "new"), 2)
    subprocess.run(["mount", "-o", "remount,rw,size=9m", small_disk], check=True)
    assert saved.read_bytes() == held
    assert toy(small_disk, *flags, "--out", "run", "--resume").returncode == 0


# --- damage


def damage(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    flags = ("--num-updates", "8", "--width", "3000", "--keep", "1", "--out")
    assert toy(tmp_path, *flags, "whole", "--keep", "2").returncode == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    damage(folder / "00000008.npz")
    done = toy(tmp_path, *flags, "run", "--resume")
    assert done.returncode == 0 and "passing over the damaged checkpoint run/checkpoints/00000008.npz" in done.stdout
    assert_same_end(tmp_path / "run", tmp_path / "whole")
    assert sorted(path.name for path in folder.iterdir()) == ["00000008.damaged", "00000008.npz"]
    damage(folder / "00000008.npz")
    held = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.*")}
    assert "holds no good checkpoint" in one_line(toy(tmp_path, *flags, "run", "--resume"), 2)
    assert held == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.*")}


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    """As a hostile file would be: its settings are right, its arrays are not."""
    assert toy(tmp_path, "--out", "run").returncode == 0
    path = tmp_path / "run" / "checkpoints" / "00000008.npz"
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **arrays | {"params/w": np.zeros((1, 5), np.float32)})
    assert "params/w is float32 float32[1, 5], this run has float32[1, 4]" in one_line(toy(tmp_path, "--out", "run", "--resume"), 2)


# --- not finite


def test_parameters_that_are_not_finite_stop_the_run(tmp_path):
    flags = ("--num-updates", "16", "--nan-at", "8", "--num-seeds", "2", "--out", "run")
    line = one_line(toy(tmp_path, *flags), 1)
    assert "update 9, seed 0: the parameters are no longer finite, nor is loss" in line and "--allow-nan" in line
    assert sorted(path.stem for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["00000004", "00000008"]
    assert "rare" in read(tmp_path / "run" / "metrics.csv")  # a metric that is often NaN, and one that always is, stop nothing
    assert toy(tmp_path, *flags, "--resume", "--allow-nan").returncode == 0
    assert "\n16,1,nan," in read(tmp_path / "run" / "metrics.csv")


def test_a_finished_run_goes_on(tmp_path):
    """A setting that may grow may, to the end of a run that had it from the start; it may not shrink, nor may others change."""
    for out, updates in (("whole", 12), ("grown", 8)):
        assert toy(tmp_path, "--num-updates", updates, "--out", out).returncode == 0
    for flags, said in ((("--num-updates", 4), "num_updates=8 (now 4)"), (("--num-updates", 12, "--lr", 0.1), "lr=0.05 (now 0.1)")):
        assert said in one_line(toy(tmp_path, *flags, "--out", "grown", "--resume"), 2)
    assert toy(tmp_path, "--num-updates", 12, "--out", "grown", "--resume").returncode == 0
    assert_same_end(tmp_path / "grown", tmp_path / "whole")
    assert json.loads((tmp_path / "grown" / "config.json").read_text())["num_updates"] == 12
