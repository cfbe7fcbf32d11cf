"""Opponent shaping's claims (Shaper, 2312.12568), measured again in matrix games and the coin game. Run by reproduce.py."""

import json
from functools import partial
from pathlib import Path

import numpy as np
from measure import ROOT, above, constant, curve, draw_band, equal, last, made_by, over, pooled, seeds_of, spread, summary, trained

SHAPER = "--preset cpu"
COIN = "--preset coin_game --num-episodes 50 --num-updates 80 --eval-every 40 --save-every 40"
GRID = "--preset in_the_matrix --num-updates 30 --eval-every 30 --save-every 30"
RUNS = {  # name -> algorithm file, flags
    "Shaper": ("shaper", SHAPER),
    "Good Shepherd": ("shaper", f"{SHAPER} --method gs"),
    "M-FOS": ("shaper", f"{SHAPER} --method mfos"),
    "Shaper, memory reset": ("shaper", f"{SHAPER} --method reset"),
    "Shaper, average": ("shaper", f"{SHAPER} --averaging average"),
    "M-FOS, average": ("shaper", f"{SHAPER} --method mfos --averaging average"),
    "matching pennies, Shaper": ("shaper", f"{SHAPER} --env imp --num-updates 100"),
    "LOLA": ("lola", ""),
    "naive policy gradients": ("lola", "--num-lola 0"),
    "coin game, Shaper": ("shaper", COIN),
    "coin game, Good Shepherd": ("shaper", f"{COIN} --method gs"),
    "in the matrix, Shaper": ("shaper", GRID),
}
GRIDWORLDS = ("coin game, Shaper", "coin game, Good Shepherd", "in the matrix, Shaper")
IPD = ("Shaper", "Good Shepherd", "M-FOS", "Shaper, memory reset", "Shaper, average", "M-FOS, average")


def train(seed: int, num_seeds: int, out: Path) -> dict[str, Path]:
    """Trains every method on one set of seeds -> the folders of the runs."""
    folder = lambda name: out / name.replace(", ", "_").replace(" ", "_").lower()
    return {name: trained(method, flags, seed, num_seeds, folder(name)) for name, (method, flags) in RUNS.items()}


# --- claims


def claims(sets: list[dict[str, Path]]) -> list[dict]:
    """The claims over the seeds of all sets."""
    runs = pooled(sets)
    of = {name: partial(last, folders) for name, folders in runs.items()}
    return [*dilemma(of), *memory(of), *probes(of), *others(of), *gridworlds(of, runs), *speed()]


def dilemma(of) -> list[dict]:
    """Who exploits whom in the iterated prisoner's dilemma (mutual cooperation -1 a step, defection -2)."""
    reward, gap = {}, {}
    for name in IPD:
        reward[name] = of[name]("eval_shaper")
        gap[name] = reward[name] - of[name]("eval_learner")
    ours, paper = reward["Shaper"], "2312.12568, abstract: improves individual and collective outcomes"
    naive = (of["Shaper"]("naive_1_last") + of["Shaper"]("naive_2_last")) / 2  # one value a seed: both played the same trial
    words = "two naive learners end near mutual defection: below -1.85 a step in the last tenth of a trial"
    made = [above("ipd-naive", words, "game theory: -2", constant(-1.85, naive), naive)]
    words = "Shaper earns more than mutual cooperation would give, -1 a step"
    made.append(above("ipd-exploits", words, "extortion of naive learners", ours, constant(-1, ours)))
    made.append(above("ipd-reward", "Shaper earns at least -1.15 a step", "own bar", ours, constant(-1.15, ours)))
    words = "Shaper earns at least 0.4 a step more than the learner that it shapes"
    made.append(above("ipd-gap", words, "extortion", gap["Shaper"], constant(0.4, ours)))
    words = "Good Shepherd cooperates without exploiting: the two rewards are equal"
    shepherd = reward["Good Shepherd"]
    made.append(equal("ipd-gs-fair", words, "mutual cooperation", shepherd, shepherd - gap["Good Shepherd"], 0.25))
    words = "Good Shepherd earns at least -1.35 a step"
    made.append(above("ipd-gs-reward", words, "mutual cooperation: -1", shepherd, constant(-1.35, shepherd)))
    words = "Shaper's advantage over its learner is at least 0.4 a step larger than Good Shepherd's"
    made.append(above("ipd-gap-gs", words, paper, gap["Shaper"], gap["Good Shepherd"] + 0.4))
    words = "M-FOS earns at least 0.4 a step more than naive learners do in the end"
    made.append(above("ipd-mfos", words, "shapes", reward["M-FOS"], naive + 0.4))
    words = "Shaper earns more than M-FOS after equally many generations"
    return [*made, above("ipd-shaper-mfos", words, paper, ours, reward["M-FOS"])]


