"""Speed of what H-GAP is made of, its planner beside the official one in one run on one machine. Writes results/bench/hgap.json.

Run:  python tests/bench/hgap.py                              (ours alone, some 10 minutes on two cores)
      git clone https://github.com/facebookresearch/hgap peer_code            (CC-BY-NC: it is run where it lies, never copied)
      python -m venv peer; peer/bin/pip install torch numpy einops rotary-embedding-torch pyre-extensions
      peer/bin/pip install --no-deps xformers==0.0.22
      python tests/bench/hgap.py --part plan --peer-python peer/bin/python --hgap peer_code

Every measurement is a process of its own; ours and the peer's take turns, `--repeats` times, and medians are compared. Rates are
per CPU-second, of one thread, which other work on the machine hardly changes. Parts not asked for keep their last results.

data      control steps of 256 planar humanoids: under random commands ("world"), and as the data are made ("demonstrate": with
          policies, noise, new commands, and all that is kept); compiling is counted apart
plan      plans, each of them the best of 64 samples of 16 steps, from random parameters. "cached" is ours; "whole" draws each
          code by all of `prior` over the codes so far, as a model without a cache must. The peer is the official planner and its
          models with random parameters, one state at a time, as it does. Sizes: the cpu preset's on the planar body (32 states at
          once), and the official code's on the paper's body (2 at once). Of the peer only the device of its masks is changed and
          packages that do not matter here are left out; at the cpu sizes, for which it knows no task, it scores nothing
train     learning steps of the cpu preset on random data, with one and with four seeds: by one thread, in CPU-seconds; and as a
          run does them, on all devices, in seconds of the clock (of a quiet machine)
"""

import json
import os
import resource
import sys
import tempfile
import time
import types
from pathlib import Path

from harness import ROOT, is_worker, machine, measure, medians, noting, parser_of, write

OUT = ROOT / "results" / "bench" / "hgap.json"
CACHE = Path(tempfile.gettempdir()) / f"nightjax-bench-{os.getpid()}"
WORLDS, BLOCKS, BLOCK = 256, 4, 50  # of the data: humanoids, and their steps
SAMPLES, WINDOW, TEMPERATURE, TOP_P = 64, 16, 2.0, 0.99
SIZES = {  # of the planner: observation, action, width, layers, codes, codes a latent step, latent width; states at once
    "cpu": (56, 12, 128, 3, 256, 4, 128, 32),
    "official": (224, 56, 512, 4, 512, 8, 1024, 2),
}
CHUNK = 10  # updates, of training


# --- workers: each prints one JSON object as its last line


def rate(run, num: int, repeats: int = 3) -> dict:
    """Things per CPU-second of run(), a call that does `num`; the best of some after one that is not counted."""
    began = time.process_time()
    run()
    first, times = time.process_time() - began, []
    for _ in range(repeats):
        began = time.process_time()
        run()
        times.append(time.process_time() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"per_cpu_s": num / min(times), "first_call_cpu_s": first, "peak_rss_mb": peak}


def data_ours(mode: str) -> dict:
    """Control steps, alone or as the data are made."""
    import jax

    from envs.humanoid import Humanoid
    from envs.humanoid_data import DIVING
    from envs.humanoid_skills import demonstrate, load_skills

    env, steps = Humanoid(), BLOCKS * BLOCK
    params = env.default_params

    def world(key):
        state = jax.vmap(lambda key: env.reset_env(key, params)[1], out_axes=-1)(jax.random.split(key, WORLDS))

        def step(state, key):
            obs, state, *_ = env.step_env(None, state, jax.random.uniform(key, (env.num_actions, WORLDS), minval=-1), params)
            return state, obs

        return jax.lax.scan(step, state, jax.random.split(key, steps))

    skills = load_skills()
    program = {"world": world, "demonstrate": lambda key: demonstrate(key, skills, WORLDS, BLOCKS, BLOCK, DIVING)}[mode]
    began = time.process_time()
    compiled = jax.jit(program).lower(jax.random.key(0)).compile()
    compile_s = time.process_time() - began
    result = rate(lambda: jax.block_until_ready(compiled(jax.random.key(1))), WORLDS * steps)
    return result | {"compile_cpu_s": compile_s}


