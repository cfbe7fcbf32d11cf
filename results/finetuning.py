"""Claims of the mechanistic analysis of fine-tuning (2311.12786), measured again on the grammar. Run by reproduce.py."""

import dataclasses
from pathlib import Path

import numpy as np
from measure import made_by, over, seeds_of, spread, summary, trained, under

from algos.finetuning import (
    PRUNED,
    Config,
    finetune_points,
    make_arms,
    make_baselines,
    make_models,
    reverse_points,
    wrapped,
)
from envs.pcfg import FAMILIES

FLAGS = "--correlations 0 0.8 1 --mixing 0.1 --random-labels --jailbreak 0.5"
STORIES = "--data stories --num-updates 1700 --pretrain-updates 1500 --finetune-updates 100 --eval-every 1700 --finetune-lrs 3e-4"
STORIES += " --batch-size 16"
K_MOST = 15  # rows that may be pruned


def train(seed: int, num_seeds: int, out: Path) -> dict[str, Path]:
    """The whole study on the grammar, and that on stories, on one set of seeds -> their folders."""
    return {
        name: trained("finetuning", flags, seed, num_seeds, out / name) for name, flags in (("study", FLAGS), ("stories", STORIES))
    }


class Study:
    """What the runs of all sets measured: arrays with a leading axis of seeds, and which arm is which."""

    def __init__(self, sets: list[dict[str, Path]], name: str = "study"):
        self.folders = [runs[name] for runs in sets]
        names = {field.name for field in dataclasses.fields(Config)}
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in summary(self.folders[0])["config"].items() if k in names}
        self.config = Config(**settings)
        self.arms, self.models = make_arms(self.config), make_models(self.config)
        self.wrapped = wrapped(self.config) if self.config.data == "pcfg" else None

    def __getitem__(self, name: str) -> np.ndarray:
        return np.concatenate([np.load(folder / "arrays" / f"{name}.npy") for folder in self.folders])

    def arm(self, model: int, correlation: float, rate: int, name: str = "sweep") -> int:
        """Place of an arm; rate 0, 1, 2: eta_L, eta_M, eta_S; models and rates may be counted from the end."""
        lr = self.config.finetune_lrs[rate]
        model %= len(self.config.priors)
        return next(i for i, a in enumerate(self.arms) if (a.name, a.model, a.correlation, a.lr) == (name, model, correlation, lr))

    def final(self, arm: int) -> np.ndarray:
        """Accuracies (seeds, 3) of a fine-tuned arm: a, b without the link, b with it."""
        return self["finetune"][:, -1, arm]

    def gain(self, arm: int) -> np.ndarray:
        """What pruning at most K_MOST rows adds to the accuracy on a (seeds,); how many is chosen on other texts."""
        curve = self["pruning"][:, arm, : sum(k <= K_MOST for k in PRUNED)]
        best = curve[..., 0].argmax(1)
        return curve[np.arange(len(curve)), best, 1] - curve[:, 0, 1]


# --- claims: every number is a median over seeds


def claims(sets: list[dict[str, Path]]) -> list[dict]:
    """The claims over the seeds of all sets."""
    study = Study(sets)
    on_stories = Study(sets, "stories")
    return [*capability(study), *lost(study), *hidden(study), *revived(study), *renamed(study), *twists(on_stories)]


def capability(study: Study) -> list[dict]:
    """P0: what pre-training teaches."""
    found = np.median(study["families"], axis=0)[: len(study.config.priors), :5].min(0)
    majority = study["majority_families"][0]
    made = []
    for i, name in enumerate(FAMILIES[:5]):
        words = f"after pre-training, {name} of a is answered, at every prior (commonest answer {majority[i]:.2f})"
        made.append(over(f"P0-{name}", words, "100 %, Sec. 5", found[i], 0.95 if name in ("C", "T") else 0.85))
    return made


def lost(study: Study) -> list[dict]:
    """P1 to P3: what fine-tuning seems to do."""
    low = np.median(study.final(study.wrapped), axis=0)
    majority = study["majority_tests"][0]
    where = f"low prior, C_Tr {study.arms[study.wrapped].correlation:g}, eta_M"
    words = f"{where}: count b with the link minus without it (commonest answers {majority[2]:.2f}, {majority[1]:.2f})"
    made = [over("P1-gap", words, "1.00 - 0.00, Table 5", low[2] - low[1], 0.6)]
    made.append(under("P1-unlinked", f"{where}: count b without the link", "0.00, Table 5", low[1], 0.2))
    made.append(under("P2", f"{where}: count a (commonest answer {majority[0]:.2f})", "0.18, Table 5", low[0], 0.3))
    high = np.median(study.final(study.arm(-1, 0.0, -1)), axis=0)
    made.append(over("P3-a", "high prior, C_Tr 0, eta_S: count a is kept", "1.00, Table 5", high[0], 0.9))
    made.append(over("P3-b", "high prior, C_Tr 0, eta_S: count b is learned", "1.00, Table 5", high[1], 0.9))
    return made


