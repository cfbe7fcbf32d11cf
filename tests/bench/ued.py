"""Speed of the maze methods, beside JaxUED's maze examples in one run on one machine. Writes results/bench/ued.json.

Run:  python tests/bench/ued.py                                          (ours alone)
      git clone https://github.com/DramaCow/jaxued; python -m venv peer; peer/bin/pip install jaxued distrax orbax-checkpoint
      python tests/bench/ued.py --peer jaxued --peer-python peer/bin/python

Every measurement is a process of its own; ours and the peer's take turns, `--repeats` times, and medians are compared. The training
settings are the peer's: 32 environments x 256 steps, LSTM 256, 5 epochs, 1 minibatch, 60 walls, replay probability 0.8, one seed.
The peer's time per update is the difference between two lengths of its evaluation interval, so that its evaluations do not count.
An update of robust PLR that tries new levels and one that replays and learns are timed apart, and mixed at the replay probability.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import types
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "results" / "bench" / "ued.json"
CACHE = Path(tempfile.gettempdir()) / f"nightjax-bench-{os.getpid()}"
NUM_ENVS, NUM_STEPS, EPOCHS, REPLAY_PROB = 32, 256, 5, 0.8
KINDS = [("dr", "paper"), ("plr", "new"), ("plr", "replay")]


# --- workers: each prints one JSON object as its last line


def train_ours(method: str, num_seeds: str, preset: str, cache: str) -> dict:
    """Environment steps per second of all seeds together, without evaluation; peak memory."""
    import resource

    import jax

    programs, mesh = _programs(method, int(num_seeds), preset, cache)
    with jax.set_mesh(mesh):
        state = programs.init()
        programs.compile()
        seconds, steps = [], []
        for i in range(3):  # the first is not counted
            began = time.perf_counter()
            state, metrics = programs.chunk(state, i * programs.config.log_every)
            seconds.append(time.perf_counter() - began)
            steps.append(int(metrics["env_steps"][:, -1].sum()))
    return {
        "steps_per_s": (steps[2] - steps[0]) / sum(seconds[1:]),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def compile_ours(method: str, cache: str) -> dict:
    """Seconds to compile what a run of the cpu preset needs: initialisation, updates, evaluation."""
    import jax

    programs, mesh = _programs(method, 4, "cpu", cache)
    with jax.set_mesh(mesh):
        programs.init()
        programs.compile()
    return {"compile_s": programs.compile_s}


def _programs(method: str, num_seeds: int, preset: str, cache: str):
    import importlib

    from common.devices import make_mesh, setup_devices
    from common.run import Programs

    module = importlib.import_module(f"algos.{method}")
    every = 10 if method == "accel" else 4
    settings = dict(num_seeds=num_seeds, log_every=every, num_updates=1000 * every, eval_every=every, save_every=every)
    settings |= {"new": dict(replay_prob=0.0), "replay": dict(replay_prob=1.0)}.get(preset, {})
    config = replace(module.CPU if preset == "cpu" else module.PAPER, **settings)
    setup_devices(cache)
    mesh = make_mesh(config.num_seeds, config.split_size)
    import jax

    with jax.set_mesh(mesh):
        return Programs(config, module.make_train(config), mesh), mesh


def restore_tree_map() -> None:
    """The peer uses jax.tree_map, which newer versions of jax lack."""
    import jax

    if not hasattr(jax, "tree_map"):
        jax.tree_map = jax.tree.map


def train_peer(method: str, interval: str, kind: str, peer: str) -> dict:
    """Seconds that `interval` updates and one evaluation of JaxUED's example take (the mean of two)."""
    restore_tree_map()
    times = []
    wandb = types.ModuleType("wandb")

    class Settings(dict):
        as_dict = dict

    def start(config=None, **_):
        wandb.config = Settings(config)
        return wandb

    wandb.init = start
    wandb.log = lambda *_, **__: times.append(time.perf_counter())
    wandb.define_metric = wandb.Video = wandb.Image = lambda *_, **__: None
    sys.modules["wandb"] = wandb
    name = {"dr": "maze_dr", "plr": "maze_plr"}[method]
    flags = f"--eval_freq {interval} --num_updates {3 * int(interval)} --checkpoint_save_interval 0 --n_walls 60 --run_name x"
    if kind == "replay":
        flags += " --replay_prob 1 --minimum_fill_ratio 0.001"
    sys.argv = [name, *flags.split()]
    source = (Path(peer) / "examples" / f"{name}.py").read_text()
    exec(compile(source, name, "exec"), {"__name__": "__main__"})
    return {"interval_s": statistics.mean(b - a for a, b in zip(times, times[1:], strict=False))}


