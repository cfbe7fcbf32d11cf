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
train     learning steps on 2 clips of 16 random frames: width 128, 4 heads, 4 blocks of encoder, decoder and latent actions, 6 of
          the dynamics, 64 tokens of 1024, feed-forward layers as wide as the rest. The peer is jafar's own train_step. Its feed-
          forward layer is one product, ours two; in its dynamics step it also decodes the likeliest frames. "dynamics" has tokens
          and actions from frozen models, as the peer's; "world" is our step, of latent actions and dynamics at once, beside
          both of the peer's. Products: those of the step alone, forwards and backwards. Rates are frames

          git clone https://github.com/FLAIROx/jafar
          python -m venv peer; peer/bin/pip install jax flax optax orbax-checkpoint einops dm-pix tyro
          python tests/bench/genie.py --part train --peer-python peer/bin/python --jafar jafar
"""

import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

from harness import ROOT, count_flops, is_worker, machine, measure, medians, noting, parser_of, time_products, write

OUT = ROOT / "results" / "bench" / "genie.json"
CACHE = Path(tempfile.gettempdir()) / f"nightjax-bench-{os.getpid()}"
ENVS = (64, 256)
CLIPS, FRAMES, PATCHES, STEPS = 2, 16, 64, 4  # of the training parts


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


def settings(size: str, **more):
    """The sizes that are measured: the cpu preset's, or jafar's small ones."""
    from dataclasses import replace

    from algos.genie import CPU

    small = dict(num_frames=FRAMES, num_codes=1024, encoder_blocks=4, decoder_blocks=4, lam_blocks=4, dynamics_blocks=6)
    small |= dict(tokenizer_width=128, lam_width=128, dynamics_width=128)
    return replace(CPU, **(small if size == "small" else {}), **more)


def sample_ours(mode: str, size: str) -> dict:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from algos import genie

    config, shape, window = settings(size), (64, 64), settings(size).num_frames
    num = int(np.prod(genie.grid_of(shape, config.patch)))
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


def part_sample(note, args) -> None:
    """Takes one measurement of everything."""
    for size in ("cpu", "small"):
        for mode in ("cached", "whole"):
            note(f"{mode}, {size}", sys.executable, "sample_ours", mode, size)


def ratios_sample(runs: dict) -> dict:
    """How many times the rate without a cache ours is."""
    rate_of = lambda name: runs[name]["steps_per_cpu_s"]
    return {f"frames, {size}, cached : whole": rate_of(f"cached, {size}") / rate_of(f"whole, {size}") for size in ("cpu", "small")}


def part_coinrun(note, args) -> None:
    """Takes one measurement of everything."""
    for num in map(str, ENVS):
        for mode in ("play", "pixels", "stored"):
            note(f"ours, {mode}, {num} envs", sys.executable, "coinrun_ours", mode, num)
        for mode in ("usual", "flat") if args.peer_python else ():
            note(f"peer, {mode}, {num} envs", args.peer_python, "coinrun_peer", mode, num)


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


def block_products(blocks: int, width: int, num: int, ffn: int = 1) -> list[tuple[int, int, int, int, int]]:
    """The products of ST blocks over `num` tokens a frame, as harness.time_products wants them."""
    tokens, wide = CLIPS * FRAMES * num, width // 4
    dense = [(2 * blocks, 1, tokens, width, 3 * width), (2 * blocks, 1, tokens, width, width)]
    dense += [(blocks, 1, tokens, width, ffn * width), (blocks, 1, tokens, ffn * width, width)]
    for copies, length in ((CLIPS * FRAMES * 4, num), (CLIPS * num * 4, FRAMES)):  # in space, in time
        dense += [(blocks, copies, length, wide, length), (blocks, copies, length, length, wide)]
    return dense


def train_products(part: str) -> list[tuple[int, int, int, int, int]]:
    """The products of a learning step, without those of frozen models."""
    tokens = CLIPS * FRAMES * PATCHES
    if part == "dynamics":
        return [*block_products(6, 128, PATCHES), (1, 1, tokens, 128, 1024)]
    if part == "lam":
        patches, pixels = CLIPS * FRAMES * 16, 3 * 16**2
        return [*block_products(8, 128, 17), (2, 1, patches, pixels, 128), (1, 1, patches, 128, pixels)]
    ends = [(2, 1, tokens, 3 * 8**2, 128), (2, 1, tokens, 32, 128), (1, 1, tokens, 32, 1024)]  # in and out; the nearest code
    return [*block_products(8, 128, PATCHES), *ends]


def train_matmuls(part: str) -> dict:
    """Frames per CPU-second of a step's products alone."""
    made = train_products(part)
    seconds, flops = time_products(made), count_flops(made)
    frames = CLIPS * FRAMES
    return {"steps_per_cpu_s": frames / seconds, "flops_per_frame": flops / frames, "gflops_per_cpu_s": flops / seconds / 1e9}


