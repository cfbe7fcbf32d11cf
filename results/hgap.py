"""H-GAP's claims (2312.02682), measured again on a planar humanoid at a scale that fits two CPU cores. Run by reproduce.py."""

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
from measure import (
    ROOT,
    above,
    constant,
    curve,
    draw_band,
    last,
    made_by,
    over,
    paired,
    pooled,
    seeds_of,
    spread,
    summary,
    trained,
    under,
)

SHORT = "all --num-updates 600 --vqvae-updates 300 --eval-every 600 --save-every 300 --eval-episodes 4 --plan-every 4"
RUNS = {  # name -> flags of algos/hgap.py
    "H-GAP": "all",
    "cloning": "bc --num-updates 2000 --eval-every 2000",
    "specialists": "offline --num-updates 3000 --eval-every 3000",
    "short": SHORT,
    "short, one code": f"{SHORT} --codes-per-step 1",
    "short, 5 % of the data": f"{SHORT} --episodes 26",
}
FEW = "--eval-episodes 4"
PLANS = {  # name -> flags of `plan`; the true dynamics need no run
    "temperature 0.5": f"--temperature 0.5 {FEW} --load {{run}}",
    "MPPI": f"--planner mppi {FEW}",
    "predictive sampling": f"--planner predictive_sampling {FEW}",
}
SPEED = {  # part and ratio of tests/bench/hgap.py -> what it is, the bar
    ("data", "steps per CPU-second, demonstrate"): ("demonstrations: control steps a CPU-second, 256 humanoids", 15_000),
    ("plan", "plans, cpu, cached : peer"): ("plans a CPU-second beside the official planner, small models", 3),
    ("plan", "plans, official, cached : peer"): ("plans a CPU-second beside the official planner, the official sizes", 3),
    ("plan", "plans, cpu, cached : whole"): ("plans a CPU-second beside its own form without a cache, small models", 8),
    ("plan", "plans, official, cached : whole"): ("plans a CPU-second beside its own form without a cache, the official sizes", 8),
    ("train", "vqvae, 4 seeds : 1, all devices"): ("an update of the VQ-VAE for four seeds beside one, by the clock", 3.6),
    ("train", "prior, 4 seeds : 1, all devices"): ("an update of the prior for four seeds beside one, by the clock", 3.6),
}
FILMS = ("H-GAP", "specialists")
TASKS = ("speed", "forward", "backward", "jump", "rotate", "crouch", "stand")


def train(seed: int, num_seeds: int, out: Path) -> dict[str, Path]:
    """Trains everything on one set of seeds, and plans -> the folders of the runs."""
    name_of = lambda name: name.replace(",", "").replace(" %", "").replace(" ", "_").lower()
    runs = {name: trained("hgap", flags, seed, num_seeds, out / name_of(name)) for name, flags in RUNS.items()}
    for name, flags in PLANS.items():
        folder = runs["H-GAP"] / f"plan_{name_of(name)}"
        if not (folder / "plan.json").exists():
            command = [sys.executable, str(ROOT / "algos" / "hgap.py"), "plan", *flags.format(run=runs["H-GAP"]).split()]
            subprocess.run([*command, "--seed", str(seed), "--num-seeds", str(num_seeds), "--out", str(folder)], check=True)
    return runs


def planned(folders, name: str) -> dict[str, np.ndarray]:
    """Mean return of each seed, by task, of one of PLANS."""
    name_of = f"plan_{name.replace(',', '').replace(' ', '_').lower()}"
    found = [json.loads((folder / name_of / "plan.json").read_text())["tasks"] for folder in folders]
    return {task: np.concatenate([np.mean(each[task]["return"], axis=1) for each in found]) for task in TASKS}


def demonstrated(folders) -> dict[str, float]:
    """What the average demonstration earns in as many steps, by task."""
    found = json.loads((folders[0] / "plan_mppi" / "plan.json").read_text())["tasks"]
    return {task: found[task]["data"] for task in TASKS}


# --- claims


def claims(sets: list[dict[str, Path]]) -> list[dict]:
    """The claims over the seeds of all sets."""
    runs = pooled(sets)
    of = {name: partial(last, folders) for name, folders in runs.items()}
    return [*models(of), *steering(of["H-GAP"], runs), *peers(of, runs), *scaling(of), *temperatures(of, runs), *speed()]


