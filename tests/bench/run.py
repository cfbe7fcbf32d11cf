"""What running costs beside training: the loop, checkpoints, starting; and what a second device or process gives.

Run:  python tests/bench/run.py            (a quiet machine with two cores, half an hour; writes results/bench/run.json)
      python tests/bench/run.py --tiny --out /tmp/run.json                                       (does it work? a few minutes)

loop         the run's loop (chunks, metrics.csv, progress, checks) over as many updates as take a minute, against one jitted scan
             over the same updates in the same process; no evaluation, one checkpoint
checkpoint   seconds that training waits for one, and seconds to write one, over the seconds between two at the preset's cadence
start        seconds from the command to the end of the first update, every program being in the cache
throughput   environment steps per second of 2 devices in a process, and of 2 processes with a core each, over those of one process
             with one device and two threads

Medians of `--repeats`, which take turns.
"""

import argparse
import importlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY = dict(num_envs=4, num_steps=32, hidden=8, buffer_size=16, num_minibatches=1)
BOUNDS = {"loop": 1.02, "checkpoint": 0.01, "start_s": 10.0, "throughput": 0.9}


# --- workers: each prints one JSON object as its last line


def programs_of(method: str, tiny: str, **settings):
    """The programs of a method's cpu preset, without its evaluation, and their mesh."""
    import jax

    from common.runs.devices import make_mesh, setup_devices
    from common.runs.programs import Programs

    setup_devices("none")
    module = importlib.import_module(f"algos.{method}")
    settings |= {name: value for name, value in TINY.items() if tiny == "tiny" and hasattr(module.CPU, name)}
    config = replace(module.CPU, **settings)
    mesh = make_mesh(config.num_seeds, config.split_size)
    train = module.make_train(config)._replace(evaluate=lambda state: {})
    with jax.set_mesh(mesh):
        return Programs(config, train, mesh), train, mesh


def loop(tiny: str, seconds: str) -> dict:
    """Seconds of DR's training by the run's loop, and by one scan."""
    import jax

    from common.runs.files import RunFiles
    from common.runs.loop import train_and_record
    from common.runs.stop import StopSignal

    every = 10
    programs, train, mesh = programs_of("dr", tiny)
    with jax.set_mesh(mesh):
        state, _ = programs.chunk(programs.init(), 0)
        began = time.perf_counter()
        programs.chunk(state, every)
        num = max(2, round(float(seconds) / (time.perf_counter() - began))) * every
        whole = dict(num_updates=num, eval_every=num, save_every=num, log_every=every)
        programs, train, mesh = programs_of("dr", tiny, **whole, out=tempfile.mkdtemp())

        def scan(state):
            return jax.vmap(lambda state: jax.lax.scan(train.update, state, jax.numpy.arange(num)), spmd_axis_name="seed")(state)

        bare = jax.jit(scan, in_shardings=(programs.layout,), donate_argnums=0).lower(programs.state_shape).compile()
        state = programs.init()
        began = time.perf_counter()
        jax.block_until_ready(bare(state))
        bare_s = time.perf_counter() - began

        files, moments = RunFiles(programs.config, "dr"), []

        def noting_the_time(function):
            return lambda *args: (moments.append(time.perf_counter()), function(*args))[1]

        programs.chunk, files.wait = noting_the_time(programs.chunk), noting_the_time(files.wait)  # the first thing, and the last
        train_and_record(programs, files, StopSignal())
    return {"bare_s": bare_s, "loop_s": moments[-1] - moments[0], "updates": num}


def checkpoint(tiny: str, method: str) -> dict:
    """Seconds that a checkpoint holds training up, seconds to write it, and seconds of training between two."""
    import jax

    from common.runs.checkpoint import CheckpointWriter, snapshot

    programs, _, mesh = programs_of(method, tiny)
    config, folder = programs.config, Path(tempfile.mkdtemp())
    with jax.set_mesh(mesh):
        state, metrics = programs.chunk(programs.init(), 0)
        began = time.perf_counter()
        state, metrics = programs.chunk(state, config.log_every)
        between = (time.perf_counter() - began) * config.save_every / config.log_every
        row = {name: float(values[0, 0]) for name, values in metrics.items()}
        rows = [row] * (config.num_seeds * config.num_updates // config.log_every)  # as at the end of the run
        writer, waits, writes = CheckpointWriter(folder, 2), [], []
        for update in range(5):
            began = time.perf_counter()
            writer.write(update, snapshot(state), {"rows": rows})
            waits.append(time.perf_counter() - began)
            writer.wait()
            writes.append(time.perf_counter() - began)
    size = max(folder.glob("*.npz")).stat().st_size / 2**20
    waits, writes = map(statistics.median, (waits, writes))
    return {"waits_s": waits, "writes_s": writes, "between_s": between, "mb": size}


def throughput(tiny: str, method: str, core: str) -> dict:
    """Environment steps per second of all seeds and processes together. `core`: the only one that this process uses, or any."""
    if core != "any":
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[int(core)]})
    import jax

    from common.runs.hosts import join_hosts

    join_hosts(False)
    steps, seconds, every = [], [], 4
    programs, _, mesh = programs_of(method, tiny, num_updates=400, log_every=every, eval_every=400, save_every=400)
    with jax.set_mesh(mesh):
        state = programs.init()
        for i in range(3):
            began = time.perf_counter()
            state, metrics = programs.chunk(state, i * every)
            seconds.append(time.perf_counter() - began)
            steps.append(int(metrics["env_steps"][:, -1].sum()))
    return {"steps_per_s": (steps[-1] - steps[0]) / sum(seconds[1:])}