def maze_ours() -> dict:
    """Random steps per second of 1024 mazes with a new level at every reset."""
    import jax

    from common.env import reset_from_bank, step_from_bank
    from envs.maze import Maze

    jax.config.update("jax_num_cpu_devices", 1)
    env, params, num = Maze(), Maze().default_params, 1024
    bank = jax.vmap(jax.vmap(env.sample_level))(jax.random.split(jax.random.key(0), (num, 16)))

    @jax.jit
    def play(key):
        _, state = jax.vmap(lambda bank: reset_from_bank(env, bank, params))(bank)

        def step(state, key):
            action = jax.random.randint(key, (num,), 0, 7)
            advance = lambda state, action, bank: step_from_bank(env, key, state, action, bank, params)
            obs, state, reward, _ = jax.vmap(advance)(state, action, bank)
            return state, (reward.sum(), obs.image.sum())

        return jax.lax.scan(step, state, jax.random.split(key, 500))[1]

    return {"steps_per_s": 500 * num / _best_of_three(play)}


def maze_peer() -> dict:
    """The same of JaxUED's Maze in its AutoResetWrapper."""
    import jax

    restore_tree_map()
    from jaxued.environments import Maze
    from jaxued.environments.maze import make_level_generator
    from jaxued.wrappers import AutoResetWrapper

    num = 1024
    maze = Maze(max_height=13, max_width=13, agent_view_size=5, normalize_obs=True)
    sample_level = make_level_generator(13, 13, 60)
    env = AutoResetWrapper(maze, sample_level)
    params = maze.default_params

    @jax.jit
    def play(key):
        key = jax.random.key_data(key)  # the peer takes keys of the old kind
        levels = jax.vmap(sample_level)(jax.random.split(key, num))
        _, state = jax.vmap(env.reset_to_level, (0, 0, None))(jax.random.split(key, num), levels, params)

        def step(state, key):
            action = jax.random.randint(key, (num,), 0, 7)
            keys = jax.random.split(key, num)
            obs, state, reward, _, _ = jax.vmap(env.step, (0, 0, 0, None))(keys, state, action, params)
            return state, (reward.sum(), obs.image.sum())

        return jax.lax.scan(step, state, jax.random.split(key, 500))[1]

    return {"steps_per_s": 500 * num / _best_of_three(play)}


def matmul() -> dict:
    """The machine's rate at a 2048 x 1024 x 1024 product in float32, GFLOP/s, all cores."""
    import jax

    a, b = jax.random.normal(jax.random.key(0), (2048, 1024)), jax.random.normal(jax.random.key(1), (1024, 1024))
    product = jax.jit(lambda a, b: a @ b)
    return {"gflop_per_s": 2 * 2048 * 1024 * 1024 / _best_of_three(lambda _: product(a, b), rounds=20) / 1e9}


def _best_of_three(play, rounds: int = 3) -> float:
    import jax

    key, best = jax.random.key(0), float("inf")
    jax.block_until_ready(play(key))
    for _ in range(rounds):
        began = time.perf_counter()
        jax.block_until_ready(play(key))
        best = min(best, time.perf_counter() - began)
    return best


WORKERS = {f.__name__: f for f in (train_ours, compile_ours, train_peer, maze_ours, maze_peer, matmul)}


# --- the comparison


