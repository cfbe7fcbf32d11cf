"""Speed of Mix-ME's loop, beside QDax's MAP-Elites in one run on one machine. Writes results/bench/mix_me.json.

Run:  python tests/bench/mix_me.py                              (ours alone)
      python -m venv peer; peer/bin/pip install qdax==0.5.0
      python tests/bench/mix_me.py --peer-python peer/bin/python

Every measurement is a process of its own; ours and the peer's take turns, `--repeats` times, and medians are compared. It counts
whole generations after the first: selection, variation, rollouts, insertion. Rates per CPU-second are those of one XLA device,
and other work on the machine hardly changes them; rates per second of the clock are also taken as our runs go, with one device a
core. Batch, episode length, cells, operators (30 % iso+line, the rest polynomial mutation) and policy (two hidden layers, one
agent that sees and moves all) are the same on both sides.

planar    QDax's loop on the physics of envs/planar.py, in two forms: scored by a function of one policy under vmap, as QDax's own
          are; and scored in the batched form that our loop uses
brax      QDax's own half-cheetah (Brax's spring physics) and scoring function, beside our planar cheetah
agreement QDax's metrics of a repertoire made of our archive's elites, beside ours
"""

import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from harness import ROOT, is_worker, machine, measure, medians, noting, parser_of, write

OUT = ROOT / "results" / "bench" / "mix_me.json"
CACHE = Path(tempfile.gettempdir()) / f"nightjax-bench-{os.getpid()}"
BATCH, STEPS, CELLS, HIDDEN = 256, 100, 1024, 64
GENERATIONS = 10
SCALING = {"batch_size": (64, 256, 1024), "num_cells": (256, 1024, 4096)}


# --- workers: each prints one JSON object as its last line


def clock(generations, state) -> dict:
    """Rates of `generations(state) -> state`, a compiled program of GENERATIONS generations, after one that is not counted."""
    import resource

    import jax

    state = jax.block_until_ready(generations(state))
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(2):
        state = jax.block_until_ready(generations(state))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "ms_per_generation": 1e3 * cpu / (2 * GENERATIONS),
        "wall_ms_per_generation": 1e3 * wall / (2 * GENERATIONS),
        "evals_per_s": BATCH * 2 * GENERATIONS / wall,  # of BATCH teams each
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def loop_ours(*changes: str) -> dict:
    """Our whole loop, with changes of the Config such as variant=single_agent."""
    import jax
    import jax.numpy as jnp

    config, train = ours(changes)
    state = jax.jit(train.init)(jax.random.key(0))
    many = jax.jit(lambda state, t: jax.lax.scan(train.update, state, t)[0], donate_argnums=0)
    began = time.process_time()
    first = jnp.arange(GENERATIONS)
    compiled = many.lower(state, first).compile()
    compile_s = time.process_time() - began
    state = compiled(state, first)
    result = clock(lambda state: compiled(state, first + GENERATIONS), state)
    return result | {"evals_per_cpu_s": 1e3 * config.batch_size / result["ms_per_generation"], "compile_cpu_s": compile_s}


def run_ours(num_seeds: str) -> dict:
    """Evaluations per second of the clock as a run makes them: all devices, which split the seeds, or the batch of one seed."""
    import jax

    from common.runs.devices import make_mesh, setup_devices
    from common.runs.programs import Programs

    setup_devices("none")
    config, train = ours((f"num_seeds={num_seeds}", "variant=single_agent"))
    mesh = make_mesh(config.num_seeds, config.split_size)
    with jax.set_mesh(mesh):
        programs = Programs(config, train, mesh)
        state, _ = programs.chunk(programs.init(), 0)
        state, _ = programs.chunk(state, config.log_every)
        wall = time.perf_counter()
        for i in (2, 3):
            state, _ = programs.chunk(state, i * config.log_every)
        wall = time.perf_counter() - wall
    return {"evals_per_s": config.num_seeds * config.batch_size * 2 * config.log_every / wall}


def ours(changes):
    from dataclasses import replace

    from algos.mix_me import CPU, make_train

    values = dict(change.split("=") for change in changes)
    values = {name: int(x) if x.isdigit() else x for name, x in values.items()}
    settings = dict(num_seeds=1, batch_size=BATCH, episode_length=STEPS, num_cells=CELLS, hidden=HIDDEN) | values
    config = replace(CPU, **settings)
    return config, make_train(config)


