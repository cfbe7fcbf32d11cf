"""Mix-ME's claims (2311.01829), measured again on two planar robots. Run by reproduce.py.

`python results/mix_me.py FOLDER` plays the elites of a run in altered worlds (adaptation).
"""

import json
import sys
from pathlib import Path

import numpy as np
from measure import ROOT, above, added, constant, curve, draw_band, last, made_by, over, pooled, seeds_of, spread, summary, trained

sys.path[:0] = [str(ROOT)]
ROBOTS = ("cheetah", "quad")
VARIANTS = {  # name -> flags; the authors' code has k_mutations 1, which holds naive back: so it is also measured without
    "Mix-ME": "--variant mix_me",
    "Mix-ME, all agents": "--variant mix_me --k-mutations 0",
    "naive": "--variant naive",
    "naive, all agents": "--variant naive --k-mutations 0",
    "parameter sharing": "--variant parameter_sharing",
    "single agent": "--variant single_agent",
}
FLAGS = "--num-updates 200 --eval-every 100 --save-every 200"
SCORE = "qd_score"
ADAPTING = ("Mix-ME", "naive, all agents", "single agent")
ALTERED = ("a dead leg", "1.75 times the gravity")  # two of the worlds that the authors' code has: a leg's strength, gravity
CHOICE, TRIALS = 3, 32  # episodes by which the fittest elite is chosen in a new world, and fresh ones that tell how fit it is


def train(seed: int, num_seeds: int, out: Path) -> dict[str, Path]:
    """Trains every variant on both robots on one set of seeds -> the folders of the runs."""
    runs = {}
    for robot in ROBOTS:
        for name, variant in VARIANTS.items():
            folder = out / f"{robot}_{name.replace(', ', '_').replace(' ', '_')}"
            runs[f"{robot}, {name}"] = trained("mix_me", f"{FLAGS} --robot {robot} {variant}", seed, num_seeds, folder)
            if name in ADAPTING:
                added(__file__, folder, "adaptation.json")
    return runs


def adapt(folder: Path) -> None:
    """Writes adaptation.json: world -> of each seed, the returns of the elite that does best there and of the run's fittest."""
    import jax
    import jax.numpy as jnp

    from algos.mix_me import Config, play
    from common.runs.checkpoint import write_atomically
    from common.runs.devices import setup_devices
    from envs.planar import Planar, PlanarParams

    config = Config(**summary(folder)["config"])
    setup_devices(config.cache)
    sound = np.ones(Planar(config.robot).num_joints, np.float32)
    lame = np.where(np.arange(len(sound)) >= len(sound) - (3 if config.robot == "cheetah" else 2), 0, sound)  # the last leg
    worlds = dict(zip(ALTERED, (PlanarParams(strength=lame), PlanarParams(strength=sound, gravity=1.75 * 9.81)), strict=True))
    returns = jax.jit(lambda teams, key, params: play(config, teams, key, params).fitness)
    teams, fitness = (np.load(folder / "arrays" / f"{name}.npy") for name in ("genotype", "fitness"))
    fitness = fitness.reshape(teams.shape[:2])

    def pair(teams, fitness, params):
        trials = [returns(teams, jax.random.key(i), params) for i in range(CHOICE)]
        chosen = np.where(np.isfinite(fitness), np.median(trials, axis=0), -np.inf).argmax()
        both = jnp.repeat(teams[np.array([chosen, fitness.argmax()])], TRIALS, axis=0)
        return np.median(returns(both, jax.random.key(CHOICE), params).reshape(2, TRIALS), axis=1).tolist()

    found = {name: [pair(*seed, params) for seed in zip(teams, fitness, strict=True)] for name, params in worlds.items()}
    text = json.dumps(found)
    write_atomically(folder / "adaptation.json", lambda file: file.write(text.encode()))


def adapted(folders, world: str) -> tuple[np.ndarray, np.ndarray]:
    """Of each seed: the return in a world of the elite that does best there, and of the one that was fittest before."""
    return tuple(np.concatenate([json.loads((folder / "adaptation.json").read_text())[world] for folder in folders]).T)


