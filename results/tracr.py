"""The claims about hand-compiled transformers (2311.12786, Tracr part), measured again. Run by reproduce.py. Medians over seeds."""

import csv
from pathlib import Path

import numpy as np
from measure import made_by, over, pooled, seeds_of, summary, trained

from algos.tracr import C_TR

# Max-identifier needs smaller rates: the paper's too goes down to 1e-4, since larger ones wreck what sorts the letters in block 0
PROGRAMS = {"counter": "", "max": "--lr 0.001 --lr-ratio 10 --revive-lr 0.0003"}
PAPER = {"exact": "by construction", "attention": "fig. 10", "prune": "G.1: over 60 points", "control": "fig. 79a (PCFG)"}
PAPER |= {"link": "table 3: 98.3 against 0.2", "learned": "table 3: 98.8", "forgotten": "table 3: 0", "wrecked": "needs 1e-4"}
PAPER |= {"revived": "figs. 43, 49", "lost": "figs. 43, 49", "faster": "fig. 9 (PCFG): 3K against 4.5K steps"}
SHOWN = ("a_ce0", "b_ce0", "b_ce1", "attention_a", "attention_b", "pruned_top1_a", "pruned_a")


def train(seed: int, num_seeds: int, out: Path) -> dict[str, Path]:
    """Trains the study of both programs on one set of seeds -> the folders of the runs."""
    flags = {program: f"--program {program} {rates}" for program, rates in PROGRAMS.items()}
    return {program: trained("tracr", flags[program], seed, num_seeds, out / program) for program in PROGRAMS}


# --- reading


def finetune_steps(config: dict) -> int:
    """After how many updates reverse fine-tuning begins."""
    return round(config["finetune_share"] * config["num_updates"])


