"""N-player opponent shaping's claims (Leading the Pack, 2312.12564), measured again. Run by reproduce.py.

`python results/shaper_nplayer.py FOLDER` plays the shapers of a run's seeds against one another (cross-play).
"""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
from measure import ROOT, above, added, constant, draw_band, last, made_by, pooled, seeds_of, spread, summary, trained

sys.path[:0] = [str(ROOT)]
FLAGS = "--preset cpu --eval-every 60 --save-every 60"
RUNS = {  # name -> flags
    "snowdrift, 3 players": "--env snowdrift --num-updates 60",
    "snowdrift, 5 players": "--env snowdrift --num-updates 60 --num-players 5 --num-episodes 50",
    "public goods, 3 players": "--env public_goods --num-updates 120",
    "public goods, 5 players": "--env public_goods --num-updates 60 --num-players 5 --num-episodes 50",
    "stag hunt, 3 players": "--env stag_hunt --num-updates 60",
    "tragedy, 3 players": "--env tragedy --num-updates 60",
    "public goods, 2 shapers": "--env public_goods --num-updates 120 --num-shapers 2",
}
PAIRS = "public goods, 2 shapers"
ABSTRACT = "2312.12564, abstract"


def train(seed: int, num_seeds: int, out: Path) -> dict[str, Path]:
    """Trains every setting on one set of seeds, and plays pairs trained apart against each other -> the folders of the runs."""
    folder = lambda name: out / name.replace(", ", "_").replace(" ", "_")
    runs = {name: trained("shaper_nplayer", f"{FLAGS} {flags}", seed, num_seeds, folder(name)) for name, flags in RUNS.items()}
    added(__file__, runs[PAIRS], "cross.json")
    return runs


def play_across(folder: Path) -> None:
    """Writes cross.json: the mean rewards of a trial [a][b][player] with seed a's first shaper and seed b's second."""
    import jax

    from algos.shaper_nplayer import Config, make_train, meet_learners
    from common.runs import checkpoint
    from common.runs.devices import setup_devices

    path, meta = checkpoint.newest_good(folder / "checkpoints")
    config = Config(**meta["config"])
    setup_devices(config.cache)
    init = jax.vmap(lambda seed: make_train(config).init(jax.random.key(seed)))
    means = checkpoint.load(path, jax.eval_shape(init, np.arange(config.num_seeds))).params  # (seeds, 2, D)
    play = jax.jit(lambda means: meet_learners(jax.random.key(2024), means, config).reward[:, :, 0].mean((0, 2)))
    rewards = [[play(np.stack([a[0], b[1]])).tolist() for b in means] for a in means]
    text = json.dumps(rewards)
    checkpoint.write_atomically(folder / "cross.json", lambda file: file.write(text.encode()))


def crossed(folders) -> tuple[np.ndarray, np.ndarray]:
    """Of each seed: the mean reward of both shapers trained together, and the mean over pairs with the other seeds' partners."""
    native, apart = [], []
    for folder in folders:
        reward = np.array(json.loads((folder / "cross.json").read_text()))[:, :, :2].mean(-1)
        own = np.diag(reward)
        others = (reward.sum(0) + reward.sum(1) - 2 * own) / (2 * len(own) - 2)
        native, apart = [*native, *own], [*apart, *others]
    return np.array(native), np.array(apart)


# --- claims


def claims(sets: list[dict[str, Path]]) -> list[dict]:
    """The claims over the seeds of all sets."""
    runs = pooled(sets)
    of = {name: partial(last, folders) for name, folders in runs.items()}
    gap = lambda name: of[name]("eval_shapers") - of[name]("eval_learners")
    return [*exploits(of, gap), *welfare(of), *falls(gap), *several(of, runs)]


def exploits(of, gap) -> list[dict]:
    """One shaper among three players earns more than the learners."""
    name = "snowdrift, 3 players"
    ours = of[name]("eval_shapers")
    made = [above("snowdrift-reward", "snowdrift: the shaper earns at least 2.7 of 3", "3.0", ours, constant(2.7, ours))]
    words = "snowdrift: the shaper earns at least 0.5 more than the learners"
    made.append(above("snowdrift-gap", words, "3.0 against 2.2 and 1.8", gap(name), constant(0.5, ours)))
    words = "public goods: the shaper earns more than the learners"
    gaps = gap("public goods, 3 players")
    made.append(above("public-goods-gap", words, "4.85 against 2.25", gaps, constant(0, gaps)))
    gaps = gap("tragedy, 3 players")
    words = "tragedy: the shaper earns more than the learners"
    return [*made, above("tragedy-gap", words, "5.0 against 2.0", gaps, constant(0, gaps))]


def welfare(of) -> list[dict]:
    """All together earn more than learners alone (the last tenth of a trial)."""
    ours = of["public goods, 3 players"]("eval_welfare_last")
    words = "public goods: welfare is at least 2, where defection by all gives 1"
    made = [above("public-goods-welfare", words, "3.1", ours, constant(2, ours))]
    for name in ("public goods", "stag hunt", "tragedy"):
        run = of[f"{name}, 3 players"]
        words = f"{name}: welfare is higher than among learners alone"
        made.append(above(f"{name.replace(' ', '-')}-alone", words, ABSTRACT, run("eval_welfare_last"), run("alone_welfare_last")))
    return made


