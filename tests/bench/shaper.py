"""Speed of Shaper's generations and of its gridworlds, beside Pax and JaxMARL in one run on one machine. Writes
results/bench/shaper.json.

Run:  python tests/bench/shaper.py                                       (ours alone)
      git clone https://github.com/ucl-dark/pax; python3.11 -m venv old; old/bin/pip install jax==0.4.20 jaxlib==0.4.20 \\
          dm-haiku==0.0.11 distrax==0.1.5 tensorflow-probability==0.23 optax==0.1.7 chex==0.1.85 evosax==0.1.5 gymnax==0.0.6 \\
          flax==0.7.5 "orbax-checkpoint<0.5" "ml_dtypes<0.4" "numpy<2" "scipy<1.13" "setuptools<80" hydra-core tqdm
      python -m venv peer; peer/bin/pip install jaxmarl
      python tests/bench/shaper.py --pax pax --pax-python old/bin/python --jaxmarl-python peer/bin/python

Every measurement is a process of its own with one XLA device; ours and the peers' take turns, `--repeats` times, and medians are
compared. Times are CPU-seconds of the process, which other work on the machine hardly changes.

generation  environment steps per CPU-second of whole generations after the second: both policies, the world, the learners'
            updates, evolution. Pax's is its EvoRunner with the configuration of each world's Shaper as it stands, sizes apart
compile     CPU-seconds from the making of the agents to the end of the second generation, less those of two later ones
programs    CPU-seconds to compile our update and our evaluation, each alone, at the presets' sizes
gridworld   steps per CPU-second of 512 worlds with random actions; both sides reset by themselves

Where no checkout of Pax is given, its numbers are those that were measured earlier on a machine of this kind (EARLIER), and the
output says so.
"""

import resource
import sys
import tempfile
import time
import types
from dataclasses import replace
from pathlib import Path

from harness import ROOT, is_worker, machine, measure, medians, noting, parser_of, write

OUT = ROOT / "results" / "bench" / "shaper.json"
# name -> our preset, Pax's configuration, (population, opponents, environments, episodes, steps), least ratio
KINDS = {
    "ipd": ("PAPER", "ipd/shaper_v_tabular", (64, 2, 2, 50, 100), 4.0),
    "coin_game": ("PAPER_COIN", "cg/train_shaper", (32, 1, 32, 20, 16), 4.0),
    "in_the_matrix": ("PAPER_GRID", "ipditm/train_shaper", (8, 1, 16, 2, 152), 10.0),
}
EARLIER = {"ipd": 670e3, "coin_game": 148e3, "in_the_matrix": 2250.0}  # Pax's steps per CPU-second
WORLDS = {"coin_game": "coin_game", "in_the_matrix": "storm_2p"}  # and JaxMARL's names
GENERATIONS = 2
NUM_WORLDS, WORLD_STEPS = 512, 152


# --- workers: each prints one JSON object as its last line


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def summarise(sizes, times: list[float]) -> dict:
    """Of the process's CPU time before the agents are made and after each generation. Two do not count: in the second one Pax
    compiles again, since the types of its first state settle."""
    population, opponents, num_envs, episodes, steps = sizes
    per_generation = (times[-1] - times[2]) / (len(times) - 3)
    return {
        "steps_per_cpu_s": population * opponents * num_envs * episodes * steps / per_generation,
        "cpu_s_per_generation": per_generation,
        "compile_cpu_s": times[2] - times[0] - 2 * per_generation,
        "peak_rss_mb": peak_mb(),
    }


def ours(kind: str):
    from algos import shaper

    preset, _, (population, opponents, num_envs, episodes, steps), _ = KINDS[kind]
    sizes = dict(population_size=population, num_opponents=opponents, num_envs=num_envs, num_episodes=episodes, num_steps=steps)
    return shaper.make_train(replace(getattr(shaper, preset), **sizes))


def generation_ours(kind: str) -> dict:
    """Our update, compiled."""
    import jax

    train, times = ours(kind), [time.process_time()]
    state = jax.jit(train.init)(jax.random.key(0))
    update = jax.jit(train.update).lower(state, 0).compile()
    for t in range(2 + GENERATIONS):
        state, _ = jax.block_until_ready(update(state, t))
        times.append(time.process_time())
    return summarise(KINDS[kind][2], times)


def programs_ours(preset: str) -> dict:
    """CPU-seconds to trace and to compile the update and the evaluation of a preset of ours."""
    import jax

    from algos import shaper

    train, found = shaper.make_train(shaper.PRESETS[preset]), {}
    state = jax.eval_shape(train.init, jax.random.key(0))
    for name, function, args in (("update", train.update, (state, 0)), ("evaluate", train.evaluate, (state,))):
        began = time.process_time()
        lowered = jax.jit(function).lower(*args)
        traced = time.process_time()
        lowered.compile()
        found |= {f"{name}_trace_cpu_s": traced - began, f"{name}_compile_cpu_s": time.process_time() - traced}
    return found | {"peak_rss_mb": peak_mb()}


