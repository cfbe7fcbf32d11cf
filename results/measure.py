"""What the re-measurements share: runs that are trained once and reused, statistics over seeds, and claims."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]


# --- runs


def trained(method: str, flags: str, seed: int, num_seeds: int, out: Path) -> Path:
    """The folder `out` of a finished run of algos/METHOD.py; trains it, or goes on training it, if need be."""
    if not (out / "summary.json").exists():
        resume = ["--resume"] if list((out / "checkpoints").glob("*.npz")) else []
        if not resume:
            shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, str(ROOT / "algos" / f"{method}.py"), *flags.split(), "--seed", str(seed)]
        subprocess.run([*command, "--num-seeds", str(num_seeds), "--out", str(out), *resume], check=True)
    config = summary(out)["config"]
    if (config["seed"], config["num_seeds"]) != (seed, num_seeds):
        sys.exit(
            f"reproduce: {out} holds seeds {config['seed']} to {config['seed'] + config['num_seeds'] - 1}: choose another --out"
        )
    return out


def added(program: str, folder: Path, name: str) -> None:
    """Has a program of results/ write a file into the folder of a finished run, unless it is there: in a process of its own."""
    if not (folder / name).exists():
        subprocess.run([sys.executable, program, str(folder)], check=True)


def summary(out: Path) -> dict:
    """A run's summary.json."""
    return json.loads((out / "summary.json").read_text())


