"""Speed of the football world. Writes results/bench/football.json.

Run:  python tests/bench/football.py

Every measurement is a process of its own with one XLA device and no cache of compiled programs; medians over `--repeats` are kept.
Times are CPU-seconds of the process, which other work on the machine hardly changes.

bots      steps of whole matches per CPU-second, eleven hard bots on either side from random levels, by the number of matches
random    the same with random actions
networks  the same with a network of 162 x 64 x 64 x 19 (tanh) for each team in place of its bots, observations included; its first
          layer sees the team's view once and adds each player's own part
compile   CPU-seconds to trace and compile 128 steps
peak_rss  MB of the whole process

The engine itself (gfootball 2.10.2, all 22 players controlled, one process, no rendering) made 95 to 149 steps per CPU-second on a
machine of this kind (EARLIER); a run of it is not part of this program.
"""

import resource
import sys
import time
from pathlib import Path

from harness import ROOT, is_worker, machine, measure, medians, noting, parser_of, write

OUT = ROOT / "results" / "bench" / "football.json"
EARLIER = 149.0
STEPS, TIMES = 128, 3
CASES = [("bots", 512), ("bots", 1024), ("random", 512), ("networks", 256), ("networks", 1024)]
LEAST = {"bots 1024": 75e3, "networks 256": 30e3}  # for each of two cores


def bots():
    """-> (key, state) -> actions."""
    from envs.football_bots import bot_actions, bot_of, pair

    both = pair(bot_of("hard"), bot_of("hard"))
    return lambda key, state: bot_actions(key, state, both)


def random():
    import jax

    return lambda key, state: jax.random.randint(key, (20, *state.time.shape), 0, 19)


def networks():
    import jax
    import jax.numpy as jnp

    from envs.football_state import OWN_VIEW, own_view, team_view

    shapes = [(64, 128), (64, OWN_VIEW), (64, 64), (19, 64)]
    keys = jax.random.split(jax.random.key(0), 4)
    whole, own, hidden, last = (
        jax.random.normal(key, (2, *shape)) / shape[1] ** 0.5 for key, shape in zip(keys, shapes, strict=True)
    )

    def act(key, state):
        seen = jnp.einsum("thf,tfb->thb", whole, team_view(state, 0.5))[:, None]
        x = jnp.tanh(seen + jnp.einsum("thf,tpfb->tphb", own, own_view(state)))
        logits = jnp.einsum("taf,tpfb->tpab", last, jnp.tanh(jnp.einsum("thf,tpfb->tphb", hidden, x)))
        noise = jax.random.uniform(key, logits.shape, minval=1e-6)
        return jnp.argmax(logits - jnp.log(-jnp.log(noise)), axis=2).reshape(20, -1)

    return act


def speed(players: str, num: str) -> dict:
    """Matches side by side in the last axis."""
    import jax

    from envs.football import Football, FootballParams

    env, act, num = Football(end_on_score=False), PLAYERS[players](), int(num)

    def play(key, state):
        def step(state, key):
            key_act, key_step = jax.random.split(key)
            _, state, reward, _, _ = env.step_env(key_step, state, act(key_act, state), FootballParams())
            return state, reward[0].sum()

        return jax.lax.scan(step, state, jax.random.split(key, STEPS))

    began = time.process_time()
    key = jax.random.key(0)
    state = env.reset_to_level(env.sample_level(key, (num,)))
    ready = time.process_time()
    compiled = jax.jit(play).lower(key, state).compile()
    compile_s = time.process_time() - ready
    jax.block_until_ready(compiled(key, state))
    times = [time.process_time()]
    for _ in range(TIMES):
        state, _ = jax.block_until_ready(compiled(key, state))
        times.append(time.process_time())
    return {
        "steps_per_cpu_s": num * STEPS * TIMES / (times[-1] - times[0]),
        "compile_cpu_s": compile_s,
        "start_cpu_s": ready - began,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


PLAYERS = {f.__name__: f for f in (bots, random, networks)}
WORKERS = {"speed": speed}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    if is_worker(args, WORKERS):
        return
    runs, env = {}, {"JAX_ENABLE_COMPILATION_CACHE": "0", "JAX_PLATFORMS": "cpu"}
    note = noting(runs, lambda *request: measure(__file__, sys.executable, *request, **env))
    for _ in range(args.repeats):
        for players, num in CASES:
            note(f"{players} {num}", "speed", players, str(num))
    middle = medians(runs)
    rate = lambda name: middle[name]["steps_per_cpu_s"]
    ratios = {name: {"ratio": rate(name) / least, "least": 1.0} for name, least in LEAST.items()}
    ratios["bots 1024 : the engine's earlier number"] = {"ratio": rate("bots 1024") / EARLIER, "least": 500.0}
    write(args.out, {"runs": middle, "ratios": ratios, "repeats": args.repeats, "machine": machine()})


if __name__ == "__main__":
    main()
