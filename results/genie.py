"""Genie's claims (2402.15391), measured again on CoinRun at a scale that fits two CPU cores. Run by reproduce.py."""

import json
import shutil
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from measure import (
    ROOT,
    above,
    added,
    constant,
    curve,
    draw_band,
    last,
    made_by,
    over,
    pooled,
    seeds_of,
    spread,
    summary,
    trained,
    under,
)

from envs.coinrun import CoinRun, EnvParams, make_map

DOTS = "lam --data dots --size 16 --num-actions 5 --num-frames 6 --prompt-frames 1 --eval-clips 256 --patch 8"
DOTS += " --lam-patch 2 --lam-width 32 --batch-size 16 --num-updates 1200 --eval-every 1200"  # patches of the dot's size
SHORT = "dynamics --load {CoinRun} --load-parts tokenizer --num-updates 400 --eval-every 400 --save-every 200"
RUNS = {  # name -> flags of algos/genie.py; {NAME} is that run's folder
    "CoinRun": "all",
    "dots": DOTS,
    "short": SHORT,
    "short, token LAM": f"{SHORT} --lam-input tokens",
    "short, ViT": "all --tokenizer vit --num-updates 1900 --eval-every 1900 --save-every 500",
    "short, width 64": f"{SHORT} --dynamics-width 64 --eval-clips 8",  # only its loss is compared
    "short, width 32": f"{SHORT} --dynamics-width 32 --eval-clips 8",
    "cloning": "bc --load {CoinRun}",
}
FILMS = ("CoinRun",)  # the runs whose videos are kept
LAST = 100  # updates whose mean loss is compared between sizes, as in the paper's figure 9
SPEED = {  # part and ratio of tests/bench/genie.py -> what it is, the bar
    ("coinrun", "play, 64 envs, ours : peer's usual"): ("CoinRun without pictures beside the real engine", 10),
    ("coinrun", "pixels, 64 envs, ours : peer's usual"): ("CoinRun with pictures beside the real engine", 1),
    ("sample", "frames, small, cached : whole"): ("a frame with 15 cached ones before it beside all encoded anew", 8),
    ("train", "tokenizer, ours : jafar"): ("a tokenizer's learning step beside jafar's", 2),
    ("train", "lam, ours : jafar"): ("a latent action model's learning step beside jafar's", 2),
    ("train", "dynamics, ours : jafar"): ("a dynamics model's learning step beside jafar's", 2),
}
PLAYERS = ("latent", "oracle", "random", "right_up")


def train(seed: int, num_seeds: int, out: Path) -> dict[str, Path]:
    """Trains everything on one set of seeds -> the folders of the runs."""
    runs = {}
    for name, flags in RUNS.items():
        flags = flags.format(**runs)
        runs[name] = trained("genie", flags, seed, num_seeds, out / name.replace(", ", "_").replace(" ", "_").lower())
    can_play = shutil.which("chromium") and shutil.which("chromedriver") and (runs["CoinRun"] / "checkpoints").is_dir()
    if can_play:  # else (as of kept runs) the page is not shown again, and its speed is no claim
        added(str(ROOT / "results" / "genie_page.py"), runs["CoinRun"], "page.json")
    return runs


# --- claims


def claims(sets: list[dict[str, Path]]) -> list[dict]:
    """The claims over the seeds of all sets."""
    runs = pooled(sets)
    of = {name: partial(last, folders) for name, folders in runs.items()}
    learned = [*dots(of["dots"]), *parts(of["CoinRun"]), *control(of["CoinRun"]), *orders(of, runs), *cloning(of["cloning"])]
    return [*environment(), *learned, *page(runs["CoinRun"]), *speed()]


def environment() -> list[dict]:
    """CoinRun beside recordings of the real game."""
    levels, different, steps, furthest = parity()
    words = f"{levels} recorded levels of the real CoinRun are made again, cell by cell: how many differ"
    made = [under("coinrun-levels", words, "the paper plays CoinRun", different, 0)]
    words = f"over {steps} recorded steps of the real CoinRun, positions and velocities differ by at most 1e-4"
    return [*made, under("coinrun-steps", words, "the paper plays CoinRun", 1e4 * furthest, 1, " e-4")]


