"""Devices: one mesh with axes ("seed", "data") over every device, seeds first, what is left over each seed's batch."""

import math
import os

import jax
from jax.sharding import PartitionSpec

from common.config import UsageError


def setup_devices(cache: str) -> None:
    """Chooses devices and the compilation cache. Call it before anything starts the XLA backend.

    On CPU XLA gets one device per core: small programs on one device keep little more than one core busy. An explicit
    JAX_NUM_CPU_DEVICES or --xla_force_host_platform_device_count is respected.
    """
    explicit = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not explicit and "JAX_NUM_CPU_DEVICES" not in os.environ:
        jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))
    if cache.lower() != "none":
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def make_mesh(num_seeds: int, split_size: int) -> jax.sharding.Mesh:
    """A mesh of all devices, (seed, data): as many groups as divide both the seeds and the devices; each group splits
    its seeds' batch axis of `split_size`. Raises UsageError where that does not divide."""
    num_devices = jax.device_count()
    groups = math.gcd(num_seeds, num_devices)
    data = num_devices // groups
    if split_size % data:
        raise UsageError(
            f"{num_seeds} seeds on {num_devices} devices would split a batch of {split_size} into {data} parts: "
            f"make the seeds a multiple of {num_devices}, or the batch a multiple of {data}"
        )
    auto = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((groups, data), ("seed", "data"), axis_types=auto)


def shard_batch(tree, axis: int = 0):
    """Marks the axis of a seed's arrays that the `data` devices share. Without a mesh it does nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    spec = PartitionSpec(*[None] * axis, "data")
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, spec), tree)