def curve(folders: list[Path], x: str, y: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Columns x and y of metrics.csv in the rows where y has a value, one pair for each seed of all these runs.

    A method that learns in every update has no column ppo_updates: its updates count.
    """
    curves = []
    for folder in folders:
        with (folder / "metrics.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row[y]]
        for seed in sorted({int(row["seed"]) for row in rows}):
            # the row of the start has no counters yet: they are 0 there
            pairs = [(float(row.get(x, row["update"]) or 0), float(row[y])) for row in rows if int(row["seed"]) == seed]
            curves.append(tuple(np.array(pairs).T))
    return curves


def late_value(folders: list[Path], x: str, y: str, point: float) -> np.ndarray:
    """y up to x = point, for each seed: its curve's mean over [0.8 point, point], since single evaluations scatter."""
    where = np.linspace(0.8 * point, point, 41)
    return np.array([np.interp(where, *pair).mean() for pair in curve(folders, x, y)])


def pooled(sets: list[dict]) -> dict[str, list[Path]]:
    """The runs of several sets of seeds: name -> a folder for each set."""
    return {name: [each[name] for each in sets] for name in sets[0]}


def last(folders: list[Path], column: str) -> np.ndarray:
    """The last value of a metric, for each seed."""
    return np.array([y[-1] for _, y in curve(folders, "update", column)])


def seeds_of(folders: list[Path]) -> str:
    """The seeds of runs in words: 0 to 3 and 1000 to 1003."""
    configs = [summary(folder)["config"] for folder in folders]
    return " and ".join(f"{c['seed']} to {c['seed'] + c['num_seeds'] - 1}" for c in configs)


def made_by(runs: dict[str, list[Path]]) -> str:
    """The machine and the code of runs in words: devices, commits, version of jax."""
    found = [summary(folder) for folders in runs.values() for folder in folders]
    commits = sorted({each["commit"] or "?" for each in found})
    return f"{found[0]['devices']}, commit {', '.join(commits)}, jax {found[0]['versions']['jax']}"


# --- statistics


def spread(values) -> str:
    """Mean and standard error over seeds."""
    values = np.asarray(values, float)
    return f"{values.mean():.3f} ± {values.std(ddof=1) / np.sqrt(len(values)):.3f}"


def welch_interval(ours, reference) -> tuple[float, float]:
    """The 95 % interval of mean(ours) - mean(reference), seeds of unequal variance (Welch's t)."""
    ours, reference = np.asarray(ours, float), np.asarray(reference, float)
    if np.ptp(ours) == np.ptp(reference) == 0:
        return (float(ours.mean() - reference.mean()),) * 2
    low, high = stats.ttest_ind(ours, reference, equal_var=False).confidence_interval(0.95)
    return float(low), float(high)


def iqm(scores) -> float:
    """The interquartile mean of all scores (seeds, tasks) together (Agarwal et al., 2108.13264)."""
    return float(stats.trim_mean(np.asarray(scores, float).ravel(), 0.25))


def iqm_interval(scores, draws: int = 2000) -> tuple[float, float]:
    """Its 95 % percentile interval by the stratified bootstrap: for each task the seeds are drawn again (2108.13264, Sec. 4.3)."""
    scores = np.asarray(scores, float)
    rng = np.random.default_rng(0)
    picks = rng.integers(0, scores.shape[0], (draws, *scores.shape))
    drawn = np.take_along_axis(scores[None], picks, axis=1).reshape(draws, -1)
    low, high = np.percentile(stats.trim_mean(drawn, 0.25, axis=1), [2.5, 97.5])
    return float(low), float(high)


# --- claims: holds is "yes", "no", or "not separated"


def above(name: str, words: str, paper: str, ours, reference) -> dict:
    """A claim that the mean of `ours` is higher than that of `reference` (each one value per seed)."""
    low, high = welch_interval(ours, reference)
    holds = "yes" if low > 0 else "no" if high < 0 else "not separated"
    difference = np.mean(ours) - np.mean(reference)
    here = f"{spread(ours)} against {spread(reference)}; difference {difference:.3f} [{low:.3f}, {high:.3f}]"
    return dict(id=name, claim=words, paper=paper, here=here, check="95 % interval (Welch) above 0", holds=holds)


def paired(name: str, words: str, paper: str, ours, reference) -> dict:
    """A claim that the mean of `ours` is higher than that of `reference`, value by value of the same seeds."""
    ours, reference = np.asarray(ours, float), np.asarray(reference, float)
    gain = ours - reference
    half = stats.t.ppf(0.975, len(gain) - 1) * gain.std(ddof=1) / np.sqrt(len(gain))
    low, high = gain.mean() - half, gain.mean() + half
    holds = "yes" if low > 0 else "no" if high < 0 else "not separated"
    here = f"{spread(ours)} against {spread(reference)}; difference {gain.mean():.3f} [{low:.3f}, {high:.3f}]"
    return dict(id=name, claim=words, paper=paper, here=here, check="95 % interval (paired t) above 0", holds=holds)


def equal(name: str, words: str, paper: str, ours, reference, margin: float) -> dict:
    """A claim that two means differ by less than `margin`."""
    low, high = welch_interval(ours, reference)
    holds = "yes" if -margin < low and high < margin else "no" if low > 0 or high < 0 else "not separated"
    difference = np.mean(ours) - np.mean(reference)
    here = f"{spread(ours)} against {spread(reference)}; difference {difference:.3f} [{low:.3f}, {high:.3f}]"
    return dict(id=name, claim=words, paper=paper, here=here, check=f"95 % interval (Welch) within ± {margin:g}", holds=holds)


def over(name: str, words: str, paper: str, value: float, bar: float, unit: str = "") -> dict:
    """A claim that a measured number is above a bar."""
    here = f"{value:.2f}{unit}"
    return dict(id=name, claim=words, paper=paper, here=here, check=f"above {bar:g}{unit}", holds="yes" if value > bar else "no")


def under(name: str, words: str, paper: str, value: float, bar: float, unit: str = "") -> dict:
    """A claim that a measured number is at most a bar."""
    here, holds = f"{value:.2f}{unit}", "yes" if value <= bar else "no"
    return dict(id=name, claim=words, paper=paper, here=here, check=f"at most {bar:g}{unit}", holds=holds)


def constant(value: float, like) -> np.ndarray:
    """A known number as the reference of a claim, as often as `like` has values."""
    return np.full(len(like), float(value))


def claims_table(claims: list[dict]) -> str:
    """The claims as Markdown."""
    lines = ["| claim | paper | here | check | holds | in each set of seeds |", "| --- | --- | --- | --- | --- | --- |"]
    for c in claims:
        lines.append(f"| {c['claim']} | {c['paper']} | {c['here']} | {c['check']} | {c['holds']} | {', '.join(c['each_set'])} |")
    return "\n".join(lines)


# --- figures


def draw_band(axes, x, values, label: str) -> None:
    """The mean over seeds of values (seeds, x), and a band of one standard error."""
    mean, error = values.mean(0), values.std(0, ddof=1) / np.sqrt(len(values))
    (line,) = axes.plot(x, mean, label=label)
    axes.fill_between(x, mean - error, mean + error, color=line.get_color(), alpha=0.15)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