def models(of) -> list[dict]:
    """The VQ-VAE and the prior, on demonstrations that were held out."""
    hgap, short, one = of["H-GAP"], of["short"], of["short, one code"]
    error, paper = short("heldout_state_mse"), "table of codes per step"
    words = "four codes a latent step reconstruct states with at most half the error of one"
    made = [paired("codes-error", words, paper, 0.5 * one("heldout_state_mse"), error)]
    words = "H-GAP's codes in use (perplexity) are at least a quarter of its codebook"
    made.append(above("codes-used", words, "own bar", hgap("perplexity"), constant(64, error)))
    words = "reconstructed states are ten times nearer than the first state held"
    made.append(paired("reconstruction", words, "own bar", hgap("still_state_mse"), 10 * hgap("heldout_state_mse")))
    words = "the prior's cross-entropy is at most 0.7 times that of the codes' frequencies"
    made.append(paired("prior", words, "own bar", 0.7 * hgap("unigram_loss"), hgap("heldout_prior_loss")))
    words = (
        "the decoder is a model of the dynamics: doing its actions, the states come at most 1.5 times as far from those it decoded"
    )
    words += " as reconstructions are"
    return [*made, paired("open-loop", words, "own bar", 1.5 * hgap("heldout_state_mse"), hgap("open_loop_mse"))]


def steering(of, runs) -> list[dict]:
    """One model, tasks it was not trained on."""
    made, average, none = [], demonstrated(runs["H-GAP"]), np.zeros(1)
    for task in TASKS:
        ours, alone = of(f"return_{task}"), of(f"unplanned_return_{task}")
        words = f"{task}: H-GAP's return is above what the average demonstration earns"
        made.append(above(f"data-{task}", words, "figure of downstream tasks", ours, constant(average[task], ours)))
        words = f"{task}: H-GAP's return is above that of one sample (no planning)"
        made.append(paired(f"planning-{task}", words, "implied", ours, alone))
    steps = summary(runs["H-GAP"][0])["config"]["eval_steps"]
    gap = (of("return_forward") + of("return_backward")) / steps
    words = "forward and backward: the speeds that are planned differ by more than 1 m/s"
    return [*made, above("signs", words, "own bar", gap, none + 1 if len(gap) == 1 else constant(1, gap))]


def peers(of, runs) -> list[dict]:
    """Planners that know the dynamics, specialists that know the task, cloning."""
    hgap, made = of["H-GAP"], []
    for name in [name for name in PLANS if not name.startswith("temperature")]:
        theirs = planned(runs["H-GAP"], name)
        wins = np.array([(hgap(f"return_{task}") > theirs[task]) for task in TASKS]).sum(0)
        words = f"H-GAP has a higher return than {name} with the true dynamics on at least 4 of 7 tasks: on how many"
        made.append(
            above(
                f"tasks-{name.lower().replace(',', '').replace(' ', '-')}",
                words,
                "comparable or better (abstract)",
                wins,
                constant(3.5, wins),
            )
        )
    ratio = relative(hgap, of["specialists"], demonstrated(runs["H-GAP"]))
    words = "H-GAP gains at least 0.8 times as much on the average demonstration as the tasks' own specialists (median task)"
    made.append(above("specialists", words, "comparable (abstract)", ratio, constant(0.8, ratio)))
    ours, theirs = hgap("imitation_length"), of["cloning"]("imitation_length")
    words = "by its likeliest codes H-GAP stays on its feet at least as long as cloning of behaviour, to 2 steps"
    return [*made, paired("imitation", words, "far longer than an MLP's", ours, theirs - 2)]


def relative(ours, theirs, average) -> np.ndarray:
    """The median over tasks of ours' gain on the average demonstration over theirs', of each seed."""
    gain = lambda of: np.array([of(f"return_{task}") - average[task] for task in TASKS])
    return np.median(gain(ours) / np.maximum(np.abs(gain(theirs)), 1), axis=0)


def total(of, prefix: str = "return") -> np.ndarray:
    """Returns of all tasks, each over its share of what H-GAP's scale of that task is: the mean over tasks of each seed."""
    scale = {"speed": 1.0, "forward": 1.0, "backward": 1.0, "jump": 0.2, "rotate": 2.0, "crouch": 0.5, "stand": 0.5}
    return np.mean([of(f"{prefix}_{task}") / scale[task] for task in TASKS], axis=0)


def scaling(of) -> list[dict]:
    """More data; short trainings."""
    full, few = of["short"], of["short, 5 % of the data"]
    words = "with all of the data the error on held-out states is lower than with 5 %"
    made = [paired("data-error", words, "data scaling", few("heldout_state_mse"), full("heldout_state_mse"))]
    words = "with all of the data returns are higher than with 5 % (mean over tasks, each in its own unit)"
    return [*made, paired("data-return", words, "data scaling", total(full), total(few))]


def temperatures(of, runs) -> list[dict]:
    """A lower temperature than the official one."""
    cold = planned(runs["H-GAP"], "temperature 0.5")
    ours = total(lambda column: cold[column.removeprefix("return_")])
    words = "at temperature 0.5 returns are higher than at the official 2 (mean over tasks, each in its own unit)"
    return [paired("temperature", words, "2 (official code)", ours, total(of["H-GAP"]))]


