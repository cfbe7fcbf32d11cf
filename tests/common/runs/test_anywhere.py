"""What a run must not depend on: the system, the environment's variables, the session it is in, runs beside it, what lies in its
folder."""

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sizes import METHODS, ROOT, tiny

from common.runs import cli, run
from common.runs.checkpoint import write_atomically
from common.runs.config import UsageError
from common.runs.devices import num_cores
from common.runs.files import peak_rss
from common.runs.folder import Lock, new_folder
from common.runs.programs import NOTHING, Programs, mark, unmark
from common.runs.stop import SIGNALS, StopSignal

TOY = ROOT / "tests" / "toy.py"


@pytest.fixture(scope="module")
def toy():
    spec = importlib.util.spec_from_file_location("toy", TOY)
    module = sys.modules["toy"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def command(toy, tmp_path, monkeypatch):
    """Runs the toy's command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["toy.py"])
    return lambda *args: run(cli(toy.Config, toy.__doc__, {"cpu": toy.CPU}, [str(x) for x in args]), toy.make_train)


@pytest.fixture
def refused(command, capsys):
    """The one line with which a request of the toy ends, and its code."""

    def ask(*args, code=2):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            command(*args)
        err = capsys.readouterr().err
        assert stop.value.code == code and err.startswith("toy: error: ") and err.count("\n") == 1, err
        return err

    return ask


def started(folder, *flags, prelude="", **env):
    """The toy in a process of its own, which chooses its devices; `prelude` comes before it."""
    code = f"{prelude}\nimport sys, runpy\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    arguments = [sys.executable, "-c", code, str(TOY), *flags]
    plain = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
    env = plain | {"PYTHONPATH": str(ROOT)} | env
    return subprocess.run(arguments, cwd=folder, capture_output=True, text=True, env=env, encoding="utf-8")


def one_line(done, code):
    """The only line on stderr of a run that ended with `code`."""
    assert done.returncode == code and done.stderr.startswith("toy: error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


# --- systems


def test_calls_that_other_systems_lack(monkeypatch, tmp_path):
    """Affinity (Linux), resource and fcntl (not Windows), opening a folder (not Windows): each alone."""
    with monkeypatch.context() as patch:
        patch.delattr(os, "sched_getaffinity", raising=False)
        assert num_cores() == os.cpu_count()
        patch.setattr(os, "cpu_count", lambda: None)
        assert num_cores() == 1
    assert 50 < peak_rss() < 100_000
    with monkeypatch.context() as patch:
        patch.setattr("sys.platform", "darwin")  # which counts in bytes
        assert peak_rss() < 100
        patch.setitem(sys.modules, "resource", None)
        assert peak_rss() is None
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "fcntl", None)
        Lock(tmp_path).release()

    def open_no_folder(path, *args, real=os.open):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied")
        return real(path, *args)

    monkeypatch.setattr(os, "open", open_no_folder)
    write_atomically(tmp_path / "file", lambda file: file.write(b"x"))
    assert (tmp_path / "file").read_bytes() == b"x"


LACKING = """
import os, signal, sys, jax
for name in ("sched_getaffinity", "statvfs", "fork"):
    delattr(os, name)
del signal.SIGHUP
sys.modules["resource"] = sys.modules["fcntl"] = None
real = os.open
def open_no_folder(path, *args, **kwargs):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied")
    return real(path, *args, **kwargs)
os.open = open_no_folder
"""


def test_a_run_where_all_of_them_are_missing(tmp_path):
    done = started(tmp_path, "--out", "run", prelude=LACKING)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["peak_rss_mb"] is None and summary["final"]["error"]


# --- a session


def test_a_run_gives_back_what_it_takes(command, refused):
    """In a session in which JAX has been used: handlers, the thread, the output and the lock are as before, also after a refusal;
    Ctrl-C then means what it meant."""
    assert jax.devices()
    now = lambda: ([signal.getsignal(number) for number in SIGNALS], set(threading.enumerate()), sys.stdout)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = now()
    assert command("--out", "run") == Path("run")
    refused("--out", "run")
    refused("--out", "more", "--nan-at", 3, code=1)
    assert now() == before and not (Path("run") / Lock.NAME).exists()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    signal.signal(signal.SIGINT, handler)


def test_a_session_that_has_used_jax_keeps_its_devices(tmp_path):
    """No variable says how many; a session's own choice of a number is kept too."""
    done = started(tmp_path, "--out", "run", prelude="import jax; jax.devices()")
    assert done.returncode == 0 and "toy: 1 seeds on 1 devices" in done.stdout, done.stderr
    prelude = "import jax; jax.config.update('jax_num_cpu_devices', 3)"
    done = started(tmp_path, "--out", "three", "--num-seeds", "3", prelude=prelude)
    assert done.returncode == 0 and "toy: 3 seeds on 3 devices" in done.stdout, done.stderr


def test_what_was_ignored_before_stays_ignored():
    """As nohup, and a script's background, leave it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.1)
            assert not stop.notice()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_outside_of_the_main_thread(command):
    """No signal can be noted there; the run is one like any other."""
    thread = threading.Thread(target=command, args=("--out", "run"))
    thread.start()
    thread.join()
    assert (Path("run") / "summary.json").exists()


def test_nobody_reads_what_is_printed(tmp_path):
    """`| head`: the run stops after its chunk, saved, with code 0."""
    flags = "--out run --num-updates 100000 --save-every 100000 --eval-every 100000"
    shell = f"set -o pipefail; {sys.executable} {TOY} {flags} | head -n 0"
    done = subprocess.run(["bash", "-c", shell], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert int(saved.stem) < 100000


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(5, "Input/output error")])
def test_a_write_that_nobody_reads_asks_for_a_stop(error, monkeypatch):
    """To a pipe and to a terminal that are closed; no print fails."""

    class Closed:
        def write(self, text=""):
            raise error

        flush = fileno = write

    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", Closed())
        with StopSignal() as stop:
            print("x", flush=True)
            assert stop.notice()


# --- runs beside one another


def test_of_two_that_start_at_once_each_gets_its_own_folder(tmp_path):
    """Two processes ask for two hundred folders each, at once."""
    code = "import sys; from pathlib import Path; from common.runs.folder import new_folder\n"
    code += "input()\nfor _ in range(200): print(new_folder(Path('runs')))"
    options = dict(
        cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    pair = [subprocess.Popen([sys.executable, "-c", code], **options) for _ in range(2)]
    for process in pair:
        process.stdin.write("\n")
        process.stdin.flush()
    found = [process.communicate()[0].split() for process in pair]
    assert sorted(int(path.split("/")[1]) for paths in found for path in paths) == list(range(1, 401))


def test_names_that_are_no_numbers_are_passed_over(tmp_path):
    for name in ("²", "1 (copy)", "-3", "٣", "7"):
        (tmp_path / name).mkdir()
    assert new_folder(tmp_path) == tmp_path / "8"


def test_a_folder_in_use_is_refused_until_its_run_has_died(refused, command, tmp_path):
    command("--out", "run")
    held = Lock(tmp_path / "run")
    assert f"run is in use by another run (process {os.getpid()} on " in refused("--out", "run", "--resume")
    held.release()
    command("--out", "run", "--resume")
    code = (
        f"import time; from pathlib import Path; from common.runs.folder import Lock; x = Lock(Path({str(tmp_path / 'run')!r}))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code + "print(1, flush=True); time.sleep(600)"], cwd=ROOT, stdout=subprocess.PIPE
    )
    process.stdout.readline()
    assert f"(process {process.pid} on " in refused("--out", "run", "--resume")
    process.kill()
    process.wait()
    command("--out", "run", "--resume")
    (tmp_path / "new").mkdir()
    held = Lock(tmp_path / "new")
    assert "new is in use" in refused("--out", "new")
    held.release()
    assert not list((tmp_path / "new").iterdir())


def test_a_folder_that_is_taken_away(refused, command, toy, tmp_path, monkeypatch):
    """The run ends with code 1 and says where it has saved its state; from there it ends where it would have."""
    command("--out", "whole")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with monkeypatch.context() as patch:
        real = Programs.chunk

        def chunk(self, state, t):
            if t == 4:
                os.rename("run", "taken")  # in one step: a checkpoint may be on its way there
            return real(self, state, t)

        patch.setattr(Programs, "chunk", chunk)
        line = refused("--out", "run", code=1)
    assert "run is gone" in line
    hint = line.split("to go on: ")[1].split()
    folder = command(*hint)
    assert folder.parent == tmp_path
    assert (folder / "metrics.csv").read_bytes() == (tmp_path / "whole" / "metrics.csv").read_bytes()


def test_foreign_files_in_a_runs_folder(command, tmp_path):
    command("--out", "run")
    for name in ("figures/.ipynb_checkpoints", "figures/notes", "checkpoints/old", "figures/bars/x"):
        (tmp_path / "run" / name).mkdir()
    for name in ("figures/bars/1 (copy).png", "checkpoints/00000008 (copy).npz", "checkpoints/²².npz", "figures/1 (copy).png"):
        (tmp_path / "run" / name).write_bytes(b"foreign")
    command("--out", "run", "--resume", "--num-updates", 12, "--keep", 1)
    assert (tmp_path / "run" / "checkpoints" / "00000008 (copy).npz").exists()
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("0*2.npz")) == ["00000012.npz"]


# --- the hint is the command


def test_settings_of_a_resumed_run_are_its_own(command, refused, tmp_path):
    command("--out", "my run", "--lr", 0.03, "--num-seeds", 2, "--num-updates", 8, "--keep", 5)
    (tmp_path / "my run" / "checkpoints" / "00000008.npz").unlink()
    assert command("--resume", "--out", "my run") == Path("my run")
    settings = json.loads((tmp_path / "my run" / "config.json").read_text())
    assert (settings["lr"], settings["keep"]) == (0.03, 5)
    assert "lr=0.03 (now 0.1)" in refused("--resume", "--out", "my run", "--lr", 0.1)
    command("--resume", "--out", "my run", "--num-updates", 12, "--lr", 0.03)
    assert (tmp_path / "my run" / "checkpoints" / "00000012.npz").exists()
    command("--lr", 0.02, "--num-updates", 4)
    command("--resume", "--num-updates", 8)  # the newest
    assert json.loads(Path("runs/toy/1/config.json").read_text())["num_updates"] == 8


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no JSON", "cannot be read"),
        ("[1]", "holds no settings"),
        ('{"speed": 1}', "another method or version: it has the setting speed"),
        ('{"seed": "x"}', "another version"),
        ('{"seed": -1}', "--seed -1"),
    ],
)
def test_settings_that_say_nothing(refused, tmp_path, text, words):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(text)
    assert words in refused("--resume", "--out", "run")


# --- the environment


def test_what_a_notebook_and_a_plain_terminal_leave_in_the_environment(tmp_path):
    """A backend for drawing that is not there, an output that knows ASCII alone, NaN checks: the run is as it would be; `[`, `]` in
    its folder's name are no markup."""
    env = dict(MPLBACKEND="module://not_there", PYTHONIOENCODING="ascii", JAX_DEBUG_NANS="1")
    done = started(tmp_path, "--out", "a [bold] ä", **env)
    assert done.returncode == 0 and "writing to a [bold] ?" in done.stdout, done.stdout + done.stderr
    assert (tmp_path / "a [bold] ä" / "figures" / "curves.png").exists()
    rows = (tmp_path / "a [bold] ä" / "metrics.csv").read_text()
    assert ",nan" in rows and str(NOTHING)[:6] not in rows


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("JAX_PLATFORMS", "nowhere", "JAX finds no device with JAX_PLATFORMS=nowhere"),
        ("JAX_DISABLE_JIT", "1", "JAX_DISABLE_JIT is set"),
    ],
)
def test_what_cannot_be_in_the_environment_is_one_line(tmp_path, variable, value, words):
    assert words in one_line(started(tmp_path, "--out", "run", **{variable: value}), 2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["dr", *(pytest.param(name, marks=pytest.mark.slow) for name in METHODS if name != "dr")])
