"""Speed of the maze methods, beside JaxUED's maze examples in one run on one machine. Writes results/bench/ued.json.

Run:  python tests/bench/ued.py                                          (ours alone)
      git clone https://github.com/DramaCow/jaxued; python -m venv peer; peer/bin/pip install jaxued distrax orbax-checkpoint
      python tests/bench/ued.py --peer jaxued --peer-python peer/bin/python

Every measurement is a process of its own; ours and the peer's take turns, `--repeats` times, and medians are compared. The training
settings are the peer's: 32 environments x 256 steps, LSTM 256, 5 epochs, 1 minibatch, 60 walls, replay probability 0.8, one seed;
for PAIRED its teacher's too (50 steps, noise of 16 numbers, 128 filters, LSTM 256).
The peer's time per update is the difference between two lengths of its evaluation interval, so that its evaluations do not count.
An update of robust PLR that tries new levels and one that replays and learns are timed apart, and mixed at the replay probability.

Ours alone: PAIRED's cost by population; steps per second by the number of environments and of seeds; the time of a PPO update in
the parallel and the serial forms; and a cycle of PLR whose replay decision is drawn once for all seeds, against one drawn per
seed, for which XLA runs both branches in every cycle.
"""

import ast
import os
import statistics
import sys
import tempfile
import time
import types
from dataclasses import replace
from pathlib import Path

from harness import ROOT, is_worker, machine, measure, medians, noting, parser_of, write

OUT = ROOT / "results" / "bench" / "ued.json"
CACHE = Path(tempfile.gettempdir()) / f"nightjax-bench-{os.getpid()}"
NUM_ENVS, NUM_STEPS, EPOCHS, REPLAY_PROB = 32, 256, 5, 0.8
KINDS = {  # what is compared with the peer: name -> file, our settings, the peer's flags, its two lengths
    "dr": ("dr", "paper", "--n_walls 60", (1, 5)),
    "plr new": ("plr", "paper,replay_prob=0.0", "--n_walls 60", (1, 5)),
    "plr replay": ("plr", "paper,replay_prob=1.0", "--n_walls 60 --replay_prob 1 --minimum_fill_ratio 0.001", (1, 5)),
    "paired": ("paired", "paper,num_walls=48,noise_dim=16", "", (1, 2)),
}
SCALING = {"environments": (32, 64, 128, 256), "seeds": (1, 2, 4, 8)}
POPULATION = "cpu,score=population_regret,num_students="
FULL = {"plr": "cpu,min_fill=0.001", "accel": "cpu,min_fill=0.001,num_walls=60"}  # replays from the first cycle on


# --- workers: each prints one JSON object as its last line