def values(folders, start: str, c_tr: float, rate: str, column: str, when: str = "finetuned") -> np.ndarray:
    """A metric of one setting, for each seed: as compiled, after fine-tuning (the first evaluation then), or at the end.

    rate: L, M or S. What was never there is NaN.
    """
    found = []
    for folder in folders:
        config = summary(folder)["config"]
        lr = config["lr"] * config["lr_ratio"] ** {"L": 1, "M": 0, "S": -1}[rate] if start == "compiled" else 0.0
        with (folder / "metrics.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["start"] == start and row["a_ce0"]]
        rows = [row for row in rows if np.allclose((float(row["c_tr"]), float(row["lr"])), (c_tr, lr), rtol=1e-4, atol=1e-9)]
        updates = sorted({int(row["update"]) for row in rows})
        tuned = next(update for update in updates if update >= finetune_steps(config))
        update = {"compiled": 0, "finetuned": tuned, "end": updates[-1]}[when]
        found += [float(row[column] or "nan") for row in rows if int(row["update"]) == update]
    return np.array(found)


def steps_to_revival(folders, start: str, c_tr: float = 0.0, rate: str = "M") -> np.ndarray:
    """Steps of reverse fine-tuning to 90 % on the old task, for each seed; where that never came, all the steps there were."""
    config = summary(folders[0])["config"]
    steps = values(folders, start, c_tr, rate, "revival_steps", "end")
    return np.where(np.isfinite(steps), steps, config["num_updates"] - finetune_steps(config))


# --- claims

LEARNS = {"counter": "L", "max": "M"}  # the rate at which C_Tr 0 teaches the new task


def claims(sets: list[dict[str, Path]]) -> list[dict]:
    """The claims over the seeds of all sets."""
    made = []
    for program in PROGRAMS:
        folders = [runs[program] for runs in sets]
        for name, words, value, bar in [*after_finetuning(folders, program), *after_revival(folders)]:
            made.append(over(f"{program}-{name}", f"{program}: {words}", PAPER[name.split("-")[0]], float(value), bar))
    return made


def after_finetuning(folders, program: str) -> list[tuple]:
    """id, words, value, bar: the compiled programs, what fine-tuning makes of them, and the removal of one weight."""
    of = lambda column, c_tr=1.0, rate="M", when="finetuned": values(folders, "compiled", c_tr, rate, column, when)
    rate = LEARNS[program]
    exact = min(of(column, when="compiled").min() for column in ("a_ce0", "a_ce1"))
    gain = np.median(of("pruned_a") - of("a_ce0"))
    beside = np.median(of("attention_b", 0.0, rate) / of("uniform_b", 0.0, rate))
    made = [
        ("exact", "accuracy of the compiled program, noise included, worst seed", exact, 0.999),
        (
            "learned",
            f"C_Tr 0, rate {rate}: the new task is learned (accuracy without the link)",
            np.median(of("b_ce0", 0.0, rate)),
            0.9,
        ),
        ("forgotten", "C_Tr 1, rate M: loss of accuracy on the old task", 1 - np.median(of("a_ce0")), 0.7),
        ("attention-new", f"C_Tr 0, rate {rate}: attention to the new letter", np.median(of("attention_b", 0.0, rate)), 0.2),
        ("attention-uniform", f"C_Tr 0, rate {rate}: that over a uniform head's attention to it", beside, 1.5),
        ("prune", "C_Tr 1, rate M: gain on the old task by removing one weight", gain, 0.3),
    ]
    if program == "max":
        wrecked = np.median(of("b_ce0", 0.0) - of("b_ce0", 0.0, "L"))
        return [*made, ("wrecked", "C_Tr 0: accuracy on the new task at rate M less that at rate L", wrecked, 0.3)]
    both = np.median(of("attention_a") / np.maximum(of("attention_b"), 1e-6))
    control = np.median(of("pruned_a", 0.0, "L") - of("a_ce0", 0.0, "L"))
    return [
        *made,
        ("link", "C_Tr 1, rate M: new task with the link less without it", np.median(of("b_ce1") - of("b_ce0")), 0.6),
        ("attention-old", "C_Tr 1, rate M: attention to the old letter over that to the new one", both, 5.0),
        ("control", "gain of removing one weight less twice the gain at C_Tr 0, rate L", gain - 2 * control, 0.0),
    ]


def after_revival(folders) -> list[tuple]:
    """id, words, value, bar: reverse fine-tuning."""
    came = lambda c_tr, rate: np.isfinite(values(folders, "compiled", c_tr, rate, "revival_steps", "end")).mean()
    ours = np.median(steps_to_revival(folders, "compiled", 1.0))
    words = "steps to 90 % on the old task, {} over C_Tr 1, rate M"
    return [
        ("revived", "C_Tr 1, rate M: share of seeds whose old task comes back", came(1.0, "M"), 0.5),
        ("lost", "C_Tr 0, rate L: share of seeds whose old task does not", 1 - came(0.0, "L"), 0.5),
        ("faster-other", words.format("compiled for the new task"), np.median(steps_to_revival(folders, "other")) / ours, 1.5),
        ("faster-scratch", words.format("random weights"), np.median(steps_to_revival(folders, "scratch")) / ours, 1.5),
    ]


# --- tables and figures


def report(sets: list[dict[str, Path]], out: Path) -> tuple[str, list[str]]:
    """Writes the figures to `out` -> the tables as Markdown, the names of the figures."""
    out.mkdir(parents=True, exist_ok=True)
    lines, figures = how(sets), []
    for program in PROGRAMS:
        lines += ["", f"{program}:", "", *table([runs[program] for runs in sets])]
        for name in ("finetuning", "attention", "pruning", "revival"):
            figures.append(f"{program}_{name}.png")
            (out / figures[-1]).write_bytes((sets[0][program] / "figures" / f"{name}.png").read_bytes())
    return "\n".join(lines), figures


def how(sets) -> list[str]:
    """What was run."""
    runs = pooled(sets)
    config = summary(sets[0]["counter"])["config"]
    steps, seeds = finetune_steps(config), seeds_of(runs["counter"])
    minutes = np.mean([summary(path)["train_s"] for each in sets for path in each.values()]) / 60
    return [
        f"Seeds {seeds}; {steps} steps of fine-tuning and {config['num_updates'] - steps} of reverse fine-tuning, batches of "
        f"{config['batch_size']}; {made_by(runs)}; "
        f"{minutes:.1f} minutes a program and set.",
        "",
        "Median over seeds, all without the link but b_ce1. a: the old task, b: the new one; pruned_top1_a: the weight of the "
        "highest score removed; pruned_a: the best of those of the highest scores removed, chosen on other strings.",
    ]


def table(folders) -> list[str]:
    """A row for each setting."""
    rows = ["| C_Tr | rate | " + " | ".join(SHOWN) + " | majority | steps to revival |", "| --- |" + " --- |" * (len(SHOWN) + 3)]
    for c_tr in C_TR:
        for rate in "LMS":
            medians = [np.median(values(folders, "compiled", c_tr, rate, column)) for column in (*SHOWN, "majority_a")]
            cells = [f"{c_tr:g}", rate, *(f"{x:.2f}" for x in medians)]
            came = values(folders, "compiled", c_tr, rate, "revival_steps", "end")
            cells.append(
                f"{np.median(steps_to_revival(folders, 'compiled', c_tr, rate)):.0f} ({np.isfinite(came).sum()} of {len(came)})"
            )
            rows.append(f"| {' | '.join(cells)} |")
    return rows