def test_types_do_not_depend_on_x64(name):
    """With JAX_ENABLE_X64 a method's state and metrics have the types that they have without."""
    module, config = tiny(name, dry_run=True)
    with jax.enable_x64():
        train = module.make_train(config)
        state = jax.eval_shape(train.init, jax.eval_shape(lambda: jax.random.key(0)))
        after, metrics = jax.eval_shape(train.update, state, jax.ShapeDtypeStruct((), jnp.int32))
        results = jax.eval_shape(train.evaluate, state)
    types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert types(after) == types(state)
    assert not {x.dtype for x in jax.tree.leaves((state, metrics, results))} & {np.dtype("int64"), np.dtype("float64")}


def test_marks_come_back_as_nan():
    metrics = {"a": np.float32([1, np.nan, np.inf]), "b": np.int32([1, 2, 3]), "c": np.float32([-np.inf, 0, 3])}
    marked = jax.jit(mark)(metrics)
    assert not np.isnan(marked["a"]).any()
    jax.tree.map(np.testing.assert_array_equal, unmark(jax.device_get(marked)), metrics)


# --- paths and seeds


def test_a_path_with_a_tilde_is_in_the_home(command, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    command("--out", "~/run")
    assert (tmp_path / "home" / "run" / "summary.json").exists() and not (tmp_path / "~").exists()
    assert dataclasses.replace(tiny("genie")[1], data="~/videos").data == str(tmp_path / "home" / "videos")


def test_empty_paths_and_seeds_beyond_32_bits_are_refused(refused):
    assert "--out: must not be empty" in refused("--out", "")
    assert "--cache: must not be empty" in refused("--cache=")
    assert f"--seed {2**31 - 1}: must be at most {2**31 - 2}" in refused("--seed", 2**31 - 1, "--num-seeds", 2)
    assert "--seed" in refused("--seed", 2**40)
    for name, setting in (("genie", "load"), ("genie", "data"), ("madrid", "league")):
        with pytest.raises(UsageError, match=f"--{setting}: must not be empty"):
            tiny(name, **{setting: ""})