# --- claims


def claims(sets: list[dict[str, Path]]) -> list[dict]:
    """The claims over the seeds of all sets."""
    runs = pooled(sets)
    made = []
    for robot in ROBOTS:
        of = {name: last(runs[f"{robot}, {name}"], SCORE) for name in VARIANTS}
        made += learning(robot, runs[f"{robot}, Mix-ME"])
        made += compared(robot, of)
        made += adaptation(robot, runs)
    return [*made, *speed()]


def learning(robot: str, folders) -> list[dict]:
    """The archive fills, and its best team is fast."""
    half = [np.interp(0.5 * x[-1], x, y) for x, y in curve(folders, "update", SCORE)]
    words = f"{robot}: Mix-ME's QD score still grows in the second half of the run"
    made = [above(f"{robot}-grows", words, "implied", last(folders, SCORE), half)]
    cover, best = last(folders, "coverage").mean(), last(folders, "max_fitness").mean()
    made.append(over(f"{robot}-coverage", f"{robot}: Mix-ME fills the archive", "implied", cover, 0.25))
    standing = {"cheetah": 0.0, "quad": 1.0}[robot]  # reward of being alive
    gained = best / summary(folders[0])["config"]["episode_length"] - standing
    words = f"{robot}: the fittest team gains more than 1 a step on one that stands still (1 m/s without control costs)"
    made.append(over(f"{robot}-fitness", words, "own bar", gained, 1.0))
    return made


def compared(robot: str, of: dict[str, np.ndarray]) -> list[dict]:
    """Variants against each other, by QD score at equally many evaluations."""
    ours, best, paper = (
        of["Mix-ME"],
        of["naive, all agents"],
        "2311.01829, abstract: competes with single agents, often outperforms",
    )
    words, made = f"{robot}: Mix-ME has a higher QD score than naive multi-agent MAP-Elites", []
    made.append(above(f"{robot}-naive", f"{words}, each changing one agent of a child", "implied", ours, of["naive"]))
    made.append(above(f"{robot}-naive-all", f"{words} that varies whole teams", "implied", ours, best))
    made.append(
        above(f"{robot}-both-all", f"{words}, both changing all agents of a child", "implied", of["Mix-ME, all agents"], best)
    )
    words = f"{robot}: Mix-ME has a higher QD score than one policy shared by all agents"
    made.append(above(f"{robot}-sharing", words, "implied", ours, of["parameter sharing"]))
    words = f"{robot}: Mix-ME has at least 0.9 times the QD score of one agent that sees everything"
    made.append(above(f"{robot}-competes", words, paper, ours, 0.9 * of["single agent"]))
    words = f"{robot}: Mix-ME has a higher QD score than one agent that sees everything"
    made.append(above(f"{robot}-outperforms", words, paper, ours, of["single agent"]))
    return made


def adaptation(robot: str, runs) -> list[dict]:
    """An archive holds elites for worlds that are not the one it was filled in."""
    made = []
    for world in ALTERED:
        ours, fittest = adapted(runs[f"{robot}, Mix-ME"], world)
        words = f"{robot}, {world}: what an elite of Mix-ME's archive earns above 1.1 times the fittest one (pairs of one archive)"
        gain = ours - fittest - 0.1 * np.abs(fittest)
        made.append(above(f"{robot}-adapts-{world.replace(' ', '-')}", words, "adapts", gain, constant(0, gain)))
        for name in ADAPTING[1:]:
            words = f"{robot}, {world}: the best elite of Mix-ME's archive earns more than that of {name}"
            other = adapted(runs[f"{robot}, {name}"], world)[0]
            made.append(above(f"{robot}-adapts-{name}-{world}".replace(",", "").replace(" ", "-"), words, "implied", ours, other))
    return made