def generation_pax(kind: str, checkout: str) -> dict:
    """Pax's EvoRunner; a generation begins where it asks its evolution for a population."""
    wandb = types.ModuleType("wandb")
    wandb.finish = wandb.log = wandb.save = wandb.init = lambda *_, **__: None
    sys.modules["wandb"] = wandb
    sys.path.insert(0, checkout)
    import logging

    from omegaconf import OmegaConf
    from pax import experiment

    _, name, sizes, _ = KINDS[kind]
    conf = Path(checkout) / "pax" / "conf"
    defaults = {"mean_reduce": False}  # some of its configurations lack what its runner reads
    names = ("popsize", "num_opps", "num_envs", "num_outer_steps", "num_inner_steps")
    changes = dict(zip(names, sizes, strict=True)) | {"num_devices": 1, "num_iters": 2 + GENERATIONS, "seed": 0}
    files = [OmegaConf.load(path) for path in (conf / "config.yaml", conf / "experiment" / f"{name}.yaml")]
    args = OmegaConf.merge({"es": defaults}, *files, changes)
    args.top_k = min(args.top_k, args.popsize)
    times, log = [time.process_time()], logging.getLogger()
    env, params = experiment.env_setup(args, log)
    agents = experiment.agent_setup(args, env, params, log)
    runner = experiment.runner_setup(args, env, agents, tempfile.mkdtemp(), log)
    ask = runner.strategy.ask
    runner.strategy.ask = lambda *inputs: times.append(time.process_time()) or ask(*inputs)
    runner.run_loop(params, agents, args.num_iters, False)
    return summarise(sizes, [times[0], *times[2:], time.process_time()])


def world_ours(kind: str) -> dict:
    """Our gridworld, with auto-reset."""
    import jax

    from envs.coin_game import CoinGame
    from envs.in_the_matrix import InTheMatrix

    env = CoinGame(max_steps_in_episode=WORLD_STEPS) if kind == "coin_game" else InTheMatrix()

    def reset(key):
        return env.reset(key)[1]

    def step(key, state):
        key_act, key_step = jax.random.split(key)
        actions = jax.random.randint(key_act, (2,), 0, 5)
        obs, state, reward, *_ = env.step(key_step, state, actions)
        return state, (reward.sum(), obs)

    return play_worlds(reset, step)


def world_jaxmarl(kind: str) -> dict:
    """JaxMARL's port of it."""
    import jax
    import jaxmarl

    view = {"egocentric": True} if kind == "coin_game" else {}
    env = jaxmarl.make(WORLDS[kind], num_inner_steps=WORLD_STEPS, num_outer_steps=1, **view)

    def reset(key):
        return env.reset(key)[1]

    def step(key, state):
        key_act, key_step = jax.random.split(key)
        draws = jax.random.randint(key_act, (2,), 0, 5)
        obs, state, reward, *_ = env.step(key_step, state, dict(zip(env.agents, draws, strict=True)))
        return state, (sum(jax.tree.leaves(reward)), obs)

    return play_worlds(reset, step)


def play_worlds(reset, step) -> dict:
    """Steps per CPU-second of NUM_WORLDS worlds; every observation is made."""
    import jax

    @jax.jit
    def play(key):
        key_reset, key_steps = jax.random.split(key)
        states = jax.vmap(reset)(jax.random.split(key_reset, NUM_WORLDS))

        def one(states, key):
            states, (reward, obs) = jax.vmap(step)(jax.random.split(key, NUM_WORLDS), states)
            return states, (reward.sum(), jax.tree.map(lambda x: x.sum(), obs))

        return jax.lax.scan(one, states, jax.random.split(key_steps, WORLD_STEPS))[1]

    key, times = jax.random.PRNGKey(0), [time.process_time()]
    for _ in range(2 + GENERATIONS):
        jax.block_until_ready(play(key))
        times.append(time.process_time())
    return summarise((NUM_WORLDS, 1, 1, 1, WORLD_STEPS), times)


WORKERS = {f.__name__: f for f in (generation_ours, generation_pax, programs_ours, world_ours, world_jaxmarl)}


# --- the comparison


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--pax", help="a checkout of Pax")
    parser.add_argument("--pax-python", help="a Python that has Pax's requirements")
    parser.add_argument("--jaxmarl-python", help="a Python that has JaxMARL")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    if is_worker(args, WORKERS):
        return
    runs = {}
    env = {"JAX_ENABLE_COMPILATION_CACHE": "0", "JAX_PLATFORMS": "cpu"}  # without a cache of compiled programs
    note = noting(runs, lambda *request: measure(__file__, *request, timeout=3600, **env))
    for _ in range(args.repeats):
        for kind in KINDS:
            note(f"{kind} ours", sys.executable, "generation_ours", kind)
            if args.pax:
                note(f"{kind} Pax", args.pax_python or sys.executable, "generation_pax", kind, str(Path(args.pax).resolve()))
        for kind in WORLDS:
            note(f"{kind} world ours", sys.executable, "world_ours", kind)
            if args.jaxmarl_python:
                note(f"{kind} world JaxMARL", args.jaxmarl_python, "world_jaxmarl", kind)
    for preset in ("cpu", "coin_game", "in_the_matrix"):
        note(f"{preset} programs", sys.executable, "programs_ours", preset)
    middle = medians(runs)
    summary = {"runs": middle, "ratios": ratios(middle), "repeats": args.repeats}
    summary["machine"] = machine()
    write(args.out, summary)


def ratios(runs: dict) -> dict:
    """Steps per CPU-second, ours over the peers', and the least that was asked for."""
    rate, found = lambda name: runs[name]["steps_per_cpu_s"], {}
    for kind, (*_, least) in KINDS.items():
        here = f"{kind} Pax" in runs
        peer = rate(f"{kind} Pax") if here else EARLIER[kind]
        name = "Pax" if here else "Pax's number of an earlier run"
        found[f"{kind} generation, ours : {name}"] = {"ratio": rate(f"{kind} ours") / peer, "least": least}
    for kind in WORLDS:
        if f"{kind} world JaxMARL" in runs:
            ratio = rate(f"{kind} world ours") / rate(f"{kind} world JaxMARL")
            found[f"{kind} world, ours : JaxMARL"] = {"ratio": ratio, "least": 3.0}
    return found


if __name__ == "__main__":
    main()