def train_ours(part: str) -> dict:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from algos import genie

    videos = np.random.default_rng(0).integers(0, 255, (4, FRAMES, 64, 64, 3), np.uint8)
    with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        np.savez(file, videos)
        file.flush()
        stage = "dynamics" if part == "world" else part
        config = settings("small", ffn=1, stage=stage, data=file.name, tokenizer_batch=CLIPS, batch_size=CLIPS)
        train = genie.make_train(config)
    state = jax.jit(train.init)(jax.random.key(0))
    if part == "dynamics":
        frames, tx = jnp.asarray(videos[:CLIPS]), optax.adamw(1e-3)
        loss = lambda p, *x: genie.dynamics_loss(p, *x, config)

        def step(carry, t):
            (dynamics, opt_state), seen = carry, frames + t.astype(jnp.uint8)  # read anew in every step
            tokens, codes = genie.tokenise(state.params["tokenizer"], seen, config), genie.actions_of(state.params, seen, config)[0]
            grads, _ = jax.grad(loss, has_aux=True)(dynamics, jax.random.key(t), tokens, codes)
            updates, opt_state = tx.update(grads, opt_state, dynamics)
            return (optax.apply_updates(dynamics, updates), opt_state), None

        carry = state.params["dynamics"], tx.init(state.params["dynamics"])
    else:
        step, carry = lambda state, t: (train.update(state, t)[0], None), state
    many = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(STEPS))[0])
    return rate(lambda: jax.block_until_ready(many(carry)), STEPS * CLIPS * FRAMES)


def train_jafar(part: str, folder: str) -> dict:
    """jafar's unmodified train_step on random frames; what its scripts import only to read, log or save is left out."""
    import types

    stubs = {name: types.ModuleType(name) for name in ("wandb", "utils.dataloader")}
    stubs["utils.dataloader"].get_dataloader = None
    sys.modules |= stubs
    sys.path.insert(0, folder)
    sizes = {
        "tokenizer": "--model-dim 128 --patch-size 8 --num-blocks 4 --num-heads 4",
        "lam": "--model-dim 128 --num-blocks 4 --num-heads 4",
        "dynamics": "--tokenizer-dim 128 --patch-size 8 --tokenizer-num-blocks 4 --tokenizer-num-heads 4 --lam-dim 128 "
        "--lam-num-blocks 4 --lam-num-heads 4 --dyna-dim 128 --dyna-num-blocks 6 --dyna-num-heads 4",
    }[part]
    sys.argv = [f"train_{part}.py", "--batch-size", str(CLIPS), *sizes.split()]
    import importlib

    import jax
    import jax.numpy as jnp
    import optax
    from flax.training.train_state import TrainState

    script = importlib.import_module(f"train_{part}")
    args, key = script.args, jax.random.PRNGKey(0)
    videos = jax.random.uniform(key, (CLIPS, FRAMES, 64, 64, 3))
    if part == "dynamics":
        names = "tokenizer_dim latent_patch_dim num_patch_latents patch_size tokenizer_num_blocks tokenizer_num_heads lam_dim "
        names += "latent_action_dim num_latent_actions lam_patch_size lam_num_blocks lam_num_heads dyna_dim dyna_num_blocks "
        names += "dyna_num_heads dropout mask_limit"
        model = script.Genie(in_dim=3, **{name: getattr(args, name) for name in names.split()})
        inputs = dict(videos=videos, action=jnp.zeros((CLIPS, FRAMES)), dropout_rng=key, mask_rng=key)
    else:
        names = "model_dim latent_dim num_latents patch_size num_blocks num_heads dropout codebook_dropout"
        make = script.TokenizerVQVAE if part == "tokenizer" else script.LatentActionModel
        model = make(in_dim=3, **{name: getattr(args, name) for name in names.split()})
        inputs = dict(videos=videos, rng=key)
    tx = optax.adamw(1e-4, b1=0.9, b2=0.9, weight_decay=1e-4)
    state = TrainState.create(apply_fn=model.apply, params=model.init(key, inputs), tx=tx)
    more = (jnp.zeros(args.num_latents),) if part == "lam" else ()

    def many():
        new = state
        for _ in range(STEPS):
            new, *rest = script.train_step(new, dict(inputs), *more)
        jax.block_until_ready((new.params, rest))

    return rate(many, STEPS * CLIPS * FRAMES)