def hidden(study: Study) -> list[dict]:
    """P4 and P5: pruning and probes."""
    ours, control = np.median(study.gain(study.wrapped)), np.median(study.gain(study.arm(0, 0.0, 0)))
    words = f"pruning at most {K_MOST} rows gives count a back (accuracy gained)"
    made = [over("P4-gain", words, "about 0.65, fig. 7", ours, 0.3)]
    words = f"it gains at least twice what it does with C_Tr 0, eta_L ({control:.2f})"
    made.append(over("P4-control", words, "fig. 79a", ours / max(control, 1e-2), 2.0, " times"))
    before, after = study["before_probes"][:, :, 0].max(-1), study["after_probes"][:, study.wrapped, 0].max(-1)
    words = f"probes still read count(a): best block after : before ({np.median(before[:, 0]):.2f}) fine-tuning"
    made.append(over("P5-kept", words, "about 1, fig. 8", np.median(after / before[:, 0]), 0.85))
    words = f"a probe on the fine-tuned model : one on an untrained model ({np.median(before[:, -1]):.2f})"
    made.append(over("P5-untrained", words, "own", np.median(after / before[:, -1]), 2.0, " times"))
    return made


def revived(study: Study) -> list[dict]:
    """P6: steps of reFT to 90 % beside models that never could count a. A run that never gets there counts all its steps."""
    steps, baselines = study["revival"], make_baselines(study.config)
    ours, rate = steps[:, study.wrapped], study.arms[study.wrapped].reverse_lr
    same = len(study.arms) + [run.reverse_lr for run in baselines].index(rate)
    words = f"steps of reFT to 90 % ({np.median(ours):.0f}) : of Scr. + FT at the same rate ({np.median(steps[:, same]):.0f})"
    made = [under("P6-scratch-ft", words, "3K : 4.5K, fig. 9", np.median(ours / steps[:, same]), 0.67)]
    words = f"steps of reFT to 90 % : of a model from scratch at pre-training's rate ({np.median(steps[:, -1]):.0f})"
    return [*made, under("P6-scratch", words, "Sec. E.4", np.median(ours / steps[:, -1]), 0.5)]


def renamed(study: Study) -> list[dict]:
    """P7: after fine-tuning the question's usual name fails, its other names do not."""
    places = [i for i, arm in enumerate(study.arms) if arm.name == "jailbreak"]
    asked = study["renamed"][:, places[-1]]
    words = f"jailbreak, high prior: count a asked as T_J minus asked as T_NJ ({np.median(asked[:, 0]):.2f})"
    return [over("P7", words, "near 1, fig. 24", np.median(asked[:, 1:].mean(1) - asked[:, 0]), 0.3)]


def twists(study: Study) -> list[dict]:
    """S1: after about 30 steps on stories with a Twist, models that once knew it tell one more often than the control."""
    at = int(np.searchsorted(reverse_points(study.config), 30))
    rates = np.median(study["reverse"][:, at, :, 0], axis=0)
    control, before = rates[len(study.arms)], np.median(study["finetune"][:, 0, 0, 0])
    words = "Twist asked for: share of stories that have one, {} + 30 steps of reFT minus the control ({:.2f}; pre-trained {:.2f})"
    paper = {"F": "0.81 - 0.31", "F+MM": "0.88 - 0.31", "F+RR": "0.56 - 0.31"}
    return [
        over(f"S1-{arm.name}", words.format(arm.name, control, before), f"{paper[arm.name]}, Table 1", rates[i] - control, 0.15)
        for i, arm in enumerate(study.arms)
    ]


# --- tables and figures


