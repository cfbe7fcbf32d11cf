"""Speed of what Genie is made of, beside its peers in one run on one machine. Writes results/bench/genie.json.

Run:  python tests/bench/genie.py                              (ours alone)
      python -m venv peer; peer/bin/pip install "numpy<2" procgen-mirror==0.10.7
      python tests/bench/genie.py --part coinrun --peer-python peer/bin/python

Every measurement is a process of its own; ours and the peer's take turns, `--repeats` times, and medians are compared. Rates are
per CPU-second, of one XLA device, which other work on the machine hardly changes. Parts not asked for keep their last results.

coinrun   hard levels, 15 random actions, auto-reset. "play" steps alone; "pixels" makes each picture and looks at it; "stored"
          keeps every picture, as a clip. The peer is the real engine without threads, with its usual pictures (it cannot step
          without) and in its cheapest mode (flat rectangles, no backgrounds)
sample    one world's next frame, 25 MaskGIT steps and its decoding, the window full. "cached" as it is played; "whole" encodes all
          frames of the window anew in every step and decodes them all, as a model without a cache must. Sizes: the cpu preset, and
          jafar's small one of the training parts (16 frames of 64 tokens, width 128, 6 blocks). Rates are frames
"""

import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

from harness import ROOT, is_worker, machine, measure, medians, noting, parser_of, write

OUT = ROOT / "results" / "bench" / "genie.json"
CACHE = Path(tempfile.gettempdir()) / f"nightjax-bench-{os.getpid()}"
ENVS = (64, 256)


# --- workers: each prints one JSON object as its last line


def rate(run, steps: int) -> dict:
    """Steps per CPU-second of run(), a call of `steps` steps; the best of three after one that is not counted."""
    began = time.process_time()
    run()
    first, times = time.process_time() - began, []
    for _ in range(3):
        began = time.process_time()
        run()
        times.append(time.process_time() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"steps_per_cpu_s": steps / min(times), "first_call_cpu_s": first, "peak_rss_mb": peak}


def coinrun_ours(mode: str, num_envs: str) -> dict:
    import jax

    from envs.coinrun import CoinRun, random_policy

    num, steps = int(num_envs), {"play": 1000, "pixels": 300, "stored": 64}[mode]
    env = CoinRun(num_levels=1000)
    params = env.default_params

    def step(state, key):
        keys = jax.random.split(key, num)
        actions = jax.vmap(random_policy, (0, None, None))(keys, state, params)
        obs, state, reward, *_ = jax.vmap(env.step, (0, 0, 0, None))(keys, state, actions, params)
        seen = {"play": reward.sum(), "pixels": obs.max((1, 2, 3)), "stored": obs}[mode]
        return state, seen

    go = jax.jit(lambda state, key: jax.lax.scan(step, state, jax.random.split(key, steps)))
    _, state = jax.jit(jax.vmap(env.reset, (0, None)))(jax.random.split(jax.random.key(0), num), params)
    result = rate(lambda: jax.block_until_ready(go(state, jax.random.key(1))), num * steps)
    return result | {"state_bytes_per_env": sum(x.nbytes for x in jax.tree.leaves(state)) / num}


def coinrun_peer(mode: str, num_envs: str) -> dict:
    import numpy as np
    from procgen import ProcgenGym3Env

    num, steps = int(num_envs), 300
    flat = dict(use_monochrome_assets=True, use_backgrounds=False, restrict_themes=True) if mode == "flat" else {}
    env = ProcgenGym3Env(
        num, "coinrun", start_level=0, num_levels=1000, distribution_mode="hard", num_threads=0, rand_seed=0, **flat
    )
    actions = np.random.default_rng(0).integers(0, 15, (steps, num), np.int32)

    def run():
        for action in actions:
            env.act(action)
            env.observe()

    return rate(run, num * steps)


def settings(size: str):
    """The sizes that are measured."""
    from dataclasses import replace

    from algos.genie import CPU

    small = dict(num_frames=16, num_codes=1024, tokenizer_width=128, encoder_blocks=4, decoder_blocks=4, dynamics_blocks=6)
    return {"cpu": CPU, "small": replace(CPU, **small)}[size]


