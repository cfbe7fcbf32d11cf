"""Measures the claims of the papers again, at a scale that fits two CPU cores, and writes what came of it.

Run:  python results/reproduce.py ued [--seed 0 1000] [--num-seeds 4] [--out runs/reproduce/ued] [--publish]
      python results/reproduce.py readme          (puts the measured tables into README.md)

--seed begins a set of --num-seeds seeds; several sets are trained one after another and pooled. Training runs go to
--out/SEED/METHOD and are resumed, or reused, when they are there already. Prints the table of claims, writes claims.json,
README.md, table.md and the figures to --out (with --publish also to results/METHOD/). What long runs
measured is kept in results/METHOD/runs (by --keep): --kept takes it from there, and trains only what is missing.

A claim that holds in results/METHOD/claims.json, over all its seeds and in each of its sets alone, is promised: the program exits
with code 1 if a promised claim does not hold here.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "results")]

import finetuning  # noqa: E402
import genie  # noqa: E402
import hgap  # noqa: E402
import madrid  # noqa: E402
import mix_me  # noqa: E402
import shaper  # noqa: E402
import shaper_nplayer  # noqa: E402
import tracr  # noqa: E402
import ued  # noqa: E402
from measure import claims_table  # noqa: E402

# each has train(seed, num_seeds, out) -> runs, claims([runs, ...]), report([runs, ...], out) -> table, figures
METHODS = {"ued": ued, "mix_me": mix_me, "shaper": shaper, "shaper_nplayer": shaper_nplayer}
METHODS |= {"finetuning": finetuning, "genie": genie, "hgap": hgap, "madrid": madrid, "tracr": tracr}


def with_verdicts(make_claims, sets: list) -> list[dict]:
    """The claims over all sets of seeds together, each with its verdict in each set alone."""
    claims = make_claims(sets)
    alone = [{c["id"]: c["holds"] for c in make_claims([runs])} for runs in sets]
    return [claim | {"each_set": [verdicts.get(claim["id"], "not measured") for verdicts in alone]} for claim in claims]


def is_promised(claim: dict) -> bool:
    """Whether a published claim has to hold wherever it is measured again."""
    return claim["holds"] == "yes" and set(claim["each_set"]) == {"yes"}


# --- what is written


def page(method: str, seeds: list[int], num_seeds: int, claims: list[dict], table: str, figures: list[str]) -> str:
    """results/METHOD/README.md."""
    images = "\n\n".join(f"![{Path(name).stem}]({name})" for name in figures)
    command = f"python results/reproduce.py {method} --seed {' '.join(map(str, seeds))} --num-seeds {num_seeds}"
    return f"# {method}: measured\n\nWritten by `{command}`.\n\n{claims_table(claims)}\n\n{table}\n\n{images}\n"


def replace_between(text: str, name: str, content: str) -> str:
    """Puts content between the markers <!-- name --> and <!-- /name -->."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def with_results(text: str) -> str:
    """README.md's text with the measured numbers of results/ put in."""
    for method in METHODS:
        if f"<!-- {method} -->" in text:
            text = replace_between(text, method, (ROOT / "results" / method / "table.md").read_text().strip())
    benches = ROOT / "results" / "bench"
    text = replace_between(text, "bench", ued.bench_table(json.loads((benches / "ued.json").read_text())))
    return replace_between(text, "run-bench", run_bench_table(json.loads((benches / "run.json").read_text())))


def run_bench_table(bench: dict) -> str:
    """What running costs, as Markdown."""
    bounds = {"loop": "at most 1.02", "waiting": "at most 0.01", "start": "at most 10", "devices": "at least 0.9"}
    bounds["processes"] = bounds["devices"]
    lines = ["| measured | value | wanted |", "| --- | --- | --- |"]
    for name, value in bench["ratios"].items():
        lines.append(f"| {name} | {value:.3f} | {next((bound for word, bound in bounds.items() if word in name), '')} |")
    how = f"Measured on {bench['machine']}, medians of {bench['repeats']}, by `python tests/bench/run.py`."
    return how + "\n\n" + "\n".join(lines)


def keep_runs(sets: list[dict], folder: Path, seeds: list[int], films: tuple[str, ...] | None = None) -> None:
    """Copies what the runs wrote to folder/SEED/NAME, without checkpoints, figures, and where they were on this machine.

    films: names of the runs whose videos are kept; None: of all.
    """
    for seed, runs in zip(seeds, sets, strict=True):
        for name, run in runs.items():
            kept = folder / str(seed) / run.name
            left_out = ["checkpoints", "figures", "config.json", *(["videos"] if films is not None and name not in films else [])]
            shutil.copytree(run, kept, ignore=shutil.ignore_patterns(*left_out), dirs_exist_ok=True)
            found = json.loads((kept / "summary.json").read_text())
            nowhere = {name: None for name in ("out", "load") if name in found["config"]}
            (kept / "summary.json").write_text(json.dumps(found | {"config": found["config"] | nowhere}, indent=1) + "\n")


def take_kept(folder: Path, out: Path, seeds: list[int]) -> None:
    """Copies kept runs, of those seeds that there are, to where training would put them."""
    for seed in seeds:
        if (folder / str(seed)).is_dir():
            shutil.copytree(folder / str(seed), out / str(seed), dirs_exist_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=[*METHODS, "readme"])
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--num-seeds", type=int, default=4)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--publish", action="store_true", help="also write results/METHOD/")
    parser.add_argument("--keep", action="store_true", help="also copy the runs, without checkpoints, to results/METHOD/runs")
    parser.add_argument("--kept", action="store_true", help="begin with the runs in results/METHOD/runs")
    args = parser.parse_args()
    if args.method == "readme":
        path = ROOT / "README.md"
        path.write_text(with_results(path.read_text()))
        return
    if args.num_seeds < 2:
        parser.error("--num-seeds must be at least 2: a claim needs a spread")
    out = args.out or Path("runs") / "reproduce" / args.method
    method, published = METHODS[args.method], ROOT / "results" / args.method
    if args.kept:
        take_kept(published / "runs", out, args.seed)
    sets = [method.train(seed, args.num_seeds, out / str(seed)) for seed in args.seed]
    claims = with_verdicts(method.claims, sets)
    table, figures = method.report(sets, out)
    promised = json.loads((published / "claims.json").read_text()) if (published / "claims.json").exists() else []
    for folder in [out, published] if args.publish else [out]:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "claims.json").write_text(json.dumps(claims, indent=1) + "\n")
        (folder / "table.md").write_text(table + "\n")
        (folder / "README.md").write_text(page(args.method, args.seed, args.num_seeds, claims, table, figures))
        for name in figures if folder != out else []:
            shutil.copy(out / name, folder / name)
    if args.keep:
        keep_runs(sets, published / "runs", args.seed, getattr(method, "FILMS", None))
    print(claims_table(claims))
    holds = {claim["id"]: claim["holds"] for claim in claims}
    broken = [f"{c['id']} ({holds.get(c['id'])})" for c in promised if is_promised(c) and holds.get(c["id"]) != "yes"]
    if broken:
        sys.exit(f"reproduce: promised by results/{args.method}, but not so here: {', '.join(broken)}")


if __name__ == "__main__":
    main()