def train_ours(method: str, num_seeds: str, settings: str, cache: str) -> dict:
    """Environment steps and PPO updates per second of all seeds together, without evaluation; peak memory."""
    import resource

    import jax

    programs, mesh = _programs(method, int(num_seeds), settings, cache)
    with jax.set_mesh(mesh):
        state = programs.init()
        programs.compile()
        seconds, steps, updates = [], [], []
        for i in range(3):  # the first is not counted
            began = time.perf_counter()
            state, metrics = programs.chunk(state, i * programs.config.log_every)
            seconds.append(time.perf_counter() - began)
            steps.append(int(metrics["env_steps"][:, -1].sum()))
            updates.append(int(metrics["ppo_updates"][:, -1].sum()) if "ppo_updates" in metrics else 0)
    return {
        "steps_per_s": (steps[2] - steps[0]) / sum(seconds[1:]),
        "updates_per_s": (updates[2] - updates[0]) / sum(seconds[1:]),
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def coin_ours(kind: str, cache: str) -> dict:
    """Seconds of 20 cycles of robust PLR, 4 seeds, whose replay decision is `shared` or each seed's `own`."""
    import jax
    import jax.numpy as jnp

    programs, mesh = _programs("plr", 4, FULL["plr"], cache)
    from algos.plr import make_train

    train = make_train(programs.config)
    with jax.set_mesh(mesh):
        state = programs.init()

        def chunk(state, updates):
            return jax.lax.scan(train.update, state, updates)[0]

        own = kind == "own"  # the decision is a function of the update's index: an index of each seed's own makes it the seed's own
        offsets = 1000 * jnp.arange(4)[:, None] if own else 0
        run = jax.jit(jax.vmap(chunk, (0, 0 if own else None), spmd_axis_name="seed"), out_shardings=programs.layout)
        state = jax.block_until_ready(run(state, offsets + jnp.arange(20)))
        began = time.perf_counter()
        jax.block_until_ready(run(state, offsets + jnp.arange(20, 40)))
        return {"interval_s": time.perf_counter() - began}


def compile_ours(method: str, cache: str) -> dict:
    """Seconds to compile what a run of the cpu preset needs: initialisation, updates, evaluation."""
    import jax

    programs, mesh = _programs(method, 4, "cpu", cache)
    with jax.set_mesh(mesh):
        programs.init()
        programs.compile()
    return {"compile_s": programs.compile_s}


def _programs(method: str, num_seeds: int, settings: str, cache: str):
    """Compiled programs of a preset with changes, such as "cpu,num_envs=64", and their mesh."""
    import importlib

    import jax

    from common.runs.devices import make_mesh, setup_devices
    from common.runs.programs import Programs

    module = importlib.import_module(f"algos.{method}")
    preset, *changes = settings.split(",")
    pairs = dict(change.split("=") for change in changes)
    changes = {name: ast.literal_eval(value) if value[0] in "0123456789TF" else value for name, value in pairs.items()}
    every = 1 if settings == KINDS["paired"][1] else 20 if "min_fill" in pairs else 10 if method == "accel" else 4
    changes |= dict(num_seeds=num_seeds, log_every=every, num_updates=1000 * every, eval_every=every, save_every=every)
    config = replace(module.CPU if preset == "cpu" else module.PAPER, **changes)
    setup_devices(cache)
    mesh = make_mesh(config.num_seeds, config.split_size)
    with jax.set_mesh(mesh):
        return Programs(config, module.make_train(config), mesh), mesh


def restore_tree_map() -> None:
    """The peer uses jax.tree_map, which newer versions of jax lack."""
    import jax

    if not hasattr(jax, "tree_map"):
        jax.tree_map = jax.tree.map


def train_peer(method: str, interval: str, flags: str, peer: str) -> dict:
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
    name = f"maze_{method}"
    flags += f" --eval_freq {interval} --num_updates {3 * int(interval)} --checkpoint_save_interval 0 --run_name x"
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


WORKERS = {f.__name__: f for f in (train_ours, coin_ours, compile_ours, train_peer, maze_ours, maze_peer, matmul)}


# --- the comparison


def flop_per_step(method: str, hidden: int = 256) -> float:
    """Multiply-adds x 2 of the network for each environment step: one pass to act, three for each pass of PPO."""
    forward = 2 * (9 * 27 * 16 + (149 + hidden) * 4 * hidden + hidden * 64 + 32 * 8)
    learned = 1.0 if method == "dr" else REPLAY_PROB
    return forward * (1 + 3 * EPOCHS * learned)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--peer", help="a checkout of JaxUED")
    parser.add_argument("--peer-python", default=sys.executable, help="a Python that has JaxUED's requirements")
    args = parser.parse_args()
    if is_worker(args, WORKERS):
        return
    python, runs, cache = sys.executable, {}, str(CACHE / "shared")
    note = noting(runs, lambda *request: measure(__file__, *request, JAX_COMPILATION_CACHE_DIR=cache))
    for _ in range(args.repeats):
        note("matmul", python, "matmul")
        note("maze ours", python, "maze_ours")
        if args.peer:
            note("maze peer", args.peer_python, "maze_peer")
        for name, (method, settings, flags, (short, long)) in KINDS.items():
            note(f"{name} ours", python, "train_ours", method, "1", settings, cache)
            if args.peer:
                note(f"{name} peer short", args.peer_python, "train_peer", method, str(short), flags, args.peer)
                note(f"{name} peer long", args.peer_python, "train_peer", method, str(long), flags, args.peer)
        note("dr ours 4 seeds", python, "train_ours", "dr", "4", "paper", cache)
        note("accel cpu 1 seed", python, "train_ours", "accel", "1", "cpu", cache)
        note("accel cpu 4 seeds", python, "train_ours", "accel", "4", "cpu", cache)
        for number in SCALING["environments"]:
            note(f"dr environments {number}", python, "train_ours", "dr", "2", f"cpu,num_envs={number}", cache)
        for number in SCALING["seeds"]:
            note(f"dr seeds {number}", python, "train_ours", "dr", str(number), "cpu", cache)
        for students in (2, 8):
            note(f"paired students {students}", python, "train_ours", "paired", "2", f"{POPULATION}{students}", cache)
        for method, settings in FULL.items():
            for form in ("False", "True"):
                note(f"{method} parallel={form}", python, "train_ours", method, "4", f"{settings},parallel={form}", cache)
        for kind in ("shared", "own"):
            note(f"coin {kind}", python, "coin_ours", kind, cache)
    for method in ("dr", "plr", "accel", "paired"):
        for state in ("cold", "warm"):  # twice in a cache that begins empty
            note(f"{method} compile {state}", python, "compile_ours", method, str(CACHE / "fresh"))
    summary = summarise(medians(runs), bool(args.peer))
    summary["machine"] = machine()
    summary["repeats"] = args.repeats
    write(OUT, summary)


def summarise(runs: dict, with_peer: bool) -> dict:
    """The ratios and rates that README shows."""
    ratios, times = {}, {}
    for name, (method, *_, (short, long)) in KINDS.items():
        batch = NUM_ENVS * NUM_STEPS * (2 if method == "paired" else 1)
        times[f"{name} ours"] = batch / runs[f"{name} ours"]["steps_per_s"]
        if with_peer:
            intervals = [runs[f"{name} peer {length}"]["interval_s"] for length in ("long", "short")]
            times[f"{name} peer"] = (intervals[0] - intervals[1]) / (long - short)
    for side in ("ours", "peer") if with_peer else ("ours",):
        times[f"plr {side}"] = REPLAY_PROB * times[f"plr replay {side}"] + (1 - REPLAY_PROB) * times[f"plr new {side}"]
    summary = {"runs": runs, "s_per_update": times, "ratios": ratios}
    for method in ("dr", "plr"):
        rate = NUM_ENVS * NUM_STEPS / times[f"{method} ours"]
        runs[f"{method} ours"] = runs.get(f"{method} ours", {}) | {"steps_per_s": rate}
        summary[f"{method}_share_of_matmul"] = rate * flop_per_step(method) / runs["matmul"]["gflop_per_s"] / 1e9
    if with_peer:
        for method in ("dr", "plr", "paired"):
            ratios[f"{method} steps/s, ours : JaxUED"] = times[f"{method} peer"] / times[f"{method} ours"]
        ratios["maze alone steps/s, ours : JaxUED"] = runs["maze ours"]["steps_per_s"] / runs["maze peer"]["steps_per_s"]
    rate = lambda name, what="steps_per_s": runs[name][what]
    ratios["time of 4 seeds : 1 seed, DR, LSTM 256"] = 4 * rate("dr ours") / rate("dr ours 4 seeds")
    ratios["time of 4 seeds : 1 seed, ACCEL, cpu preset"] = 4 * rate("accel cpu 1 seed") / rate("accel cpu 4 seeds")
    ratios["time of 8 students : 2 students, population PAIRED"] = 4 * rate("paired students 2") / rate("paired students 8")
    for method in FULL:
        serial, parallel = (rate(f"{method} parallel={form}", "updates_per_s") for form in ("False", "True"))
        ratios[f"time of a PPO update, {method.upper()} : parallel {method.upper()}"] = parallel / serial
    ratios["time of PLR with a replay decision per seed : shared"] = rate("coin own", "interval_s") / rate(
        "coin shared", "interval_s"
    )
    summary["scaling"] = {of: {str(n): rate(f"dr {of} {n}") for n in numbers} for of, numbers in SCALING.items()}
    return summary


if __name__ == "__main__":
    main()