def sample_ours(mode: str, size: str) -> dict:
    import jax
    import jax.numpy as jnp

    from algos import genie

    config, shape, window = settings(size), (64, 64), settings(size).num_frames
    num = genie.num_patches(shape, config.patch)
    inits = dict(tokenizer=genie.init_tokenizer, lam=genie.init_lam, dynamics=genie.init_dynamics)
    params = jax.jit(lambda key: {name: init(key, config, shape) for name, init in inits.items()})(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (1, window, num), 0, config.num_codes)
    actions = genie.unit(jax.random.normal(jax.random.key(2), (1, window, config.code_dim)))

    def whole_frame(key, params, tokens, actions):
        """What sample_frame draws, with logits of the whole window."""
        window_of = lambda new: jnp.concatenate([tokens[:, 1:], new[:, None]], axis=1)
        logits_of = lambda new: genie.predict_tokens(params["dynamics"], window_of(new), actions, config)[0][:, -1]
        new, _ = genie.fill_in(key, logits_of, (1, num), config, 1.0)
        frames = genie.pixels(params, window_of(new), shape, config)
        return genie.to_uint8(frames[:, -1])

    def cached_frame(key, params, world):
        return genie.imagine(key, params, world, jnp.zeros(1, int), 1.0, config.maskgit_steps, config, shape)[:2]

    if mode == "whole":
        given, one = (tokens, actions), jax.jit(whole_frame)
    else:
        frames, codes = jnp.zeros((1, window, *shape, 3), jnp.uint8), jnp.zeros((1, window - 1), int)
        given = (jax.jit(lambda params: genie.begin_world(params, frames, codes, config)[0])(params),)
        one = jax.jit(cached_frame)
    keys = jax.random.split(jax.random.key(3), 4)
    result = rate(lambda: jax.block_until_ready([one(key, params, *given) for key in keys]), len(keys))
    began = time.perf_counter()
    jax.block_until_ready([one(key, params, *given) for key in keys])
    return result | {"steps_per_s": len(keys) / (time.perf_counter() - began)}


def part_sample(note, peer: str | None) -> None:
    """Takes one measurement of everything."""
    for size in ("cpu", "small"):
        for mode in ("cached", "whole"):
            note(f"{mode}, {size}", sys.executable, "sample_ours", mode, size)


def ratios_sample(runs: dict) -> dict:
    """How many times the rate without a cache ours is."""
    rate_of = lambda name: runs[name]["steps_per_cpu_s"]
    return {f"frames, {size}, cached : whole": rate_of(f"cached, {size}") / rate_of(f"whole, {size}") for size in ("cpu", "small")}


def part_coinrun(note, peer: str | None) -> None:
    """Takes one measurement of everything."""
    for num in map(str, ENVS):
        for mode in ("play", "pixels", "stored"):
            note(f"ours, {mode}, {num} envs", sys.executable, "coinrun_ours", mode, num)
        for mode in ("usual", "flat") if peer else ():
            note(f"peer, {mode}, {num} envs", peer, "coinrun_peer", mode, num)


def ratios_coinrun(runs: dict) -> dict:
    """How many times the peer's rate, at its fastest, ours is."""
    found = {}
    for num in ENVS:
        theirs = [runs[name]["steps_per_cpu_s"] for name in runs if name.startswith("peer") and f" {num} " in name]
        for mode in ("play", "pixels", "stored") if theirs else ():
            ours = runs[f"ours, {mode}, {num} envs"]["steps_per_cpu_s"]
            found[f"{mode}, {num} envs, ours : peer's usual"] = ours / runs[f"peer, usual, {num} envs"]["steps_per_cpu_s"]
            found[f"{mode}, {num} envs, ours : peer's fastest"] = ours / max(theirs)
    return found


WORKERS = {f.__name__: f for f in (coinrun_ours, coinrun_peer, sample_ours)}
PARTS = {"coinrun": (part_coinrun, ratios_coinrun), "sample": (part_sample, ratios_sample)}


# --- the comparison


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--peer-python", help="a Python that has procgen")
    args = parser.parse_args()
    if is_worker(args, WORKERS):
        return
    env = {"JAX_COMPILATION_CACHE_DIR": str(CACHE), "JAX_NUM_CPU_DEVICES": "1"}
    start = lambda *request: measure(__file__, *request, **env)
    summary = json.loads(OUT.read_text()) if OUT.exists() else {}
    for part in PARTS if args.part == "all" else (args.part,):
        runs = {}
        note = noting(runs, start)
        take, ratios = PARTS[part]
        for _ in range(args.repeats):
            take(note, args.peer_python)
        middle = medians(runs)
        summary[part] = {"runs": middle, "ratios": ratios(middle), "repeats": args.repeats, "machine": machine()}
    write(OUT, summary)


if __name__ == "__main__":
    main()
