"""Devices: one mesh with axes ("seed", "data") over as many as divide the work: seeds first, then each seed's batch."""

import contextlib
import os

import jax
import numpy as np
from jax.sharding import PartitionSpec

from common.runs.config import CACHE, UsageError, require


def num_cores() -> int:
    """The cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux has it
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def setup_devices(cache: str) -> None:
    """Chooses devices and the compilation cache. Where JAX was used before in this process, it keeps the devices that it has.

    On CPU XLA gets one device per core: small programs on one device keep little more than one core busy. A number of devices, or a
    cache, that was chosen otherwise (by a variable, or in a session) is respected. Raises UsageError where JAX cannot start.
    """
    require(not jax.config.jax_disable_jit, "JAX_DISABLE_JIT is set, and a run is nothing but compiled programs: unset it")
    explicit = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not explicit and jax.config.jax_num_cpu_devices < 0:
        with contextlib.suppress(RuntimeError):  # it has its devices already
            jax.config.update("jax_num_cpu_devices", num_cores())
    chosen = jax.config.jax_compilation_cache_dir and os.path.expanduser(cache) == os.path.expanduser(CACHE)
    if cache.lower() != "none" and not chosen:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    try:
        jax.devices()
    except RuntimeError as error:
        asked = os.environ.get("JAX_PLATFORMS", "")
        raise UsageError(f"JAX finds no device{f' with JAX_PLATFORMS={asked}' if asked else ''}: {_first(error)}") from error


def _first(error: Exception) -> str:
    return (str(error).splitlines() or ["it does not say why"])[0]


def layout(num_seeds: int, split_size: int, num_devices: int, num_processes: int = 1) -> tuple[int, int]:
    """How seeds and batches are laid out: (groups of seeds, parts of each batch), their product the devices used.

    It is the largest product of a divisor of the seeds and one of the batch that the devices suffice for, and that all processes
    have an equal share in; of equal ones that with the most groups. (0, 0) where no share is equal.
    """
    divisors = lambda num: [i for i in range(1, min(num, num_devices) + 1) if num % i == 0]
    pairs = [(groups, parts) for groups in divisors(num_seeds) for parts in divisors(split_size)]
    fits = [(groups, parts) for groups, parts in pairs if groups * parts <= num_devices and groups * parts % num_processes == 0]
    return max(fits, key=lambda pair: (pair[0] * pair[1], pair[0]), default=(0, 0))


def make_mesh(num_seeds: int, split_size: int) -> jax.sharding.Mesh:
    """A mesh (seed, data) of as many devices as divide the work: groups of seeds, each of which splits its seeds' batch axis of
    `split_size`. Raises UsageError where several processes cannot have equal shares."""
    num, processes = even_devices(), jax.process_count()
    groups, parts = layout(num_seeds, split_size, num, processes)
    if not groups:
        raise UsageError(
            f"{num_seeds} seeds with batches of {split_size} cannot be shared by {processes} processes evenly: "
            f"make the seeds, or the batch, a multiple of {processes}"
        )
    auto = (jax.sharding.AxisType.Auto,) * 2
    if groups * parts == jax.device_count():
        return jax.make_mesh((groups, parts), ("seed", "data"), axis_types=auto)
    share = groups * parts // processes
    used = [device for process in range(processes) for device in _devices_of(process)[:share]]
    return jax.sharding.Mesh(np.array(used).reshape(groups, parts), ("seed", "data"), axis_types=auto)


def even_devices() -> int:
    """The devices of all processes of which each has as many as the one with the fewest."""
    processes = range(jax.process_count())
    return len(processes) * min(len(_devices_of(process)) for process in processes)


def _devices_of(process: int) -> list:
    return [device for device in jax.devices() if device.process_index == process]


def idle_devices(mesh: jax.sharding.Mesh, num_seeds: int, split_size: int) -> str:
    """Words on the devices that a mesh leaves idle and on what would use them; nothing where there are none."""
    num, even = jax.device_count(), even_devices()
    if mesh.size == even:
        return f"{num - even} of {num} devices are idle: not all processes have as many" if even < num else ""
    uses_all = lambda seeds: np.prod(layout(seeds, split_size, even, jax.process_count())) == even
    better = next(seeds for seeds in range(num_seeds + 1, num_seeds + even + 1) if uses_all(seeds))
    return f"{num - mesh.size} of {num} devices are idle: --num-seeds {better} would use {'all' if even == num else even}"


def shard_batch(tree, axis: int = 0):
    """Marks the axis of a seed's arrays that the `data` devices share. Without a mesh it does nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    spec = PartitionSpec(*[None] * axis, "data")
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, spec), tree)