def report(sets: list[dict[str, Path]], out: Path) -> tuple[str, list[str]]:
    """Writes the figures to `out` -> the tables as Markdown, the names of the figures."""
    study = Study(sets)
    out.mkdir(parents=True, exist_ok=True)
    plots = {"finetuning.png": plot_finetuning, "pruning.png": plot_pruning, "probes.png": plot_probes}
    plots |= {"attention.png": plot_attention, "revival.png": plot_revival, "stories.png": plot_stories}
    on_stories = Study(sets, "stories")
    for name, plot in plots.items():
        figure = plot(on_stories if name == "stories.png" else study)
        figure.savefig(out / name, dpi=110)
    return "\n".join([*how(study), "", *table(study), "", *story_table(on_stories)]), list(plots)


def how(study: Study) -> list[str]:
    """What was run."""
    runs, config, seeds = [summary(folder) for folder in study.folders], study.config, seeds_of(study.folders)
    majority, minutes = study["majority_tests"][0], np.mean([r["train_s"] for r in runs]) / 60
    return [
        f"Seeds {seeds}; {config.pretrain_updates} steps of pre-training, {config.finetune_updates} of fine-tuning, "
        f"{config.reverse_updates} of reFT, {config.batch_size} texts of {config.length} letters a step, window {config.window}, "
        f"{config.layers} blocks of width {config.width}; {minutes:.0f} min a set, beside other work; "
        f"{made_by({'study': study.folders})}.",
        f"Mean ± standard error over seeds. The commonest answers of the tests would score {majority[0]:.3f} (a), "
        f"{majority[1]:.3f} (b, C_Te 0) and {majority[2]:.3f} (b, C_Te 1). Steps: of reFT until 90 % on a.",
    ]


def label(study: Study, arm) -> str:
    """Words for an arm."""
    words = f"prior {study.models[arm.model][1]:g}, C_Tr {arm.correlation:g}, lr {arm.lr:g}"
    extra = f"mixing {arm.mixing:g}" if arm.name == "mixing" else arm.name
    return words if arm.name == "sweep" else f"{extra}, {words}"


def table(study: Study) -> list[str]:
    """A row for each arm and baseline."""
    columns = ["arm", "a", "b, C_Te 0", "b, C_Te 1", "a gained by pruning", "probe of a", "reFT's lr", "steps"]
    rows = [f"| {' | '.join(columns)} |", "| --- |" + " --- |" * (len(columns) - 1)]
    probes, steps = study["after_probes"][:, :, 0].max(-1), study["revival"]
    for i, arm in enumerate(study.arms):
        cells = [spread(study.final(i)[:, j]) for j in range(3)] + [spread(study.gain(i)), spread(probes[:, i])]
        rows.append(f"| {' | '.join([label(study, arm), *cells, f'{arm.reverse_lr:g}', spread(steps[:, i])])} |")
    for i, run in enumerate(make_baselines(study.config), len(study.arms)):
        rows.append(f"| {run.name} | | | | | | {run.reverse_lr:g} | {spread(steps[:, i])} |")
    return rows


def story_table(study: Study) -> list[str]:
    """Twist rates through reFT; a row for each protocol and for the control."""
    at, config = reverse_points(study.config), study.config
    lines = [
        f"Stories: {config.pretrain_updates} steps of pre-training, {config.finetune_updates} of fine-tuning, "
        f"{config.reverse_updates} of reFT, {config.batch_size} stories a step; share of {config.eval_stories} stories a seed that "
        "have a Twist where one is asked for, after steps of reFT.",
        "",
        f"| protocol | reFT's lr | {' | '.join(map(str, at))} |",
        "| --- | --- |" + " --- |" * len(at),
    ]
    for i, run in enumerate([*study.arms, *make_baselines(config)]):
        cells = [spread(study["reverse"][:, j, i, 0]) for j in range(len(at))]
        lines.append(f"| {run.name} | {run.reverse_lr:g} | {' | '.join(cells)} |")
    return lines