def part_train(note, args) -> None:
    """Takes one measurement of everything."""
    for part in ("tokenizer", "lam", "dynamics"):
        note(f"products, {part}", sys.executable, "train_matmuls", part)
        note(f"ours, {part}", sys.executable, "train_ours", part)
        if args.jafar:
            note(f"jafar, {part}", args.peer_python, "train_jafar", part, str(Path(args.jafar).resolve()))
    note("ours, world", sys.executable, "train_ours", "world")


def ratios_train(runs: dict) -> dict:
    """How many times the peer's rate, and what share of the products' alone, ours is."""
    rate_of, found = lambda name: runs[name]["steps_per_cpu_s"], {}
    for part in ("tokenizer", "lam", "dynamics"):
        found[f"{part}, share of the products' rate"] = rate_of(f"ours, {part}") / rate_of(f"products, {part}")
        if f"jafar, {part}" in runs:
            found[f"{part}, ours : jafar"] = rate_of(f"ours, {part}") / rate_of(f"jafar, {part}")
    if "jafar, lam" in runs:
        both = sum(1 / rate_of(f"jafar, {part}") for part in ("lam", "dynamics"))
        found["world, ours : jafar's two steps"] = rate_of("ours, world") * both
    return found


WORKERS = {f.__name__: f for f in (coinrun_ours, coinrun_peer, sample_ours, train_ours, train_jafar, train_matmuls)}
PARTS = {"coinrun": (part_coinrun, ratios_coinrun), "sample": (part_sample, ratios_sample), "train": (part_train, ratios_train)}


# --- the comparison


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--peer-python", help="a Python that has procgen, or what jafar needs")
    parser.add_argument("--jafar", help="jafar's folder")
    args = parser.parse_args()
    if is_worker(args, WORKERS):
        return
    if args.jafar and not args.peer_python:
        parser.error("--jafar: needs --peer-python")
    env = {"JAX_COMPILATION_CACHE_DIR": str(CACHE), "JAX_NUM_CPU_DEVICES": "1"}
    start = lambda *request: measure(__file__, *request, **env)
    summary = json.loads(OUT.read_text()) if OUT.exists() else {}
    for part in PARTS if args.part == "all" else (args.part,):
        runs = {}
        note = noting(runs, start)
        take, ratios = PARTS[part]
        for _ in range(args.repeats):
            take(note, args)
        middle = medians(runs)
        summary[part] = {"runs": middle, "ratios": ratios(middle), "repeats": args.repeats, "machine": machine()}
    write(OUT, summary)


if __name__ == "__main__":
    main()