@cache
def parity() -> tuple[int, int, int, float]:
    """Levels compared, how many of them differ; steps compared, the largest error of a position (cells) or velocity (a step)."""
    levels = different = steps = 0
    furthest = 0.0
    with np.load(ROOT / "tests" / "envs" / "data" / "coinrun.npz") as file:
        recorded = dict(file)
    for kind, prefix in (("hard", ""), ("easy", "easy_")):
        grids = recorded[f"{prefix}level_grid"]
        maps = jax.jit(jax.vmap(partial(make_map, hard=kind == "hard")))(np.uint32(recorded[f"{prefix}level_seed"]))
        levels, different = levels + len(grids), different + int((np.asarray(maps.grid) != grids).any((1, 2)).sum())
        actions, theirs, done = (recorded[f"{kind}_{name}"] for name in ("action", "agent", "done"))
        ours, going = played(CoinRun(hard=kind == "hard"), recorded[f"{kind}_seed"], actions), ~np.logical_or.accumulate(done, 1)
        steps, furthest = steps + int(going.sum()), max(furthest, float(np.abs(ours - theirs)[going].max()))
    return levels, different, steps, furthest


def played(env: CoinRun, seeds, actions) -> np.ndarray:
    """Levels of these seeds (N,) played with actions (N, T) -> x, y, vx, vy after each (N, T, 4)."""
    params = EnvParams(env.levels(seeds))

    def step(states, action):
        _, states, *_ = jax.vmap(env.step_env, (None, 0, 0, None))(None, states, action, params)
        return states, jnp.stack([states.x, states.y, states.vx, states.vy], -1)

    first = jax.vmap(env.reset_to_level, (0, None))(jnp.arange(len(seeds)), params)
    return np.asarray(jax.jit(lambda first: jax.lax.scan(step, first, jnp.int32(actions).T)[1])(first)).swapaxes(0, 1)


def dots(of) -> list[dict]:
    """A world of a dot, where the true action is the dot's move."""
    purity, perplexity = of("code_purity"), of("code_perplexity")
    words = "a dot's moves: at least 95 % of the moves with a code are that code's commonest"
    made = [above("dots-purity", words, "codes are consistent", purity, constant(0.95, purity))]
    words = "a dot's moves: the perplexity of the five codes is at least 4.5"
    return [*made, above("dots-perplexity", words, "codes are consistent", perplexity, constant(4.5, perplexity))]


def parts(of) -> list[dict]:
    """The tokenizer and the latent action model, on levels never trained on."""
    psnr, moved, copy, used = of("psnr"), of("moved_psnr"), of("copy_psnr"), of("codes_used")
    words = "where frames change, the tokenizer's PSNR is 3 dB above that of the frame before"
    made = [above("tokenizer-copy", words, "own bar", moved, copy + 3)]
    made.append(above("tokenizer-psnr", "the tokenizer's PSNR is above 25 dB", "36 dB, table 6", psnr, constant(25, psnr)))
    made.append(
        above("tokenizer-codes", "the perplexity of the tokens is over 30 % of their number", "own bar", used, constant(0.3, used))
    )
    perplexity = of("code_perplexity")
    for name, what in (("", "other clips'"), ("_in_time", "the same clip's other")):
        gain, words = of(f"lam_psnr_gain{name}"), f"the LAM's decoder loses at least 0.5 dB with {what} codes"
        made.append(above(f"lam-gain{name.replace('_', '-')}", words, "codes carry what changes", gain, constant(0.5, gain)))
    words = "the perplexity of the six latent actions is above 3"
    made.append(above("lam-perplexity", words, "own bar", perplexity, constant(3, perplexity)))
    words = "latent actions tell of the player's true move: information over entropy, 0.2 above chance"
    ours, chance = of("code_information"), of("code_information_chance")
    return [*made, above("lam-information", words, "consistent meaning", ours, chance + 0.2)]