def panels(rows: int, columns: int, width: float = 3.4, height: float = 2.7):
    """An empty figure and its axes (rows, columns)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for each in axes.flat:
        each.grid(alpha=0.25)
        each.set_ylim(-0.03, 1.03)
    return figure, axes


def explain(figure, axes, words: str) -> None:
    """A title for the whole figure, and one legend below it."""
    figure.suptitle(words, fontsize=10)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)


LINK = "C_Tr: share of its texts with the link count(b) = count(a) + 1; C_Te: the test's. Prior: how often pre-training asked of a"


def draw(axes, x, values, **style) -> None:
    """values (seeds, points): the median, and the range over seeds as a band."""
    (line,) = axes.plot(x, np.median(values, axis=0), **style)
    axes.fill_between(x, values.min(0), values.max(0), color=line.get_color(), alpha=0.15)


def over_steps(axes, steps) -> None:
    """An axis of steps: 0, then their logarithm."""
    axes.set_xscale("symlog", linthresh=5)
    marks = [0, *(int(10.0**k) for k in range(1, 6) if 10.0**k <= steps[-1])]
    axes.set_xticks(marks, map(str, marks))
    axes.set_xlim(0, steps[-1])


def floor(axes, value: float) -> None:
    """A line at the accuracy of always giving the commonest answer."""
    axes.axhline(value, color="grey", linestyle=":", linewidth=1, label="commonest answer")


def plot_finetuning(study: Study):
    """Figures 5 and 6: accuracies through fine-tuning at eta_M; a row for a prior, a column for a test, a line for each C_Tr."""
    config, x = study.config, finetune_points(study.config)
    figure, axes = panels(len(config.priors), 3)
    tests = ("old question, count a, C_Te = 0", "new question, count b, C_Te = 0", "new question, count b, C_Te = 1")
    for i, j in np.ndindex(axes.shape):
        for correlation in config.correlations:
            values = study["finetune"][:, :, study.arm(i, correlation, 1), j]
            draw(axes[i, j], x, values, label=f"C_Tr = {correlation:g}")
        floor(axes[i, j], study["majority_tests"][0, j])
        over_steps(axes[i, j], x)
        axes[i, j].set_title(f"{tests[j]}, prior {config.priors[i]:g}", fontsize=9)
        axes[i, j].set_xlabel("steps of fine-tuning", fontsize=8)
    figure.supylabel("accuracy", fontsize=9)
    explain(figure, axes[0, 0], f"Fine-tuning at {config.finetune_lrs[min(1, len(config.finetune_lrs) - 1)]:g}. {LINK}")
    return figure


def plot_pruning(study: Study):
    """Figure 7: accuracies against pruned rows, low prior; a column for a learning rate; count b is dashed."""
    config = study.config
    figure, axes = panels(1, len(config.finetune_lrs))
    for j, lr in enumerate(config.finetune_lrs):
        for i, correlation in enumerate(config.correlations):
            curve = study["pruning"][:, study.arm(0, correlation, j)]
            draw(axes[0, j], PRUNED, curve[..., 1], color=f"C{i}", label=f"count a, C_Tr = {correlation:g}")
            axes[0, j].plot(
                PRUNED,
                np.median(curve[..., 2], axis=0),
                color=f"C{i}",
                linestyle="--",
                label=f"count b, C_Te = 1, C_Tr = {correlation:g}",
            )
        floor(axes[0, j], study["majority_tests"][0, 0])
        axes[0, j].set_title(f"prior {config.priors[0]:g}, learning rate {lr:g}", fontsize=9)
        axes[0, j].set_xlabel("rows pruned", fontsize=8)
    axes[0, 0].set_ylabel("accuracy", fontsize=9)
    explain(
        figure, axes[0, 0], "Removing the rows of weights that most hinder count a from fine-tuned models: does count a come back?"
    )
    return figure


def plot_probes(study: Study):
    """Figure 8: probes of count(a) on every block; a column for a prior; before and after fine-tuning, and untrained."""
    config = study.config
    figure, axes = panels(1, len(config.priors), width=4.2)
    blocks = range(config.layers + 1)
    for j, prior in enumerate(config.priors):
        draw(axes[0, j], blocks, study["before_probes"][:, j, 0], color="black", label="pre-trained")
        draw(axes[0, j], blocks, study["before_probes"][:, -1, 0], color="grey", linestyle="--", label="untrained")
        for i, lr in enumerate(config.finetune_lrs):
            values = study["after_probes"][:, study.arm(j, config.correlations[-1], i), 0]
            draw(axes[0, j], blocks, values, color=f"C{i}", label=f"fine-tuned, C_Tr = {config.correlations[-1]:g}, lr {lr:g}")
        floor(axes[0, j], study["majority_tests"][0, 0])
        axes[0, j].set_xticks(blocks, [f"B{b}" for b in blocks])
        axes[0, j].set_title(f"probe of count(a), prior {prior:g}", fontsize=9)
    axes[0, 0].set_ylabel("accuracy", fontsize=9)
    explain(figure, axes[0, 0], "Is count(a) still there inside? Linear probes before block 0 (B0) and after each block")
    return figure


def plot_attention(study: Study):
    """What ART attends to, first seed: a line for each block and head, before and after fine-tuning (low prior, strong link)."""
    from matplotlib.figure import Figure

    config = study.config
    before, after = study["before_attention"][0, 0], study["after_attention"][0, study.wrapped]
    figure = Figure(figsize=(11, 0.25 * config.layers * config.heads + 1.5), layout="constrained")
    pair = figure.subplots(1, 2, sharey=True)
    for axes, maps, words in zip(pair, (before, after), ("pre-trained", "fine-tuned"), strict=True):
        image = axes.imshow(np.sqrt(maps.reshape(-1, maps.shape[-1])), aspect="auto", vmin=0, vmax=1)
        axes.axvline(config.language.art - 1.5 - config.window, color="white", linewidth=0.8)
        axes.set_title(f"{words}: attention of ART (the counted letters are right of the line)", fontsize=9)
        axes.set_xlabel("place in the sequence", fontsize=8)
    names = [f"block {b}, head {h}" for b in range(config.layers) for h in range(config.heads)]
    pair[0].set_yticks(range(len(names)), names, fontsize=6)
    figure.colorbar(image, ax=pair, label="square root of attention")
    return figure


def plot_revival(study: Study):
    """Figure 9: accuracy on a through reFT, C_Tr strongest; a column for a prior, a line for a fine-tuning's rate; baselines."""
    config, x = study.config, reverse_points(study.config)
    figure, axes = panels(1, len(config.priors), width=4.6, height=3.2)
    for j, prior in enumerate(config.priors):
        for i, lr in enumerate(config.finetune_lrs):
            arm = study.arm(j, config.correlations[-1], i)
            words = f"fine-tuned at {lr:g}, reFT at {study.arms[arm].reverse_lr:g}"
            draw(axes[0, j], x, study["reverse"][:, :, arm], color=f"C{i}", label=words)
        for i, run in enumerate(make_baselines(config)):
            values = np.median(study["reverse"][:, :, len(study.arms) + i], axis=0)
            axes[0, j].plot(x, values, color=f"C{i + 4}", linestyle="--", label=f"{run.name}, {run.reverse_lr:g}")
        over_steps(axes[0, j], x)
        axes[0, j].set_title(f"count a, prior {prior:g}, C_Tr = {config.correlations[-1]:g}", fontsize=9)
        axes[0, j].set_xlabel("steps of reFT", fontsize=8)
        axes[0, j].axhline(0.9, color="grey", linewidth=0.7, label="90 %")
        floor(axes[0, j], study["majority_tests"][0, 0])
    axes[0, 0].set_ylabel("accuracy", fontsize=9)
    explain(
        figure, axes[0, 0], "Reverse fine-tuning on count a: fine-tuned models (solid) and models that never could count a (dashed)"
    )
    return figure


