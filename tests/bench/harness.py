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


def machine() -> str:
    """What the numbers were measured on."""
    return f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"


def write(out: Path, summary: dict) -> None:
    """Writes and prints the results."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary, indent=1))