def memory(of) -> list[dict]:
    """What memory of earlier episodes is worth."""
    ours, reset = of["Shaper"]("eval_shaper"), of["Shaper, memory reset"]("eval_shaper")
    words = "a memory reset in every episode costs Shaper at least 0.5 a step"
    made = [above("ipd-context", words, "context is needed", ours, reset + 0.5)]
    words = "with its memory reset it stays near defection: below -1.6 a step"
    return [*made, above("ipd-reset", words, "own bar", constant(-1.6, reset), reset)]


def probes(of) -> list[dict]:
    """The hard-stop challenge and blinded environments."""
    words = "once the learner has stopped to learn, Shaper earns at least Good Shepherd's reward less 0.1"
    shaper, shepherd = of["Shaper"]("hardstop_shaper"), of["Good Shepherd"]("hardstop_shaper")
    made = [above("hard-stop", words, "Shaper adapts to the stop", shaper, shepherd - 0.1)]
    for name in ("Shaper", "M-FOS"):
        fall = {kind: of[kind]("eval_shaper") - of[kind]("blind_shaper") for kind in (name, f"{name}, average")}
        words = f"{name} loses less with half of its environments blinded if it averages its memory over them"
        paper = "averaging carries what one environment sees to the others"
        made.append(above(f"blind-{name.lower()}", words, paper, fall[name], fall[f"{name}, average"]))
    return made


def others(of) -> list[dict]:
    """Matching pennies, and LOLA."""
    pennies = of["matching pennies, Shaper"]("eval_shaper")
    words = "Shaper wins at matching pennies: at least 0.08 a step"
    made = [above("imp", words, "shapes in a zero-sum game", pennies, constant(0.08, pennies))]
    words = "two LOLA players end with more than two naive ones (policy gradients)"
    lola, naive = of["LOLA"]("eval_welfare"), of["naive policy gradients"]("eval_welfare")
    return [*made, above("lola", words, "1709.04326: tit for tat", lola, naive)]


def gridworlds(of, runs) -> list[dict]:
    """The coin game, where the paper says that no memory is needed."""
    shaper, shepherd = of["coin game, Shaper"]("eval_shaper"), of["coin game, Good Shepherd"]("eval_shaper")
    naive = of["coin game, Shaper"]("naive_1")
    words = "coin game: Shaper earns more a step than naive learners among themselves"
    made = [above("coin-shapes", words, "shapes", shaper, naive)]
    words = "coin game: Good Shepherd, without a memory, earns at least 0.8 times what Shaper does"
    made.append(above("coin-memoryless", words, "2312.12568, abstract: inadequate for shaping over time", shepherd, 0.8 * shaper))
    words = "coin game: Shaper's reward rises through its training"
    early, late = rise(runs["coin game, Shaper"], "shaper_reward")
    made.append(above("coin-rises", words, "learns", late, early))
    words = "prisoner's dilemma in the matrix: Shaper's reward rises through its training"
    early, late = rise(runs["in the matrix, Shaper"], "shaper_reward")
    return [*made, above("matrix-rises", words, "learns", late, early)]


