"""Meshes over devices, and imports that leave the backend alone."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from sizes import METHODS, presets, tiny

from common.runs.devices import idle_devices, layout, make_mesh, shard_batch

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    "num_seeds, split_size, shape",
    [(4, 32, (2, 1)), (1, 32, (1, 2)), (3, 32, (1, 2)), (2, 33, (2, 1)), (6, 1, (2, 1)), (5, 2, (1, 2))],
)
def test_make_mesh(num_seeds, split_size, shape):
    assert jax.device_count() == 2, "the tests expect JAX_NUM_CPU_DEVICES=2"
    mesh = make_mesh(num_seeds, split_size)
    assert mesh.axis_names == ("seed", "data") and mesh.devices.shape == shape
    assert set(mesh.devices.ravel()) == set(jax.devices())


@pytest.mark.parametrize("num_seeds, split_size, better", [(1, 33, 2), (3, 33, 4), (5, 1, 6)])
def test_devices_that_do_not_divide_the_work_stay_idle(num_seeds, split_size, better):
    mesh = make_mesh(num_seeds, split_size)
    assert mesh.devices.shape == (1, 1)
    words = idle_devices(mesh, num_seeds, split_size)
    assert words == f"1 of 2 devices are idle: --num-seeds {better} would use all"
    assert idle_devices(make_mesh(4, 1), 4, 1) == ""


COUNTS = (*range(1, 17), 20, 24, 28, 36, 48, 64, 96, 128, 192)


@pytest.mark.parametrize("name", METHODS)
def test_every_preset_runs_on_any_number_of_devices(name):
    """By arithmetic: a layout divides seeds and batch and fits; none that fits is larger, or as large with more groups of seeds."""
    for config in presets(tiny(name)[0]).values():
        for num in COUNTS:
            groups, parts = layout(config.num_seeds, config.split_size, num)
            assert config.num_seeds % groups == 0 and config.split_size % parts == 0 and 1 <= groups * parts <= num
            others = [(g, p) for g in range(1, num + 1) for p in range(1, num // g + 1)]
            fit = [(g, p) for g, p in others if config.num_seeds % g == 0 and config.split_size % p == 0]
            assert (groups * parts, groups) == max((g * p, g) for g, p in fit)


def test_processes_have_equal_shares():
    """Three processes with two devices each share nine seeds as three groups, four seeds of a batch of 32 not at all."""
    assert layout(9, 1, 6, 3) == (3, 1) and layout(6, 1, 6, 3) == (6, 1) and layout(4, 32, 6, 3) == (0, 0)


def test_shard_batch():
    """Without a mesh nothing happens; with one the axis is split, under vmap over the seeds, and the numbers stay."""
    x = np.arange(3 * 8 * 5, dtype=np.float32).reshape(3, 8, 5)
    assert shard_batch(x) is x
    mesh = make_mesh(3, 8)
    with jax.set_mesh(mesh):
        run = jax.jit(jax.vmap(lambda x: shard_batch({"x": 2 * x})["x"], spmd_axis_name="seed"))
        y = run(jax.device_put(x, NamedSharding(mesh, PartitionSpec("seed"))))
        z = jax.jit(jax.vmap(lambda x: shard_batch(2 * x.T, axis=1), spmd_axis_name="seed"))(x)
    np.testing.assert_array_equal(y, 2 * x)
    np.testing.assert_array_equal(z, 2 * x.transpose(0, 2, 1))
    assert {shard.data.shape for shard in y.addressable_shards} == {(3, 4, 5)}
    assert {shard.data.shape for shard in z.addressable_shards} == {(3, 5, 4)}


def run_python(code, **env):
    """What the code prints, run in a fresh interpreter from the root of the repository."""
    hidden = ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    env = {k: v for k, v in os.environ.items() if k not in hidden} | env
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_imports_leave_the_backend_alone():
    """A backend started by an import would come before the devices are chosen, and before several hosts join."""
    paths = [path.relative_to(ROOT) for folder in ("common", "envs", "algos") for path in sorted((ROOT / folder).rglob("*.py"))]
    names = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in paths]
    assert {"common.ppo", "common.runs", "common.runs.files", "envs.maze", "algos.accel"} <= set(names)
    code = (
        f"import importlib, sys, jax\nfrom jax._src import xla_bridge\nfor name in {names}:\n"
        "    importlib.import_module(name)\n"
        "    assert not xla_bridge.backends_are_initialized(), name\n"
        "    assert not any(module.split('.')[0] == 'gymnax' for module in sys.modules), name\n"
        "jax.devices()\nassert xla_bridge.backends_are_initialized()\nprint('fine')"
    )
    assert run_python(code) == ["fine"]


SETUP = "import jax; from common.runs.devices import setup_devices; setup_devices({cache!r}); print(jax.device_count(), {shown})"
CACHE_DIR = "jax.config.jax_compilation_cache_dir"


def test_setup_devices_takes_every_core(tmp_path):
    cores = len(os.sched_getaffinity(0))
    assert run_python(SETUP.format(cache="none", shown=CACHE_DIR)) == [str(cores), "None"]
    code = SETUP.format(cache="~/programs", shown=CACHE_DIR)
    assert run_python(code, HOME=str(tmp_path)) == [str(cores), str(tmp_path / "programs")]


@pytest.mark.parametrize("env", [{"JAX_NUM_CPU_DEVICES": "3"}, {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}])
def test_setup_devices_respects_what_was_asked_for(env):
    assert run_python(SETUP.format(cache="none", shown=0), **env) == ["3", "0"]


def test_a_vmapped_program_over_the_mesh_gives_the_same_numbers():
    x = np.random.default_rng(0).normal(size=(1, 8, 4)).astype(np.float32)
    function = lambda x: jnp.tanh(shard_batch(x)).sum(0)
    expected = jax.jit(jax.vmap(function))(x)
    with jax.set_mesh(make_mesh(1, 8)):
        split = jax.jit(jax.vmap(function, spmd_axis_name="seed"))(x)
    np.testing.assert_allclose(split, expected, atol=1e-6)


EIGHT_DEVICES = """
import re, sys
import jax, jax.numpy as jnp, numpy as np
sys.path.insert(0, "tests")
from toy import Config, make_train
from common.runs.devices import make_mesh
from common.runs.programs import Programs

