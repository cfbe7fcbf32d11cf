"""Several processes as one run: joining them, gathering arrays, agreeing. With one process nothing is sent."""

import dataclasses
import json
import os
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from common.runs.config import UsageError, as_dict, as_tuple, require

EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
PIECE = 1 << 26  # bytes sent at a time


def join_hosts(asked: bool) -> None:
    """Joins the other processes of the run, if it has any. Call it before anything starts the XLA backend.

    It joins when asked, and by itself where the environment names several processes: by JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID, or by the variables of Slurm, Open MPI or a TPU pod. Raises UsageError if it cannot.
    """
    options = {}
    if any(name in os.environ for name in EXPLICIT[1:]):
        require(all(name in os.environ for name in EXPLICIT), f"several processes need all of {', '.join(EXPLICIT)}")
        address, num, index = (os.environ[name] for name in EXPLICIT)
        fine = num.isdigit() and index.isdigit() and int(index) < int(num)
        require(fine, f"JAX_PROCESS_ID={index} must be a number below JAX_NUM_PROCESSES={num}")
        options = dict(coordinator_address=address, num_processes=int(num), process_id=int(index))
    elif not (asked or _cluster_found()):
        return
    jax.config.update("jax_enable_preemption_service", False)  # its signal handler would take the place of ours
    try:
        jax.distributed.initialize(**options)
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"--distributed: the other processes cannot be joined: {str(error).splitlines()[0]}") from error


def _cluster_found() -> bool:
    """Whether this is one of several processes of Slurm (a job step), Open MPI or a TPU pod."""
    count = lambda name: int(os.environ.get(name, "0") or 0)
    slurm = count("SLURM_STEP_NUM_TASKS") > 1 and "SLURM_PROCID" in os.environ
    tpu = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return slurm or count("OMPI_COMM_WORLD_SIZE") > 1 or tpu


def is_main() -> bool:
    """Whether this process is the one that writes files and prints."""
    return jax.process_index() == 0


def meet() -> None:
    """Waits, an hour if need be, until every process is here. Collectives between CPUs give up after 30 s, so where processes may
    be apart by more (they compile, the first one writes files) they meet before they talk."""
    if jax.process_count() > 1:
        from jax._src.distributed import global_state  # there is no public way that uses no collective

        global_state.client.wait_at_barrier("nightjax", 3_600_000)


def _same(tree):
    return tree


def gather(tree):
    """Arrays, whichever devices and processes hold them -> the whole of each as numpy, on every process."""
    if jax.process_count() > 1:
        jax.block_until_ready(tree)
        meet()
        replicated = jax.tree.map(lambda x: NamedSharding(x.sharding.mesh, PartitionSpec()), tree)
        tree = jax.jit(_same, out_shardings=replicated)(tree)
    return jax.device_get(tree)


def agree(flag: bool) -> bool:
    """Whether the flag is set on any process."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental.multihost_utils import process_allgather

    meet()
    return bool(process_allgather(np.int32(flag)).any())


def from_main(produce: Callable[[], bytes]) -> bytes:
    """What `produce()` returns on the first process, on every process. A UsageError there is raised on every process."""
    if jax.process_count() == 1:
        return produce()
    data, problem = b"", ""
    if is_main():
        try:
            data = produce()
        except UsageError as error:
            problem = str(error)
    meet()
    problem = _broadcast(problem.encode()).decode()
    if problem:
        raise UsageError(problem)
    return _broadcast(data)


def settings_of_first(config):
    """The first process's Config, on every process: only that one may have the folder of a run that is resumed."""
    if jax.process_count() == 1:
        return config
    settings = json.loads(from_main(lambda: json.dumps(as_dict(config)).encode()))
    return dataclasses.replace(config, **{name: as_tuple(value) for name, value in settings.items()})


def _broadcast(data: bytes) -> bytes:
    from jax.experimental.multihost_utils import broadcast_one_to_all

    size = broadcast_one_to_all(np.int32(divmod(len(data), PIECE)))  # two numbers: there are no 64-bit integers
    size = int(size[0]) * PIECE + int(size[1])
    received = []
    for start in range(0, size, PIECE):
        piece = np.zeros(min(PIECE, size - start), np.uint8)
        if is_main():
            piece[:] = np.frombuffer(data, np.uint8)[start : start + PIECE]
        received.append(np.asarray(broadcast_one_to_all(piece)).tobytes())
    return b"".join(received)