def falls(gap) -> list[dict]:
    """With more players shaping is worth less."""
    made = []
    for name in ("snowdrift", "public goods"):
        words = f"{name}: the shaper's advantage over the learners is larger with 3 players than with 5"
        few, many = gap(f"{name}, 3 players"), gap(f"{name}, 5 players")
        made.append(above(f"{name.replace(' ', '-')}-falls", words, ABSTRACT, few, many))
    return made


def several(of, runs) -> list[dict]:
    """Two shapers and a learner in the public-goods game."""
    together = of[PAIRS]("eval_shapers") - of[PAIRS]("eval_learners")
    words = "public goods: two shapers earn more than the learner"
    made = [above("two-shapers-gap", words, "3.2 and 2.9 against 0.25", together, constant(0, together))]
    words = "public goods: two shapers trained together earn more than two trained apart"
    return [*made, above("two-shapers-cross", words, "conventions break in cross-play", *crossed(runs[PAIRS]))]


# --- tables and figures


def report(sets: list[dict[str, Path]], out: Path) -> tuple[str, list[str]]:
    """Writes the figures to `out` -> the tables as Markdown, the names of the figures."""
    runs = pooled(sets)
    out.mkdir(parents=True, exist_ok=True)
    plot(runs, out / "trials.png", lambda config: [*kinds(config), "welfare"], "reward a step")
    states = lambda config: [f"shapers_{action}{number}" for action in "CD" for number in range(config["num_players"])]
    plot(runs, out / "visits.png", states, "share of steps")
    return "\n".join([*how(runs), "", *table(runs)]), ["trials.png", "visits.png"]


def kinds(config) -> list[str]:
    """The players' names in the arrays of a run."""
    shapers, learners = config["num_shapers"], config["num_players"] - config["num_shapers"]
    return [*(f"shaper_{i + 1}" for i in range(shapers)), *(f"learner_{i + 1}" for i in range(learners))]


def how(runs) -> list[str]:
    """What was run."""
    folders = next(iter(runs.values()))
    config, seeds = summary(folders[0])["config"], seeds_of(folders)
    return [
        f"Seeds {seeds}. Population {config['population_size']}, {config['num_opponents']} groups of tabular PPO learners, "
        f"episodes of {config['num_steps']} steps; the evolutions' means with {config['eval_learners']} fresh groups in a whole "
        f"trial. {made_by(runs)}.",
        "Reward a step, mean ± standard error over seeds; welfare is the mean of all players, in the last tenth of a trial. Alone: "
        "learners in all seats. Tit-for-tat sits in the shapers' seats. Train times include waits for other work on the machine. "
        "Five players train for less than three (second column): their advantages are not compared at equal budgets.",
    ]


def table(runs) -> list[str]:
    """A row for each run."""
    columns = {
        "shapers": "eval_shapers",
        "learners": "eval_learners",
        "welfare": "eval_welfare_last",
        "alone": "alone_welfare_last",
    }
    columns |= {"harsh tit-for-tat": "tft_harsh_welfare_last", "soft": "tft_soft_welfare_last"}
    names = ["game", "generations x episodes", *columns, "train time a set"]
    rows = [f"| {' | '.join(names)} |", "| --- |" + " --- |" * (len(names) - 1)]
    for name, folders in runs.items():
        config = summary(folders[0])["config"]
        minutes = np.mean([summary(folder)["train_s"] for folder in folders]) / 60
        cells = [name, f"{config['num_updates']} x {config['num_episodes']}"]
        cells += [spread(last(folders, column)) for column in columns.values()]
        rows.append(f"| {' | '.join([*cells, f'{minutes:.1f} min'])} |")
    native, apart = crossed(runs[PAIRS])
    return [*rows, "", f"Two shapers trained together earn {spread(native)}, trained apart {spread(apart)}."]


def plot(runs, path: Path, names_of, label: str) -> None:
    """Curves through a trial after training, a panel for each run."""
    from matplotlib.figure import Figure

    rows = -(-len(runs) // 4)
    figure = Figure(figsize=(13.6, 3.2 * rows), layout="constrained")
    panels = figure.subplots(rows, 4, squeeze=False).flat
    for axes in panels[len(runs) :]:
        axes.set_axis_off()
    for axes, (name, folders) in zip(panels, runs.items(), strict=False):
        for curve_name in names_of(summary(folders[0])["config"]):
            values = np.concatenate([np.load(folder / "arrays" / "episodes" / f"{curve_name}.npy") for folder in folders])
            draw_band(axes, np.arange(values.shape[1]), values, curve_name.removeprefix("shapers_"))
        axes.set(title=name, xlabel="episode of the trial", ylabel=label)
        axes.legend(fontsize=6)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    play_across(Path(sys.argv[1]))