def measure(python: str, worker: str, *args: str) -> dict:
    """Runs a worker in a fresh process."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(CACHE / "shared")}
    command = [python, str(Path(__file__).resolve()), "--worker", worker, *args]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200)
    if done.returncode:
        sys.exit(f"{worker} {args} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def median(results: list[dict]) -> dict:
    """Field-wise median."""
    return {name: statistics.median(result[name] for result in results) for name in results[0]}


def flop_per_step(method: str, hidden: int = 256) -> float:
    """Multiply-adds x 2 of the network for each environment step: one pass to act, three for each pass of PPO."""
    forward = 2 * (9 * 27 * 16 + (149 + hidden) * 4 * hidden + hidden * 64 + 32 * 8)
    learned = 1.0 if method == "dr" else REPLAY_PROB
    return forward * (1 + 3 * EPOCHS * learned)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="a checkout of JaxUED")
    parser.add_argument("--peer-python", default=sys.executable, help="a Python that has JaxUED's requirements")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(WORKERS[args.worker[0]](*args.worker[1:])))
        return

    python, runs, cache = sys.executable, {}, str(CACHE / "shared")

    def note(name, *request):
        runs.setdefault(name, []).append(measure(*request))
        print(name, {k: round(v, 3) for k, v in runs[name][-1].items()}, flush=True)

    for _ in range(args.repeats):
        note("matmul", python, "matmul")
        note("maze ours", python, "maze_ours")
        for method, kind in KINDS:
            note(f"{method} {kind} ours", python, "train_ours", method, "1", kind, cache)
            if args.peer:
                note(f"{method} {kind} peer short", args.peer_python, "train_peer", method, "1", kind, args.peer)
                note(f"{method} {kind} peer long", args.peer_python, "train_peer", method, "5", kind, args.peer)
        note("dr ours 4 seeds", python, "train_ours", "dr", "4", "paper", cache)
        note("accel cpu 1 seed", python, "train_ours", "accel", "1", "cpu", cache)
        note("accel cpu 4 seeds", python, "train_ours", "accel", "4", "cpu", cache)
        if args.peer:
            note("maze peer", args.peer_python, "maze_peer")
    for method in ("dr", "plr", "accel"):
        for state in ("cold", "warm"):  # twice in a cache that begins empty
            note(f"{method} compile {state}", python, "compile_ours", method, str(CACHE / "fresh"))
    summary = summarise({name: median(results) for name, results in runs.items()}, bool(args.peer))
    summary["machine"] = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    summary["repeats"] = args.repeats
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary, indent=1))


def summarise(runs: dict, with_peer: bool) -> dict:
    """The ratios and rates that README shows."""
    summary = {"runs": runs, "ratios": {}}
    ratios = summary["ratios"]
    batch = NUM_ENVS * NUM_STEPS
    times = {f"{method} {kind} ours": batch / runs[f"{method} {kind} ours"]["steps_per_s"] for method, kind in KINDS}
    if with_peer:
        for method, kind in KINDS:
            long, short = (runs[f"{method} {kind} peer {length}"]["interval_s"] for length in ("long", "short"))
            times[f"{method} {kind} peer"] = (long - short) / 4
    summary["s_per_update"] = times
    for method in ("dr", "plr"):
        rates = {}
        for side in ("ours", "peer") if with_peer else ("ours",):
            mixed = {"dr": 1, "plr": REPLAY_PROB}[method] * times[f"{method} {'paper' if method == 'dr' else 'replay'} {side}"]
            mixed += (1 - REPLAY_PROB) * times[f"plr new {side}"] if method == "plr" else 0
            rates[side] = batch / mixed
        runs[f"{method} ours"] = {"steps_per_s": rates["ours"]}
        summary[f"{method}_share_of_matmul"] = rates["ours"] * flop_per_step(method) / runs["matmul"]["gflop_per_s"] / 1e9
        if with_peer:
            ratios[f"{method} steps/s, ours : JaxUED"] = rates["ours"] / rates["peer"]
    if with_peer:
        ratios["maze alone steps/s, ours : JaxUED"] = runs["maze ours"]["steps_per_s"] / runs["maze peer"]["steps_per_s"]
    one, four = runs["dr paper ours"]["steps_per_s"], runs["dr ours 4 seeds"]["steps_per_s"]
    ratios["time of 4 seeds : 1 seed, DR, LSTM 256"] = 4 * one / four
    one, four = runs["accel cpu 1 seed"]["steps_per_s"], runs["accel cpu 4 seeds"]["steps_per_s"]
    ratios["time of 4 seeds : 1 seed, ACCEL, cpu preset"] = 4 * one / four
    return summary


if __name__ == "__main__":
    main()