def rise(folders, column: str) -> tuple[np.ndarray, np.ndarray]:
    """The mean of a curve's first and of its last fifth, for each seed."""
    curves = [y for _, y in curve(folders, "update", column)]
    fifth = max(len(curves[0]) // 5, 1)
    return np.array([y[:fifth].mean() for y in curves]), np.array([y[-fifth:].mean() for y in curves])


def speed() -> list[dict]:
    """tests/bench/shaper.py."""
    path = ROOT / "results" / "bench" / "shaper.json"
    ratios = json.loads(path.read_text())["ratios"] if path.exists() else {}
    beside = {name: found for name, found in ratios.items() if "earlier" not in name}  # what was measured in the same run
    claim = lambda name, found: over(name.replace(" ", "-"), name, "own bar", found["ratio"], found["least"], " times")
    return [claim(name, found) for name, found in beside.items()]


# --- tables and figures


def report(sets: list[dict[str, Path]], out: Path) -> tuple[str, list[str]]:
    """Writes the figures to `out` -> the tables as Markdown, the names of the figures."""
    runs = pooled(sets)
    out.mkdir(parents=True, exist_ok=True)
    plot_generations(runs, out / "generations.png")
    plot_trials(runs, out / "trials.png")
    plot_visits(runs, out / "visits.png")
    film = runs["coin game, Shaper"][0] / "videos" / "film.gif"
    (out / "coin_game.gif").write_bytes(film.read_bytes())
    return "\n".join([*how(runs), "", *table(runs)]), ["generations.png", "trials.png", "visits.png", "coin_game.gif"]


def how(runs) -> list[str]:
    """What was run."""
    config, seeds = summary(runs["Shaper"][0])["config"], seeds_of(runs["Shaper"])
    return [
        f"Seeds {seeds}. Matrix games: population {config['population_size']}, {config['num_opponents']} opponents, trials of "
        f"{config['num_episodes']} episodes of {config['num_steps']} steps, tabular PPO learners; the evolution's mean against "
        f"{config['eval_learners']} fresh learners in a whole trial. {made_by(runs)}.",
        "Reward a step, mean ± standard error over seeds. Half blind: in one of its two environments the policy sees nothing. "
        "Stopped: the learner learns in the first two episodes only. Train times include waits for other work on the machine.",
    ]


def table(runs) -> list[str]:
    """A row for each run of evolution, then the rewards of the gradient baselines."""
    names = ["method", "generations", "reward", "learner's", "last tenth", "learner's", "half blind", "stopped", "train time a set"]
    rows = [f"| {' | '.join(names)} |", "| --- |" + " --- |" * (len(names) - 1)]
    for name in [*IPD, "matching pennies, Shaper", *GRIDWORLDS]:
        folders = runs[name]
        minutes = np.mean([summary(folder)["train_s"] for folder in folders]) / 60
        cells = [name, str(summary(folders[0])["config"]["num_updates"])]
        for column in ("eval_shaper", "eval_learner", "eval_shaper_last", "eval_learner_last", "blind_shaper", "hardstop_shaper"):
            there = column != "blind_shaper" or name not in GRIDWORLDS
            cells.append(spread(last(folders, column)) if there else "")
        rows.append(f"| {' | '.join([*cells, f'{minutes:.1f} min'])} |")
    baselines = "; ".join(f"{name}: {spread(last(runs[name], 'eval_welfare'))}" for name in ("LOLA", "naive policy gradients"))
    return [*rows, "", f"Mean reward of two players that learn by gradients in the prisoner's dilemma: {baselines}."]


def plot_generations(runs, path: Path) -> None:
    """The population's mean reward through the generations."""
    panels = {"prisoner's dilemma": IPD, "coin game": GRIDWORLDS[:2], "in the matrix": GRIDWORLDS[2:]}
    figure, axes = new_figure(len(panels))
    for ax, (title, names) in zip(axes, panels.items(), strict=True):
        for name in names:
            pairs = curve(runs[name], "update", "shaper_reward")
            draw_band(ax, pairs[0][0], np.array([y for _, y in pairs]), name)
        ax.set(title=title, xlabel="generation")
    axes[0].set_ylabel("reward a step, population's mean")
    figure.savefig(path, dpi=110)


def arrays(folders, name: str) -> np.ndarray:
    """An array of the last evaluation, for each seed of all runs."""
    return np.concatenate([np.load(folder / "arrays" / f"{name}.npy") for folder in folders])


def plot_trials(runs, path: Path) -> None:
    """Both sides' reward in each episode of a trial, after training."""
    names = ("Shaper", "M-FOS", "Good Shepherd", "Shaper, memory reset")
    figure, axes = new_figure(len(names))
    for ax, name in zip(axes, names, strict=True):
        for side in ("shaper", "learner"):
            values = arrays(runs[name], f"episodes/{side}")
            draw_band(ax, np.arange(values.shape[1]), values, side)
        ax.axhline(-1, color="grey", linewidth=0.8, linestyle=":")
        ax.set(title=name, xlabel="episode of the trial", ylim=(-3, 0))
    axes[0].set_ylabel("reward a step")
    figure.savefig(path, dpi=110)


def plot_visits(runs, path: Path) -> None:
    """How often each joint action is played through the trial."""
    names = ("Shaper", "M-FOS", "Good Shepherd", "Shaper, memory reset")
    figure, axes = new_figure(len(names))
    for ax, name in zip(axes, names, strict=True):
        for joint in ("CC", "CD", "DC", "DD"):
            values = arrays(runs[name], f"episodes/visits_{joint}")
            draw_band(ax, np.arange(values.shape[1]), values, joint)
        ax.set(title=name, xlabel="episode of the trial", ylim=(0, 1))
    axes[0].set_ylabel("share of steps (own action first)")
    figure.savefig(path, dpi=110)


def new_figure(columns: int):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * columns, 3.4), layout="constrained")
    return figure, figure.subplots(1, columns)
