"""Measures the claims of the papers again, at a scale that fits two CPU cores, and writes what came of it.

Run:  python results/reproduce.py ued [--seed 0] [--num-seeds 4] [--out runs/reproduce/ued] [--publish]
      python results/reproduce.py readme          (puts the measured tables into README.md)

Training runs go to --out and are resumed or reused when they are there already. Prints the table of claims, writes claims.json,
README.md and the figures to --out (with --publish also to results/METHOD/), and exits with code 1 if a claim that
results/METHOD/claims.json says holds does not.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]


# --- runs and statistics


def trained(method: str, seed: int, num_seeds: int, folder: Path) -> dict:
    """The summary.json of a run of algos/METHOD.py at the cpu preset; trains it, or goes on training it, if need be."""
    out = folder / method
    if not (out / "summary.json").exists():
        resume = ["--resume"] if list((out / "checkpoints").glob("*.npz")) else []
        if not resume:
            shutil.rmtree(out, ignore_errors=True)
        flags = ["--seed", str(seed), "--num-seeds", str(num_seeds), "--out", str(out), *resume]
        subprocess.run([sys.executable, str(ROOT / "algos" / f"{method}.py"), *flags], check=True)
    summary = json.loads((out / "summary.json").read_text())
    ran = (summary["config"]["seed"], summary["config"]["num_seeds"])
    if ran != (seed, num_seeds):
        sys.exit(f"reproduce: {out} holds seeds {ran}: choose another --out")
    return summary


def spread(values) -> str:
    """Mean and standard error over seeds."""
    values = np.asarray(values, float)
    return f"{values.mean():.3f} ± {values.std(ddof=1) / math.sqrt(len(values)):.3f}"


def bootstrap_interval(values, draws: int = 10_000) -> tuple[float, float]:
    """The 95 % percentile interval of the mean over seeds."""
    values = np.asarray(values, float)
    picks = np.random.default_rng(0).integers(0, len(values), (draws, len(values)))
    low, high = np.percentile(values[picks].mean(1), [2.5, 97.5])
    return float(low), float(high)


def above(name: str, words: str, paper: str, ours, reference) -> dict:
    """A claim that `ours` is higher than `reference` (both per seed): holds if the difference's whole interval is above 0."""
    difference = np.asarray(ours, float) - np.asarray(reference, float)
    low, high = bootstrap_interval(difference)
    here = f"{spread(ours)} against {spread(reference)}; difference {difference.mean():.3f} [{low:.3f}, {high:.3f}]"
    return dict(id=name, claim=words, paper=paper, here=here, check="95 % bootstrap interval above 0", holds=low > 0)


# --- methods


def ued(seed: int, num_seeds: int, out: Path) -> tuple[list[dict], str, list[Path]]:
    """minimax (2311.12716): -> claims, a table of the runs, the figures to publish."""
    runs = {method: trained(method, seed, num_seeds, out) for method in ("accel", "plr", "dr")}
    accel, held = runs["accel"], "heldout_solve_rate"
    claims = []
    for method, summary in runs.items():
        final = summary["final"]
        claims += [
            above(f"{method}-learns", f"{method.upper()} solves more held-out mazes than its start", "implied", final[held],
                  summary["start"][held]),
            above(f"{method}-walk", f"{method.upper()} solves more held-out mazes than a random walk", "implied", final[held],
                  final["random_walk_solve_rate"]),
        ]  # fmt: skip
    early, late = early_and_late(out / "accel" / "metrics.csv", "buffer_walls", num_seeds)
    claims.append(above("accel-walls", "ACCEL's mazes gain walls as it trains", "2203.01302, Fig. 4: they do", late, early))
    early, late = early_and_late(out / "accel" / "metrics.csv", "buffer_path", num_seeds)
    claims.append(above("accel-path", "ACCEL's mazes grow longer solutions", "2203.01302, Fig. 4: they do", late, early))
    rows = ["| method | held-out solve rate | random walk | env steps a seed | train time |", "| --- | --- | --- | --- | --- |"]
    for method, s in runs.items():
        walk, steps = spread(s["final"]["random_walk_solve_rate"]), s["steps_per_s"] * s["train_s"] / num_seeds / 1e6
        rows.append(f"| {method} | {spread(s['final'][held])} | {walk} | {steps:.1f} M | {s['train_s'] / 60:.1f} min |")
    mazes = [name for name in accel["final"] if name.startswith("solve/")]
    rows += ["", "| held-out maze | " + " | ".join(runs) + " |", "| --- |" + " --- |" * len(runs)]
    rows += [f"| {m.removeprefix('solve/')} | " + " | ".join(spread(s["final"][m]) for s in runs.values()) + " |" for m in mazes]
    figures = [out / "accel" / "figures" / name for name in ("curves.png", "mazes.png")] + [
        out / "accel" / "videos" / "labyrinth.gif"
    ]
    config = accel["config"]
    how = (
        f"{num_seeds} seeds from {seed}, `cpu` presets (LSTM {config['hidden']}, "
        f"{config['num_envs']} x {config['num_steps']} steps), "
        f"{accel['devices']}, commit {accel['commit']}, jax {accel['versions']['jax']}. Mean ± standard error over seeds; "
        f"{config['eval_episodes']} episodes on each maze."
    )
    return claims, "\n".join([how, "", *rows]), figures


