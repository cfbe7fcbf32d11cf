"""Settings that must stand before jax starts: two CPU devices, so that meshes can be tested; a cache of compiled programs in the
user's own cache folder, which serves every checkout; and XLA's dear optimisations left out: what is tested is small and runs
briefly, and compiling it is most of the time."""

import contextlib
import ctypes
import gc
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

# Without optimisation, with one thread's worth of files for LLVM, and without the emitters that go through MLIR: compiling takes a
# fifth of the time. A flag that this jaxlib does not know would end the process, so whether it does is asked of another one.
PLAIN = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
PLAINER = f"{PLAIN} --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"


def flags_that_are_known() -> str:
    """The flags for XLA that this jaxlib starts with."""
    for flags in (PLAINER, PLAIN):
        start = [sys.executable, "-c", "import jaxlib.xla_client as x; x.make_cpu_client()"]
        if subprocess.run(start, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True).returncode == 0:
            return flags
    return ""


def cache_folder() -> Path:
    """Where compiled programs of tests are kept: JAX's keys say which program, version and flags each is of."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = home / "nightjax" / "tests"
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    except (OSError, RuntimeError):  # no home, or one that cannot be written
        return Path(tempfile.gettempdir()) / "nightjax-tests"


os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_folder()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
if "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = flags_that_are_known()


def pytest_collection_modifyitems(items):
    """The contract first: it compiles what other tests then find compiled."""
    items.sort(key=lambda item: item.path.name != "test_contract.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file's tests run in one process, in their order; in the contract a method's. xdist's own loadgroup fails in pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file, _, rest = nodeid.partition("::")
            method = rest.partition("[")[2].split("-")[0].rstrip("]")
            return f"{file} {method}" if file.endswith("test_contract.py") else file

    return Scheduling(config, log)


gc.set_threshold(100_000, 20, 50)  # tracing makes many objects, few of them cycles: collecting took a tenth of the time


def held_mb() -> float:
    """The memory that this process holds now; without end where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except (OSError, ValueError, AttributeError):
        return math.inf


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Compiled programs of files before do not stay in memory when they take much of it."""
    yield
    if held_mb() > 1500:
        import jax

        jax.clear_caches()
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what was freed