def settings(size: str):
    """The Config of a size, and the body that plans are made for: of the paper's only what is scored."""
    from dataclasses import replace

    from algos.hgap import CPU, PAPER
    from envs.humanoid import Humanoid

    obs, action, width, layers, num_codes, codes, latent, _ = SIZES[size]
    sizes = dict(width=width, prior_width=width, layers=layers, prior_layers=layers, latent=latent, codes_per_step=codes)
    same = dict(num_codes=num_codes, window=WINDOW, horizon=WINDOW, samples=SAMPLES, temperature=TEMPERATURE, top_p=TOP_P, heads=4)
    config = replace(CPU if size == "cpu" else PAPER, **sizes, **same)
    other = types.SimpleNamespace(obs_size=obs, num_actions=action, parts={"rest": obs - 3, "velocimeter": 3})
    return config, Humanoid() if size == "cpu" else other


def plan_ours(mode: str, size: str) -> dict:
    """Plans, with a cache or without."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from algos import hgap
    from envs.humanoid import speed
    from envs.humanoid_control import Tasks

    (config, env), num = settings(size), SIZES[size][-1]
    obs, action = env.obs_size, env.num_actions
    state = random_state(config, obs, action)
    data = types.SimpleNamespace(mean=np.zeros(obs + action, np.float32), std=np.ones(obs + action, np.float32), num_obs=obs)
    tasks = Tasks(("speed",), (speed,), (False,), np.zeros(num, int))
    first, result = jax.random.normal(jax.random.key(1), (num, obs), jnp.float32), {}
    if mode == "whole":
        result |= compare(state.params["prior"], first, config)
        hgap.sample_codes = sample_whole  # which the planner calls

    def plan(state, key, first):
        planner = hgap.make_planner(config, env, data, state, tasks, config.samples, config.temperature)
        return planner(key, (), None, first)[0]

    compiled = jax.jit(plan).lower(state, jax.random.key(0), first).compile()
    result |= rate(lambda: jax.block_until_ready(compiled(state, jax.random.key(2), first)), num, 2 if mode == "whole" else 5)
    prior, vqvae = (sum(x.size for x in jax.tree.leaves(state.params[name])) for name in ("prior", "vqvae"))
    return result | {"prior_parameters": prior, "vqvae_parameters": vqvae}


def random_state(config, obs: int, action: int):
    """A run's state with random parameters, of logits that differ, and a random codebook."""
    import jax
    import jax.numpy as jnp

    from algos import hgap

    def make(keys):
        params = {"vqvae": hgap.init_vqvae(keys[0], config, (obs, action)), "prior": hgap.init_prior(keys[1], config, obs)}
        params["prior"]["out"] *= 5
        codes = jax.random.normal(keys[2], (config.num_codes, config.latent // config.codes_per_step), jnp.float32)
        return hgap.State(params, hgap.Codebook(jnp.ones(config.num_codes, jnp.float32), codes), {}, keys[3])

    return jax.jit(make)(jax.random.split(jax.random.key(0), 4))


def logits_whole(params, index, first, s: int, config):
    """Logits of code s (B, K) by all of `prior` over the codes before it: index (B, S), of which the first s are known."""
    from algos import hgap

    return hgap.prior(params | {"place": params["place"][: s + 1]}, index[:, : s + 1], first, config)[:, -1]


def sample_whole(key, params, first, num: int, config, temperature: float):
    """What hgap.sample_codes draws, without a cache."""
    import jax
    import jax.numpy as jnp

    from algos import hgap

    first = first.repeat(num, 0)
    index = jnp.zeros((len(first), config.tokens), jnp.int32)
    for s, key_s in enumerate(jax.random.split(key, config.tokens)):
        logits = logits_whole(params, index, first, s, config)
        index = index.at[:, s].set(hgap.draw_from_nucleus(key_s, logits, temperature, config.top_p))
    return index


def compare(params, first, config) -> dict:
    """The largest difference of logits with and without a cache, as a share of their spread, given codes that were drawn."""
    import jax
    import jax.numpy as jnp

    from algos import hgap

    @jax.jit
    def both(params, first):
        index = hgap.sample_codes(jax.random.key(3), params, first, 1, config, config.temperature)
        whole = hgap.prior(params, index, first, config)
        state, cache = hgap.dense(params["state"], first), hgap.init_cache(config, len(first))
        before = jnp.pad(params["code"][index[:, :-1]], ((0, 0), (1, 0), (0, 0)))
        step = lambda cache, x: hgap.prior_step(params, x[0], state, cache, x[1], config)[::-1]
        cached = jax.lax.scan(step, cache, (before.swapaxes(0, 1), jnp.arange(config.tokens)))[1].swapaxes(0, 1)
        return jnp.abs(whole - cached).max() / whole.std()

    difference = float(both(params, first))
    if difference > 1e-3:
        sys.exit(f"logits with and without a cache differ by {difference} of their spread")
    return {"logits_difference": difference}


def official_models(size: str, folder: str):
    """The official prior and VQ-VAE, with random parameters, and its planner. Packages it imports but needs not are left out."""
    import torch

    for name in ("tensorflow", "trajectory.utils"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["tensorflow"].Tensor = types.new_class("Tensor")
    sys.modules["trajectory.utils"].__path__ = [f"{folder}/trajectory/utils"]
    sys.path.insert(0, folder)
    import xformers.components.attention.core as core
    from trajectory.models.transformer_prior import TransformerPrior
    from trajectory.models.vqvae import VQContinuousVAE
    from trajectory.search import sample_with_prior

    core.SparseCS = types.new_class("SparseCS")  # missing where xformers' compiled part does not fit
    obs, action, width, layers, num_codes, codes, latent, _ = SIZES[size]
    joined = obs + action + 3
    config = dict(transition_dim=joined, observation_dim=obs, action_dim=action, block_size=joined * (WINDOW + 1))
    config |= dict(n_embd=width, n_layer=layers, n_head=4, trajectory_embd=latent, K=num_codes, code_per_step=codes, latent_step=4)
    config |= dict(max_sequence_length=WINDOW, embd_pdrop=0.0, resid_pdrop=0.1, attn_pdrop=0.1, position_embedding="absolute")
    config |= dict(encoder_inputs=["state", "action", "mask"], symlog=False, state_conditional=True, ae_type="AttentionCNN")
    config |= dict(causal_attention=True, causal_conv=True, ma_update=True, bottleneck="pooling", residual="absolute")
    config |= dict(vocab_size=1, masking="none", use_discriminator=False)
    config |= dict(action_weight=5, reward_weight=0, value_weight=0, position_weight=1)
    config, ones = type("Config", (dict,), {"__getattr__": dict.__getitem__})(config), torch.ones
    torch.ones = lambda *shape, device=None, **more: ones(*shape, **more)  # its masks are made on an accelerator
    models = TransformerPrior(config).eval(), VQContinuousVAE(config).eval()
    torch.ones = ones
    return *models, sample_with_prior


def plan_official(size: str, folder: str) -> dict:
    """The official planner's plans, with the settings of its README."""
    import torch

    torch.set_num_threads(1)
    prior, vqvae, sample_with_prior = official_models(size, folder)
    obs, action = SIZES[size][:2]
    states = torch.randn(2, 1, 1, obs + action + 3)
    more = dict(nb_samples=SAMPLES, rounds=1, likelihood_weight=0.0, prob_threshold=0.05, temperature=TEMPERATURE, top_p=TOP_P)
    more["objective"] = "tracking" if size == "cpu" else "speed"

    def run():
        for state in states:
            sample_with_prior(prior, vqvae, state, None, None, 1.0, WINDOW, **more)

    count = lambda model: sum(p.numel() for p in model.parameters())
    return rate(run, len(states)) | {"prior_parameters": count(prior), "vqvae_parameters": count(vqvae)}


def train_ours(num_seeds: str, devices: str) -> dict:
    """Seconds of an update of all seeds by the run's own programs: of the CPU and of the clock."""
    from dataclasses import replace

    import jax
    import numpy as np

    from algos import hgap
    from common.runs.devices import make_mesh, setup_devices
    from common.runs.programs import Programs

    setup_devices("none")
    rng, shape = np.random.default_rng(0), (64, 100)
    with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        draw = lambda size: rng.normal(size=(*shape, size)).astype(np.float32)
        np.savez(file, obs=draw(56), action=draw(12), length=np.full(shape[0], shape[1]))
        file.flush()
        whole = dict(num_updates=2000 * CHUNK, vqvae_updates=1000 * CHUNK, eval_every=CHUNK, save_every=CHUNK, log_every=CHUNK)
        config = replace(hgap.CPU, data=file.name, num_seeds=int(num_seeds), **whole)
        train = hgap.make_train(config)._replace(evaluate=lambda state: {})
    found, mesh = {"devices": jax.local_device_count()}, make_mesh(config.num_seeds, config.split_size)
    with jax.set_mesh(mesh):
        programs = Programs(config, train, mesh)
        state = programs.init()
        programs.compile()
        for name, start in (("vqvae", 0), ("prior", 1000)):
            state, _ = programs.chunk(state, start * CHUNK)
            wall, cpu, chunks = time.perf_counter(), time.process_time(), range(start + 1, start + 4)
            for i in chunks:
                state, _ = programs.chunk(state, i * CHUNK)
            updates = len(chunks) * CHUNK
            found[f"{name}_update_cpu_s"] = (time.process_time() - cpu) / updates
            found[f"{name}_update_s"] = (time.perf_counter() - wall) / updates
    return found


# --- parts


def part_data(note, args) -> None:
    """Takes one measurement of everything."""
    for mode in ("world", "demonstrate"):
        note(mode, sys.executable, "data_ours", mode)


def ratios_data(runs: dict) -> dict:
    """Steps per CPU-second, without compiling."""
    return {f"steps per CPU-second, {name}": run["per_cpu_s"] for name, run in runs.items()}


def part_plan(note, args) -> None:
    """Takes one measurement of everything."""
    for size in SIZES:
        for mode in ("cached", "whole"):
            note(f"{mode}, {size}", sys.executable, "plan_ours", mode, size)
        if args.hgap:
            note(f"peer, {size}", args.peer_python, "plan_official", size, str(Path(args.hgap).resolve()))


def ratios_plan(runs: dict) -> dict:
    """How many times the rate without a cache, and the official planner's, ours is."""
    rate_of, found = lambda name: runs[name]["per_cpu_s"], {}
    for size in SIZES:
        for other in ("whole", "peer"):
            if f"{other}, {size}" in runs:
                found[f"plans, {size}, cached : {other}"] = rate_of(f"cached, {size}") / rate_of(f"{other}, {size}")
    return found


def part_train(note, args) -> None:
    """Takes one measurement of everything."""
    for devices in ("one device", "all devices"):
        for num_seeds in ("1", "4"):
            note(f"{num_seeds} seeds, {devices}", sys.executable, "train_ours", num_seeds, devices)


def ratios_train(runs: dict) -> dict:
    """How many times one seed's update four seeds' takes."""
    found = {}
    for devices, field in (("one device", "update_cpu_s"), ("all devices", "update_s")):
        one, four = (runs[f"{num} seeds, {devices}"] for num in (1, 4))
        for name in ("vqvae", "prior"):
            found[f"{name}, 4 seeds : 1, {devices}"] = four[f"{name}_{field}"] / one[f"{name}_{field}"]
    return found


WORKERS = {f.__name__: f for f in (data_ours, plan_ours, plan_official, train_ours)}
PARTS = {"data": (part_data, ratios_data), "plan": (part_plan, ratios_plan), "train": (part_train, ratios_train)}


# --- the comparison


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--peer-python", help="a Python that has what the official code needs")
    parser.add_argument("--hgap", help="the official code's folder")
    args = parser.parse_args()
    if is_worker(args, WORKERS):
        return
    if args.hgap and not args.peer_python:
        parser.error("--hgap: needs --peer-python")
    one = {"JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}

    def start(*request: str) -> dict:
        cache = {} if "data_ours" in request else {"JAX_COMPILATION_CACHE_DIR": str(CACHE)}
        return measure(__file__, *request, **cache, **({} if request[-1] == "all devices" else one))

    summary = json.loads(OUT.read_text()) if OUT.exists() else {}
    for part in PARTS if args.part == "all" else (args.part,):
        runs = {}
        note, (take, ratios) = noting(runs, start), PARTS[part]
        for _ in range(args.repeats):
            take(note, args)
        middle = medians(runs)
        summary[part] = {"runs": middle, "ratios": ratios(middle), "repeats": args.repeats, "machine": machine()}
    write(OUT, summary)


if __name__ == "__main__":
    main()