def control(of) -> list[dict]:
    """The dynamics model, on levels never trained on."""
    made = []
    for name, words in (("unigram", "the tokens' frequencies"), ("copy", "the best mixture of a copy and their frequencies")):
        words = f"the dynamics' cross-entropy of a hidden frame is below that of {words}"
        made.append(above(f"dynamics-{name}", words, "own bar", of(f"{name}_cross_entropy"), of("cross_entropy")))
    delta = of("delta4_psnr")
    words = "generated frames obey the codes: Delta_4 PSNR is above 0"
    made.append(above("delta4", words, "1.3 to 2.1 dB, tables 2 and 3", delta, constant(0, delta)))
    low = of("delta4_psnr_low")
    words = "the lower end of a seed's own 95 % interval of Delta_4 PSNR, over clips, is above 0"
    return [*made, above("delta4-low", words, "own bar", low, constant(0, low))]


def orders(of, runs) -> list[dict]:
    """What the paper finds better, at a shorter training."""
    delta = {name: of[name]("delta4_psnr") for name in RUNS if name.startswith("short")}
    words = "a latent action model on pixels gives control, and no less than one on tokens, to 0.1 dB"
    bar = np.maximum(delta["short, token LAM"] - 0.1, 0)
    made = [above("pixel-lam", words, "1.91 against 1.33 dB, table 2", delta["short"], bar)]
    words = (
        "with the ST-ViViT tokenizer rollouts beat the last frame of their prompt, and are no worse than with the ViT, to 0.2 dB"
    )
    ours, theirs = (of[name]("rollout_psnr") for name in ("short", "short, ViT"))
    bar = np.maximum(theirs - 0.2, of["short"]("still_psnr"))
    made.append(above("st-vivit", words, "FVD 81 against 115, table 3", ours, bar))
    loss = {name: late(runs[name], "dynamics_loss") for name in ("short, width 32", "short, width 64", "short")}
    for small, large in (("short, width 32", "short, width 64"), ("short, width 64", "short")):
        widths = [name.split()[-1] if "width" in name else "128" for name in (small, large)]
        words = f"the dynamics' loss in the last {LAST} updates is lower at width {widths[1]} than at {widths[0]}"
        made.append(above(f"scaling-{widths[1]}", words, "figure 9", loss[small], loss[large]))
    return made


def late(folders, column: str) -> np.ndarray:
    """The mean of a metric over the last LAST updates, for each seed."""
    return np.array([y[x > x[-1] - LAST].mean() for x, y in curve(folders, "update", column)])


def cloning(of) -> list[dict]:
    """Behavioural cloning of an expert that is only watched, on levels never trained on."""
    won = {name: of(f"won_{name}") for name in PLAYERS}
    words = "the oracle, which clones true actions, wins at least 85 % of hard levels"
    made = [above("bc-oracle", words, "own bar", won["oracle"], constant(0.85, won["oracle"]))]
    words = "cloning latent actions with 200 labels wins at least 0.9 times as many levels as the oracle"
    made.append(above("bc-latent", words, "equal to the oracle, figure 15", won["latent"], 0.9 * won["oracle"]))
    for name, what in (("random", "random actions do"), ("right_up", "always right and up does")):
        words = f"cloning latent actions wins more levels than {what}"
        made.append(above(f"bc-{name}", words, "figure 15", won["latent"], won[name]))
    return made


def page(folders) -> list[dict]:
    """The page on which a person plays (genie_page.py)."""
    pages = [json.loads((folder / "page.json").read_text()) for folder in folders if (folder / "page.json").exists()]
    if not pages:
        return []
    words = f"the page plays at least 4 frames a second, on cores: {', '.join(str(each['cores']) for each in pages)}"
    return [over("play", words, "1 frame a second (section 4)", min(each["frames_per_s"] for each in pages), 4)]


def speed() -> list[dict]:
    """Rates per CPU-second beside peers (tests/bench/genie.py)."""
    path = ROOT / "results" / "bench" / "genie.json"
    bench, made = json.loads(path.read_text()) if path.exists() else {}, []
    for (part, ratio), (words, least) in SPEED.items():
        ratios = bench.get(part, {"ratios": {}})["ratios"]
        if ratio in ratios:
            words = f"{words}: at least {least} times the rate"
            made.append(over(f"speed-{ratio.split(', ours')[0]}", words, "own bar", ratios[ratio], least, " times"))
    return made


# --- tables and figures


