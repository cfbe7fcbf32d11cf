"""Every method's presets for a few updates on whatever device there is: do they fit, how fast are they, do they agree with the CPU?

Run:  python tests/bench/accelerator.py                     (on a GPU or TPU, ten minutes; writes results/bench/accelerator.json)
      python tests/bench/accelerator.py --methods genie hgap --presets paper --limit 120
      python tests/bench/accelerator.py --tiny --out /tmp/accelerator.json                         (does it work? anywhere)

A line a method and preset: seconds to compile, updates and environment steps a second over the chunks after the first, peak memory
of the device (of the process where the device is the CPU), and whether the parameters are finite. `agrees` is how far what two
updates of the tests' tiny settings have learned here is from what they have on the CPU, from one start, products in full precision,
in units of the largest parameter: rounding, or an action that rounding has turned. Each runs in a process of its own, which is
stopped after `--limit` seconds of the clock.
"""

import argparse
import dataclasses
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
BAR = 1e-2  # of `agrees`
SHORT = dict(num_steps=4, num_opponents=1, sigma=0.04)  # learners that learn from a turned action make long trials chaotic


def configs_of(name: str, preset: str, tiny: bool):
    """The module, and the Config of one seed and two chunks."""
    from sizes import presets
    from sizes import tiny as tiny_of

    module, small = tiny_of(name)
    config = small if tiny else presets(module)[preset]
    chunk = dict(num_seeds=2 if tiny else 1, log_every=2)  # the tests' tiny programs, so that they are compiled once
    return module, dataclasses.replace(config, **chunk, num_updates=config.num_updates // 2 * 2, eval_every=2, save_every=2)


def speed_of(name: str, preset: str, tiny: bool, updates: int) -> dict:
    """Compiles a preset and trains for some chunks of two updates."""
    import jax
    import numpy as np

    from common.runs.devices import make_mesh
    from common.runs.programs import FINITE, Programs

    module, config = configs_of(name, preset, tiny)
    with jax.set_mesh(mesh := make_mesh(config.num_seeds, config.split_size)):
        programs = Programs(config, module.make_train(config), mesh)
        programs.compile()
        state, metrics = programs.chunk(programs.init(), 0)
        began = time.perf_counter()
        for t in range(2, 2 + updates, 2):
            state, metrics = programs.chunk(state, t)
        seconds = time.perf_counter() - began
    found = {"device": jax.devices()[0].device_kind, "compile_s": programs.compile_s, "updates_per_s": updates / seconds}
    if "env_steps" in metrics:
        steps = metrics["env_steps"]
        found["env_steps_per_s"] = float(np.diff(steps, axis=1).mean() * updates / seconds)
    return found | {"memory_mb": peak_memory(), "finite": bool(metrics[FINITE].all())}


def peak_memory() -> float:
    """MB: of the first device, or of this process where the device keeps no count."""
    import jax

    from common.runs.files import peak_rss

    stats = jax.devices()[0].memory_stats() or {}
    return stats["peak_bytes_in_use"] / 2**20 if "peak_bytes_in_use" in stats else peak_rss()


def agreement(name: str) -> dict:
    """How far two updates of the tiny settings here are from those on the CPU, from one start."""
    import jax
    import numpy as np
    from sizes import tiny

    from common.runs.size import learned

    jax.config.update("jax_default_matmul_precision", "highest")
    module, config = tiny(name, **(SHORT if name.startswith("shaper") else {}))
    train = module.make_train(config)
    with jax.default_device(jax.devices("cpu")[0]):
        start = jax.jit(train.init)(jax.random.key(0))
    ends = []
    for device in (jax.devices("cpu")[0], jax.devices()[0]):
        scan = jax.jit(lambda state: jax.lax.scan(train.update, state, np.arange(2))[0])
        ends.append(jax.tree.map(np.asarray, learned(scan(jax.device_put(start, device)))))
    largest = np.max([np.abs(x).max() for x in jax.tree.leaves(ends[0])])
    apart = np.max([np.abs(x - y).max() for x, y in zip(*map(jax.tree.leaves, ends), strict=True)])  # NaN where one is
    return {"agrees": float(apart / largest), "within_the_bar": bool(apart / largest <= BAR)}


def worker(request: list[str], updates: int) -> dict:
    """What one process measures."""
    from common.runs.devices import setup_devices

    setup_devices("~/.cache/nightjax")
    name, preset = request
    return agreement(name) if preset == "agreement" else speed_of(name, preset, preset == "tiny", updates)


def measured(name: str, preset: str, updates: int, limit: float) -> dict:
    """What a process of its own finds within the limit, or why it finds nothing."""
    command = [sys.executable, __file__, "--worker", name, preset, "--updates", str(updates)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {limit:g} s"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["it said nothing"])[-1][:300]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(args: list[str] | None = None) -> None:
    from sizes import METHODS, presets, tiny

    from common.runs.files import code_commit, write_atomically

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--presets", nargs="+", help="default: paper, its variants, and cpu, of each method")
    parser.add_argument("--updates", type=int, default=4, help="updates that are timed, an even number")
    parser.add_argument("--limit", type=float, default=60, help="seconds of the clock for each")
    parser.add_argument("--tiny", action="store_true", help="the tests' settings only")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "bench" / "accelerator.json")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(args)
    if args.worker:
        return print(json.dumps(worker(args.worker, args.updates)))
    rows = []
    for name in args.methods:
        own = ["tiny"] if args.tiny else args.presets or sorted(presets(tiny(name)[0]), reverse=True)
        for preset in [*own, "agreement"]:
            began = time.perf_counter()
            rows.append({"method": name, "preset": preset} | measured(name, preset, args.updates, args.limit))
            print(f"{time.perf_counter() - began:6.1f} s", json.dumps(rows[-1]), flush=True)
    results = {"commit": code_commit(), "python": platform.python_version(), "limit_s": args.limit, "rows": rows}
    write_atomically(args.out, lambda file: file.write((json.dumps(results, indent=1) + "\n").encode()))


if __name__ == "__main__":
    main()