def speed() -> list[dict]:
    """tests/bench/mix_me.py."""
    bench = json.loads((ROOT / "results" / "bench" / "mix_me.json").read_text())["ratios"]
    made = []
    whole, core = "evaluations per second, ours with 1 seeds on all devices", "evaluations per CPU-second, ours"
    for what, name, bar in (
        (whole, "QDax, planar, vmapped", 1.3),
        (whole, "QDax, planar, batched", 1.3),
        (core, "QDax, planar, vmapped", 1.3),
        (core, "QDax, planar, batched", 1.3),
        (core, "QDax, half-cheetah", 5.0),
    ):
        words = f"{what} : {name}"
        made.append(over(words.replace(" ", "-"), words, "own", bench[words], bar, " times"))
    return made


# --- tables and figures


def report(sets: list[dict[str, Path]], out: Path) -> tuple[str, list[str]]:
    """Writes the figures to `out` -> the tables as Markdown, the names of the figures."""
    runs = pooled(sets)
    out.mkdir(parents=True, exist_ok=True)
    plot_curves(runs, out / "curves.png")
    figures = ["curves.png"]
    for robot in ROBOTS:
        folder = runs[f"{robot}, Mix-ME"][0]
        for name, path in ((f"{robot}.gif", "videos/elites.gif"), (f"{robot}.png", "figures/archive.png")):
            (out / name).write_bytes((folder / path).read_bytes())
            figures.append(name)
    return "\n".join([*how(runs), "", *table(runs), "", *adaptation_table(runs)]), figures


def how(runs) -> list[str]:
    """What was run."""
    config, seeds = summary(runs["cheetah, Mix-ME"][0])["config"], seeds_of(runs["cheetah, Mix-ME"])
    evaluations = config["num_updates"] * config["batch_size"]
    return [
        f"Seeds {seeds}; {evaluations:,} evaluations of {config['episode_length']} steps a seed, "
        f"batches of {config['batch_size']}, "
        f"policies {config['hidden']} x {config['hidden']}, {config['num_cells']} CVT cells, agents see joints at distance "
        f"{config['obs_distance']}; {made_by(runs)}.",
        "The claims on speed by the clock were put beside those per CPU-second after both were seen.",
        "Mean ± standard error over seeds. Corrected: every elite played again from another start.",
    ]


def table(runs) -> list[str]:
    """A row for each robot and variant."""
    columns = ["robot, variant", "QD score / 1000", "coverage", "max fitness", "corrected QD score / 1000", "train time a set"]
    rows = [f"| {' | '.join(columns)} |", "| --- |" + " --- |" * (len(columns) - 1)]
    for name, folders in runs.items():
        minutes = np.mean([summary(folder)["train_s"] for folder in folders]) / 60
        cells = [name, spread(last(folders, SCORE) / 1e3), spread(last(folders, "coverage")), spread(last(folders, "max_fitness"))]
        cells += [spread(last(folders, "corrected_qd_score") / 1e3), f"{minutes:.1f} min"]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def adaptation_table(runs) -> list[str]:
    """Returns in altered worlds."""
    columns = ["robot, variant", *(f"{world}: {which}" for world in ALTERED for which in ("best elite there", "fittest before"))]
    rows = [f"| {' | '.join(columns)} |", "| --- |" + " --- |" * (len(columns) - 1)]
    for name in (f"{robot}, {variant}" for robot in ROBOTS for variant in ADAPTING):
        cells = [spread(values) for world in ALTERED for values in adapted(runs[name], world)]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    about = f"Altered worlds: an elite is chosen by the median of {CHOICE} episodes, its return is the median of {TRIALS} others."
    return [about, "", *rows]


def plot_curves(runs, path: Path) -> None:
    """QD score against evaluations, mean and standard error over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, robot in zip(figure.subplots(1, len(ROBOTS)), ROBOTS, strict=True):
        for name in VARIANTS:
            pairs = curve(runs[f"{robot}, {name}"], "evaluations", SCORE)
            x, y = pairs[0][0], np.array([y for _, y in pairs]) / 1e3
            draw_band(axes, x, y, name)
        axes.set_title(robot)
        axes.set_xlabel("evaluations")
    figure.axes[0].set_ylabel("QD score / 1000")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    adapt(Path(sys.argv[1]))