def archive_ours() -> dict:
    """Milliseconds a generation for cells, insertion and selection of parents alone, of Mix-ME's batch."""
    import jax
    import jax.numpy as jnp

    from algos.mix_me import cells_of, init_teams, make_team
    from common.archive import insert, sample_filled

    config, train = ours(())
    team = make_team(config)
    state = jax.jit(train.init)(jax.random.key(0))

    def generation(carry, key):
        archive, children = carry
        keys = jax.random.split(key, 3)
        fitness, descriptor = jax.random.normal(keys[0], (BATCH,)), jax.random.uniform(keys[1], (BATCH, 2))
        cell = cells_of(config, state.centroids, descriptor)
        archive, _ = insert(archive, children, fitness, descriptor, cell)
        parents = sample_filled(keys[2], archive, (BATCH, team.num_policies))
        return (archive, archive.genotype[parents, jnp.arange(team.num_policies)]), None

    many = jax.jit(
        lambda carry: jax.lax.scan(generation, carry, jax.random.split(jax.random.key(1), GENERATIONS))[0], donate_argnums=0
    )
    return clock(many, (state.archive, init_teams(jax.random.key(2), team, BATCH)))


def export_ours(path: str) -> dict:
    """Trains a few generations, writes the archive, and gives its scores."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    config, train = ours(("variant=single_agent", "batch_size=64", "robot=hopper"))
    state, metrics = jax.jit(lambda key: jax.lax.scan(train.update, train.init(key), jnp.arange(5)))(jax.random.key(0))
    held = np.asarray(state.archive.fitness) > -np.inf
    np.savez(path, **{k: np.asarray(v)[held] for k, v in state.archive._asdict().items()}, centroids=state.centroids)
    return {name: float(metrics[name][-1]) for name in ("qd_score", "coverage", "max_fitness")}


def metrics_peer(path: str) -> dict:
    """QDax's metrics of those elites. Its coverage is in per cent."""
    import numpy as np
    from qdax.core.containers.mapelites_repertoire import MapElitesRepertoire
    from qdax.utils.metrics import default_qd_metrics

    with np.load(path) as file:
        elites = {name: file[name] for name in file.files}
    repertoire = MapElitesRepertoire.init(elites["genotype"], elites["fitness"], elites["descriptor"], elites["centroids"], {})
    metrics = default_qd_metrics(repertoire, qd_offset=2.0 * STEPS)
    return {k: float(metrics[k]) / (100 if k == "coverage" else 1) for k in ("qd_score", "coverage", "max_fitness")}


def loop_peer(scoring, teams) -> dict:
    """QDax's MAP-Elites with its mixing emitter."""
    import jax
    from qdax.core.containers.mapelites_repertoire import compute_cvt_centroids
    from qdax.core.emitters.mutation_operators import isoline_variation, polynomial_mutation
    from qdax.core.emitters.standard_emitters import MixingEmitter
    from qdax.core.map_elites import MAPElites
    from qdax.utils.metrics import default_qd_metrics

    emitter = MixingEmitter(
        mutation_fn=partial(polynomial_mutation, eta=10.0, minval=-0.5, maxval=0.5, proportion_to_mutate=0.1),
        variation_fn=partial(isoline_variation, iso_sigma=0.005, line_sigma=0.05),
        variation_percentage=0.3,
        batch_size=BATCH,
    )
    algorithm = MAPElites(scoring, emitter, partial(default_qd_metrics, qd_offset=2.0 * STEPS))
    centroids = compute_cvt_centroids(2, 20_000, CELLS, 0.0, 1.0, jax.random.key(0))
    repertoire, emitter_state, _ = algorithm.init(teams, centroids, jax.random.key(1))
    state = (repertoire, emitter_state, jax.random.key(2))
    many = jax.jit(lambda state: jax.lax.scan(algorithm.scan_update, state, None, length=GENERATIONS)[0], donate_argnums=0)
    began = time.process_time()
    compiled = many.lower(state).compile()
    compile_s = time.process_time() - began
    result = clock(compiled, state)
    return result | {"evals_per_cpu_s": 1e3 * BATCH / result["ms_per_generation"], "compile_cpu_s": compile_s}