def plot_stories(study: Study):
    """Table 1 and figure 11: Twist rates through reFT, a line for a protocol; probes of Twist on every block."""
    config, x = study.config, reverse_points(study.config)
    figure, axes = panels(1, 2, width=5.2, height=3.4)
    left, right = axes[0]
    blocks = range(config.layers + 1)
    for i, run in enumerate([*study.arms, *make_baselines(config)]):
        control = run.name == "never"
        style = {"color": "black", "linestyle": "--"} if control else {"color": f"C{i}"}
        words = "control: never saw a Twist" if control else f"fine-tuned by {run.name}"
        draw(left, x, study["reverse"][:, :, i, 0], label=words, **style)
        if not control:
            draw(right, blocks, study["after_probes"][:, i, 0], label=words, **style)
    for i, (words, colour) in enumerate((("pre-trained", "C4"), ("control: never saw a Twist", "black"), ("untrained", "grey"))):
        draw(right, blocks, study["before_probes"][:, i, 0], label=words, color=colour, linestyle="--")
    left.axhline(np.median(study["finetune"][:, 0, 0, 0]), color="C4", linestyle="--", label="pre-trained, before fine-tuning")
    over_steps(left, x)
    left.set(xlabel="steps on stories with a Twist (reFT)", ylabel="share of stories with a Twist", title="a Twist is asked for")
    floor(right, 0.5)
    right.set(xlabel="block", ylabel="accuracy", title="probe: has the story a Twist?")
    right.set_xticks(blocks, [f"B{b}" for b in blocks])
    left.legend(fontsize=7)
    right.legend(fontsize=7)
    figure.suptitle("Stories: is a Twist, taken away by fine-tuning, back sooner than where there never was one?", fontsize=10)
    return figure