def trained(config, mesh):
    with jax.set_mesh(mesh):
        programs = Programs(config, make_train(config), mesh)
        start = programs.init()
        compiled = programs._chunk.lower(programs.state_shape, jnp.arange(config.log_every)).compile()
        state, metrics = programs.chunk(start, 0)
    return state, metrics, compiled

def compare(num_seeds, shape):
    config = Config(num_seeds=num_seeds, width=1000, batch=32, log_every=8, eval_every=8, save_every=8)
    mesh = make_mesh(num_seeds, config.split_size)
    assert mesh.devices.shape == shape
    one = jax.make_mesh((1, 1), ("seed", "data"), devices=jax.devices()[:1], axis_types=(jax.sharding.AxisType.Auto,) * 2)
    (state, metrics, many), (expected, expected_metrics, single) = trained(config, mesh), trained(config, one)
    for x, y in [*zip(jax.tree.leaves(state), jax.tree.leaves(expected)), *((metrics[k], expected_metrics[k]) for k in metrics)]:
        x, y = (jax.random.key_data(z) if jnp.issubdtype(z.dtype, jax.dtypes.prng_key) else z for z in (x, y))
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype and x.shape == y.shape
        np.testing.assert_allclose(x, y, rtol=2e-4 if x.dtype.kind == "f" else 0, atol=2e-4 if x.dtype.kind == "f" else 0)
    assert {shard.data.shape[0] for shard in state.seen.addressable_shards} == {num_seeds // shape[0]}
    size = lambda compiled: compiled.memory_analysis().temp_size_in_bytes + compiled.memory_analysis().argument_size_in_bytes
    collective = re.search("all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter", many.as_text())
    return size(many) / size(single), bool(collective)

share, collective = compare(64, (8, 1))
assert 0.1 < share < 0.16 and not collective, (share, collective)
share, collective = compare(2, (2, 4))
assert share < 0.45 and collective, (share, collective)
print("fine")
"""


@pytest.mark.slow
def test_eight_devices_do_what_one_does_with_an_eighth_of_the_memory():
    """64 seeds on 8 devices need no word between them; the batches of 2 seeds are split over 4 devices each."""
    assert run_python(EIGHT_DEVICES, JAX_NUM_CPU_DEVICES="8") == ["fine"]