def planar_peer(form: str) -> dict:
    """QDax's loop on our planar cheetah; sums of rewards and contacts, no transitions kept. form: vmapped or batched."""
    import jax
    import jax.numpy as jnp
    from qdax.core.neuroevolution.networks.networks import MLP

    from envs.planar import Planar, PlanarParams

    env, params = Planar("cheetah", single=True), PlanarParams(reset_noise=0.0)
    sizes = (HIDDEN, HIDDEN, env.num_joints)
    policy = MLP(layer_sizes=sizes, kernel_init=jax.nn.initializers.lecun_uniform(), final_activation=jnp.tanh)
    teams = jax.vmap(policy.init, (0, None))(jax.random.split(jax.random.key(0), BATCH), jnp.zeros(env.num_features))

    def episode(act, shape):
        _, state = env.reset_env(jax.random.key(0), params)
        state = jax.tree.map(lambda x: jnp.broadcast_to(x.reshape(x.shape + (1,) * len(shape)), x.shape + shape), state)

        def step(carry, _):
            state, total, contact = carry
            _, state, reward, _, info = env.step_env(None, state, act(env.get_obs(state)[0])[None], params)
            return (state, total + reward, contact + info["contact"]), None

        start = (state, jnp.zeros(shape), jnp.zeros((2, *shape)))
        (_, total, contact), _ = jax.lax.scan(step, start, length=STEPS)
        return total, contact / STEPS

    def scoring(teams, key):
        if form == "vmapped":
            fitness, descriptors = jax.vmap(lambda weights: episode(partial(policy.apply, weights), ()))(teams)
            return fitness, descriptors, {}
        act = lambda obs: jax.vmap(policy.apply, (0, -1), -1)(teams, obs)
        fitness, descriptors = episode(act, (jax.tree.leaves(teams)[0].shape[0],))
        return fitness, descriptors.T, {}

    return loop_peer(scoring, teams)


def brax_peer() -> dict:
    """QDax's loop on its own half-cheetah."""
    import jax
    import jax.numpy as jnp
    from qdax.tasks.brax.v2.env_creators import create_default_brax_task_components

    env, policy, scoring = create_default_brax_task_components("halfcheetah_uni", jax.random.key(0), STEPS, (HIDDEN, HIDDEN))
    teams = jax.vmap(policy.init, (0, None))(jax.random.split(jax.random.key(0), BATCH), jnp.zeros(env.observation_size))
    return loop_peer(scoring, teams)


WORKERS = {f.__name__: f for f in (loop_ours, run_ours, archive_ours, export_ours, metrics_peer, planar_peer, brax_peer)}


# --- the comparison


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--peer-python", help="a Python that has QDax")
    args = parser.parse_args()
    if is_worker(args, WORKERS):
        return
    runs = {}

    def start(python, worker, *rest):
        return measure(__file__, python, worker, *rest, JAX_COMPILATION_CACHE_DIR=str(CACHE / Path(python).parts[-3]))

    note = noting(runs, start)
    for _ in range(args.repeats):
        note("ours, one agent", sys.executable, "loop_ours", "variant=single_agent")
        for seeds in ("1", "2"):
            note(f"ours, all devices, {seeds} seeds", sys.executable, "run_ours", seeds)
        if args.peer_python:
            for form in ("vmapped", "batched"):
                note(f"QDax, planar, {form}", args.peer_python, "planar_peer", form)
            note("QDax, half-cheetah", args.peer_python, "brax_peer")
        note("ours, six agents", sys.executable, "loop_ours", "variant=mix_me")
        note("archive", sys.executable, "archive_ours")
        for name, values in SCALING.items():
            for value in values:
                note(f"{name} {value}", sys.executable, "loop_ours", f"{name}={value}")
    agreement = {}
    if args.peer_python:
        path = str(CACHE / "archive.npz")
        CACHE.mkdir(parents=True, exist_ok=True)
        agreement = {"ours": start(sys.executable, "export_ours", path), "QDax": start(args.peer_python, "metrics_peer", path)}
    middle = medians(runs)
    summary = {"runs": middle, "ratios": ratios(middle), "agreement": agreement, "repeats": args.repeats}
    summary["machine"] = machine()
    write(OUT, summary)


def ratios(runs: dict) -> dict:
    """What results/ shows."""
    rate = lambda name: runs[name]["evals_per_cpu_s"]
    time_of = lambda name: runs[name]["ms_per_generation"]
    found = {"share of a generation that the archive takes": time_of("archive") / time_of("ours, six agents")}
    for name in (name for name in runs if name.startswith("QDax")):
        found[f"evaluations per CPU-second, ours : {name}"] = rate("ours, one agent") / rate(name)
        for seeds in (1, 2):
            fast = runs[f"ours, all devices, {seeds} seeds"]["evals_per_s"] / runs[name]["evals_per_s"]
            found[f"evaluations per second, ours with {seeds} seeds on all devices : {name}"] = fast
    for name, values in SCALING.items():
        times = [time_of(f"{name} {value}") for value in values]
        found[f"time of a generation, {name} {values[-1]} : {values[0]}"] = times[-1] / times[0]
    return found


if __name__ == "__main__":
    main()