def early_and_late(path: Path, column: str, num_seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """A metric at the first evaluation after the start and at the last one, per seed."""
    import csv

    rows = [float(row[column]) for row in csv.DictReader(path.open()) if row[column]]
    return np.array(rows[num_seeds : 2 * num_seeds]), np.array(rows[-num_seeds:])


METHODS = {"ued": ued}


# --- what is written


def claims_table(claims: list[dict]) -> str:
    """The claims as Markdown."""
    lines = ["| claim | paper | here | check | holds |", "| --- | --- | --- | --- | --- |"]
    lines += [f"| {c['claim']} | {c['paper']} | {c['here']} | {c['check']} | {'yes' if c['holds'] else 'NO'} |" for c in claims]
    return "\n".join(lines)


def replace_between(text: str, name: str, content: str) -> str:
    """Puts content between the markers <!-- name --> and <!-- /name -->."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def with_results(text: str) -> str:
    """README.md's text with the measured numbers of results/ put in."""
    for method in METHODS:
        text = replace_between(text, method, (ROOT / "results" / method / "table.md").read_text().strip())
    bench = json.loads((ROOT / "results" / "bench" / "ued.json").read_text())
    return replace_between(text, "bench", bench_table(bench))


def bench_table(bench: dict) -> str:
    """The speed measurements as Markdown."""
    runs = bench["runs"]
    lines = ["| measured | value |", "| --- | --- |"]
    lines += [f"| {name} | {value:.2f} |" for name, value in bench["ratios"].items()]
    for method in ("dr", "plr"):
        lines.append(f"| {method}: env steps/s, one seed | {runs[f'{method} ours']['steps_per_s']:,.0f} |")
        share = 100 * bench[f"{method}_share_of_matmul"]
        lines.append(f"| {method}: share of the machine's matrix-multiply rate | {share:.0f} % |")
    lines.append(f"| maze alone, 1024 environments, one device: steps/s | {runs['maze ours']['steps_per_s']:,.0f} |")
    for method in ("dr", "plr", "accel"):
        cold, warm = (runs[f"{method} compile {state}"]["compile_s"] for state in ("cold", "warm"))
        lines.append(f"| {method}: seconds to compile, cold / with the cache | {cold:.0f} / {warm:.0f} |")
    lines.append(f"| accel, `cpu` preset: peak memory | {runs['accel cpu 4 seeds']['peak_rss_mb']:,.0f} MB |")
    return f"Measured on {bench['machine']}, medians of {bench['repeats']}, by `python tests/bench/ued.py`.\n\n" + "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=[*METHODS, "readme"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-seeds", type=int, default=4)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--publish", action="store_true", help="also write results/METHOD/")
    args = parser.parse_args()
    if args.method == "readme":
        path = ROOT / "README.md"
        path.write_text(with_results(path.read_text()))
        return
    out = args.out or Path("runs") / "reproduce" / f"{args.method}-{args.seed}"
    claims, table, figures = METHODS[args.method](args.seed, args.num_seeds, out)
    published = ROOT / "results" / args.method
    for folder in [out, published] if args.publish else [out]:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "claims.json").write_text(json.dumps(claims, indent=1) + "\n")
        (folder / "table.md").write_text(table + "\n")
        images = "\n\n".join(f"![{path.stem}]({path.name})" for path in figures)
        head = f"# {args.method}: measured\n\nWritten by `python results/reproduce.py {args.method} --seed {args.seed}`.\n\n"
        (folder / "README.md").write_text(f"{head}{claims_table(claims)}\n\n{table}\n\n{images}\n")
        for path in figures:
            shutil.copy(path, folder / path.name)
    print(claims_table(claims))
    promised = json.loads((published / "claims.json").read_text()) if (published / "claims.json").exists() else []
    held = {claim["id"] for claim in claims if claim["holds"]}
    broken = [claim["id"] for claim in promised if claim["holds"] and claim["id"] not in held]
    if broken:
        sys.exit(f"reproduce: claims that results/{args.method} says hold do not: {', '.join(broken)}")


if __name__ == "__main__":
    main()