def report(sets: list[dict[str, Path]], out: Path) -> tuple[str, list[str]]:
    """Writes the figures to `out` -> the tables as Markdown, the names of the figures."""
    runs = pooled(sets)
    out.mkdir(parents=True, exist_ok=True)
    plot_curves(runs, out / "curves.png")
    figures = {"controls.gif": runs["CoinRun"][0] / "videos" / "controls.gif", "page.png": runs["CoinRun"][0] / "page.png"}
    figures = {name: path for name, path in figures.items() if path.exists()}
    for name, path in figures.items():
        shutil.copy(path, out / name)
    return "\n".join([*how(runs), "", *table(runs), "", *cloning_table(runs["cloning"])]), ["curves.png", *figures]


def how(runs) -> list[str]:
    """What was run."""
    config, seeds = summary(runs["CoinRun"][0])["config"], seeds_of(runs["CoinRun"])
    short, cloned = (summary(runs[name][0])["config"] for name in ("short", "cloning"))
    return [
        f"Seeds {seeds}. Hard CoinRun, {config['num_levels']} levels to learn from, measured on others; clips of "
        f"{config['num_frames']} frames, {config['batch_size']} an update; {config['maskgit_steps']} MaskGIT steps at temperature "
        f"{config['temperature']:g}, {config['prompt_frames']} frames of prompt. {made_by(runs)}.",
        f"Updates of the tokenizer, and of latent actions and dynamics: {config['tokenizer_updates']} and "
        f"{config['num_updates'] - config['tokenizer_updates']}; short runs have that tokenizer (ViT: one of its own, as long in "
        f"training) and {short['num_updates']} updates. Mean ± standard error over seeds. Frechet: distance on features of "
        "a fixed random layer, of generated frames and of true ones to other clips' frames; it is no FVD.",
        f"Cloning: {cloned['bc_updates']} updates of {cloned['bc_batch']} clips, {cloned['labels']} labels. Its expert was made "
        "easier to clone, and policies were freed of random actions, after sets 1000 and 2000 had been seen with another.",
    ]


def table(runs) -> list[str]:
    """A row for each run of all parts."""
    columns = ["psnr", "lam_psnr_gain", "code_perplexity", "code_information", "cross_entropy", "copy_cross_entropy"]
    columns += ["rollout_psnr", "delta4_psnr", "frechet", "frechet_of_truth"]
    names = ["run", "tokenizer, dB", "codes' gain, dB", "perplexity", "information", "cross-entropy", "of a copy"]
    names += ["rollout, dB", "Delta_4 PSNR, dB", "Frechet", "of truth", "train time a set"]
    rows = [f"| {' | '.join(names)} |", "| --- |" + " --- |" * (len(names) - 1)]
    for name in [name for name in RUNS if name not in ("dots", "cloning") and "width" not in name]:
        minutes = np.mean([summary(folder)["train_s"] for folder in runs[name]]) / 60
        cells = [name, *(spread(last(runs[name], column)) for column in columns), f"{minutes:.0f} min"]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def cloning_table(folders) -> list[str]:
    """Levels won by each policy."""
    rows = ["| levels won | all | difficulty 1 | 2 | 3 |", "| --- | --- | --- | --- | --- |"]
    for name in PLAYERS:
        cells = [spread(last(folders, f"won_{name}{end}")) for end in ("", "_1", "_2", "_3")]
        rows.append(f"| {name.replace('_', ' and ')} | {' | '.join(cells)} |")
    return rows


def plot_curves(runs, path: Path) -> None:
    """Losses through training."""
    from matplotlib.figure import Figure

    columns = {"tokenizer_loss": ["CoinRun"], "lam_loss": ["CoinRun"], "dynamics_loss": ["CoinRun"]}
    columns["dynamics_loss"] += ["short, width 32", "short, width 64", "short"]
    figure = Figure(figsize=(4 * len(columns), 3.4), layout="constrained")
    for ax, (column, names) in zip(figure.subplots(1, len(columns)), columns.items(), strict=True):
        for name in names:
            pairs = curve(runs[name], "update", column)
            shown = np.array([y for _, y in pairs])
            there = np.isfinite(shown).all(0)
            draw_band(ax, pairs[0][0][there], shown[:, there], name)
        ax.set(title=column.replace("_", " "), xlabel="update", yscale="log")
    figure.savefig(path, dpi=110)