WORKERS = {function.__name__: function for function in (loop, checkpoint, throughput)}


# --- measuring


def start_worker(*args: str, **env: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | env
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", *args]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def result_of(worker: subprocess.Popen) -> dict:
    out, err = worker.communicate(timeout=1200)
    if worker.returncode:
        sys.exit(f"{worker.args} failed:\n{err[-2000:]}")
    return json.loads(out.strip().splitlines()[-1])


def measure(*args: str, **env: str) -> dict:
    """What a worker finds in a fresh process."""
    return result_of(start_worker(*args, **env))


def measure_processes(*args: str, num: int = 2) -> dict:
    """What the first of `num` processes finds, each on a core of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        joined = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free.getsockname()[1]}", "JAX_NUM_PROCESSES": str(num)}
    workers = [start_worker(*args, str(i), **joined, JAX_PROCESS_ID=str(i), JAX_NUM_CPU_DEVICES="1") for i in range(num)]
    return [result_of(worker) for worker in workers][0]


def start_seconds(method: str, tiny: str, cache: str) -> float:
    """Seconds from the command to the row of the first update in metrics.csv."""
    folder = Path(tempfile.mkdtemp()) / "run"
    flags = ["--num-updates", "1", "--log-every", "1", "--eval-every", "1", "--save-every", "1"]
    if tiny == "tiny":
        flags += [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items() if name != "buffer_size" or method != "dr"]
    command = [sys.executable, str(ROOT / "algos" / f"{method}.py"), *flags, "--out", str(folder), "--cache", cache]
    began = time.perf_counter()
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL) as process:
        while not ((folder / "metrics.csv").exists() and "\n1," in (folder / "metrics.csv").read_text()):
            if process.poll():
                sys.exit(f"{command} failed")
            time.sleep(0.02)
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0, help="length of the run whose loop is measured")
    parser.add_argument("--methods", nargs="+", default=["accel", "plr", "paired"])
    parser.add_argument("--tiny", action="store_true", help="toy sizes: its numbers mean nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "bench" / "run.json")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(WORKERS[args.worker[0]](*args.worker[1:])))
        return
    tiny, seconds = ("tiny", "2") if args.tiny else ("full", str(args.seconds))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache = tempfile.mkdtemp()
    runs: dict[str, list[dict]] = {}

    def note(name: str, result: dict) -> None:
        runs.setdefault(name, []).append(result)
        print(name, {k: round(v, 4) for k, v in result.items()}, flush=True)

    for method in args.methods:
        start_seconds(method, tiny, cache)  # fills the cache
    for _ in range(args.repeats):
        note("loop", measure("loop", tiny, seconds))
        for method in args.methods:
            note(f"{method} start", {"s": start_seconds(method, tiny, cache)})
            note(f"{method} checkpoint", measure("checkpoint", tiny, method))
            note(f"{method} 1 device", measure("throughput", tiny, method, "any", JAX_NUM_CPU_DEVICES="1"))
            note(f"{method} 2 devices", measure("throughput", tiny, method, "any", JAX_NUM_CPU_DEVICES="2"))
            note(f"{method} 2 processes", measure_processes("throughput", tiny, method))
    medians = {name: {k: statistics.median(r[k] for r in results) for k in results[0]} for name, results in runs.items()}
    summary = {"ratios": ratios_of(medians, args.methods), "bounds": BOUNDS, "runs": medians, "repeats": args.repeats}
    summary["machine"] = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary["ratios"], indent=1))


def ratios_of(runs: dict, methods: list[str]) -> dict:
    """The numbers that have a bound, by what they are of."""
    ratios = {"loop : bare scan": runs["loop"]["loop_s"] / runs["loop"]["bare_s"]}
    for method in methods:
        saved, alone = runs[f"{method} checkpoint"], runs[f"{method} 1 device"]["steps_per_s"]
        ratios[f"{method}: checkpoint, waiting : training"] = saved["waits_s"] / saved["between_s"]
        ratios[f"{method}: checkpoint, writing : training"] = saved["writes_s"] / saved["between_s"]
        ratios[f"{method}: start to first update, s"] = runs[f"{method} start"]["s"]
        for more in ("2 devices", "2 processes"):
            ratios[f"{method}: {more} : 1 device, two threads"] = runs[f"{method} {more}"]["steps_per_s"] / alone
    return ratios


if __name__ == "__main__":
    main()