def speed() -> list[dict]:
    """tests/bench/hgap.py."""
    path = ROOT / "results" / "bench" / "hgap.json"
    bench, made = json.loads(path.read_text()) if path.exists() else {}, []
    for (part, name), (words, bar) in SPEED.items():
        ratios = bench.get(part, {"ratios": {}})["ratios"]
        if name in ratios:
            compare = under if part == "train" else over
            made.append(compare(f"speed-{name.replace(', ', '-').replace(' ', '-')}", words, "own bar", ratios[name], bar))
    return made


# --- tables and figures


def report(sets: list[dict[str, Path]], out: Path) -> tuple[str, list[str]]:
    """Writes the figures to `out` -> the tables as Markdown, the names of the figures."""
    runs = pooled(sets)
    out.mkdir(parents=True, exist_ok=True)
    plot_curves(runs, out / "curves.png")
    shutil.copy(runs["H-GAP"][0] / "videos" / "tasks.gif", out / "tasks.gif")
    shutil.copy(runs["H-GAP"][0] / "plan_temperature_0.5" / "videos" / "plan_tasks.gif", out / "cool.gif")
    shutil.copy(runs["specialists"][0] / "videos" / "tasks.gif", out / "specialists.gif")
    return "\n".join([*how(runs), "", *returns_table(runs), "", *models_table(runs)]), [
        "cool.gif",
        "tasks.gif",
        "curves.png",
        "specialists.gif",
    ]


def how(runs) -> list[str]:
    """What was run."""
    config, seeds = summary(runs["H-GAP"][0])["config"], seeds_of(runs["H-GAP"])
    return [
        f"Seeds {seeds}; {config['episodes']} demonstrators of 400 steps; {config['vqvae_updates']} updates of the VQ-VAE and "
        f"{config['num_updates'] - config['vqvae_updates']} of the prior, {config['batch_size']} windows each; {config['samples']} "
        f"samples at temperature {config['temperature']:g}, a new plan every {config['plan_every']} steps; "
        f"{config['eval_episodes']} episodes of {config['eval_steps']} steps a task and seed (temperature 0.5 and true dynamics: "
        f"4). {made_by(runs)}.",
        "Mean ± standard error over seeds of the return. Speeds in m, rotate in rad, crouch and stand in steps.",
    ]


def returns_table(runs) -> list[str]:
    """A row for each way to act, a column for each task."""
    hgap = partial(last, runs["H-GAP"])
    rows = {"H-GAP": {task: hgap(f"return_{task}") for task in TASKS}}
    rows["H-GAP, temperature 0.5"] = planned(runs["H-GAP"], "temperature 0.5")
    rows["one sample (no planning)"] = {task: hgap(f"unplanned_return_{task}") for task in TASKS}
    for name, words in (("specialists", "offline specialists (TD3+BC)"), ("cloning", "cloning of behaviour (no task)")):
        rows[words] = {task: last(runs[name], f"return_{task}") for task in TASKS}
    rows |= {f"{name}, true dynamics": planned(runs["H-GAP"], name) for name in PLANS if "temperature" not in name}
    lines = [f"| | {' | '.join(TASKS)} |", "| --- |" + " --- |" * len(TASKS)]
    average = demonstrated(runs["H-GAP"])
    lines.append(f"| the average demonstration | {' | '.join(f'{average[task]:.1f}' for task in TASKS)} |")
    short = lambda x: f"{x.mean():.1f} ± {x.std(ddof=1) / len(x) ** 0.5:.1f}"
    return lines + [f"| {name} | {' | '.join(short(row[task]) for task in TASKS)} |" for name, row in rows.items()]


def models_table(runs) -> list[str]:
    """A row for each run of both models."""
    columns = [
        "heldout_state_mse",
        "heldout_action_mse",
        "perplexity",
        "heldout_prior_loss",
        "unigram_loss",
        "open_loop_mse",
        "length",
    ]
    names = [
        "run",
        "states' error",
        "actions' error",
        "codes in use",
        "prior, nats a code",
        "frequencies, nats",
        "open loop",
        "steps on its feet",
    ]
    rows = [f"| {' | '.join([*names, 'train time a set'])} |", "| --- |" + " --- |" * len(names)]
    for name in [name for name in RUNS if name not in ("cloning", "specialists")]:
        minutes = np.mean([summary(folder)["train_s"] for folder in runs[name]]) / 60
        cells = [name, *(spread(last(runs[name], column)) for column in columns), f"{minutes:.0f} min"]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def plot_curves(runs, path: Path) -> None:
    """Errors and losses through training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.4), layout="constrained")
    for ax, column in zip(figure.subplots(1, 3), ("state_mse", "action_mse", "prior_loss"), strict=True):
        for name in ("H-GAP", "short", "short, one code", "short, 5 % of the data"):
            pairs = curve(runs[name], "update", column)
            shown = np.array([y for _, y in pairs])
            there = np.isfinite(shown).all(0)
            draw_band(ax, pairs[0][0][there], shown[:, there], name)
        ax.set(title=column.replace("_", " "), xlabel="update", yscale="log")
    figure.savefig(path, dpi=110)
