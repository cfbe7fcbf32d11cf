"""What the benchmarks share: workers in processes of their own, which take turns; medians over repeats; the file of results.

Only the standard library is used: the peers' Pythons import it too.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def parser_of(doc: str) -> argparse.ArgumentParser:
    """The flags of every benchmark."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    return parser


def is_worker(args, workers: dict[str, Callable[..., dict]]) -> bool:
    """Whether this process was started by `measure`; then the worker's result is printed as the last line."""
    if args.worker:
        print(json.dumps(workers[args.worker[0]](*args.worker[1:])))
    return bool(args.worker)


def measure(file: str, python: str, worker: str, *args: str, timeout: int = 1800, **env: str) -> dict:
    """What a worker of `file` finds in a fresh process of `python`."""
    command = [python, str(Path(file).resolve()), "--worker", worker, *args]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | env
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)
    if done.returncode:
        sys.exit(f"{worker} {args} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def noting(runs: dict[str, list[dict]], measure: Callable[..., dict]) -> Callable:
    """-> note(name, *request): measures, keeps the result in runs[name], and prints it."""

    def note(name: str, *request: str) -> None:
        runs.setdefault(name, []).append(measure(*request))
        print(name, {k: round(v, 3) for k, v in runs[name][-1].items()}, flush=True)

    return note


def medians(runs: dict[str, list[dict]]) -> dict[str, dict]:
    """Field by field."""
    return {name: {k: statistics.median(r[k] for r in results) for k in results[0]} for name, results in runs.items()}


def time_products(products: list[tuple[int, int, int, int, int]]) -> float:
    """CPU-seconds of a training step's matrix products (JAX, float32), each timed alone at its shape, forwards and backwards.

    products: (times, copies, m, k, n) of the forward pass: `times` products of `copies` pairs (m, k) x (k, n) each.
    """
    import jax
    import jax.numpy as jnp

    total = 0.0
    for times, copies, m, k, n in products:
        shapes = ((m, k), (k, n)), ((m, n), (n, k)), ((k, m), (m, n))  # forwards, to the inputs, to the weights
        for left, right in shapes:
            lead = (copies,) if copies > 1 else ()
            x, y = jnp.ones((*lead, *left)), jnp.ones((*lead, *right))
            repeats = max(1, int(2e9 / (2 * copies * m * k * n)))

            def many(x, y, repeats=repeats):
                return jax.lax.fori_loop(0, repeats, lambda _, x: x + 1e-9 * (x @ y).mean(), x)  # each product needs the one before

            many = jax.jit(many)
            jax.block_until_ready(many(x, y))
            cpu = time.process_time()
            jax.block_until_ready(many(x, y))
            total += times * (time.process_time() - cpu) / repeats
    return total


def count_flops(products: list[tuple[int, int, int, int, int]]) -> float:
    """Floating-point operations of a training step's products: 2 m n k for each, the backward pass twice the forward pass."""
    return 3.0 * sum(2 * times * copies * m * k * n for times, copies, m, k, n in products)


def machine() -> str:
    """What the numbers were measured on."""
    return f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"


def write(out: Path, summary: dict) -> None:
    """Writes and prints the results."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary, indent=1))
