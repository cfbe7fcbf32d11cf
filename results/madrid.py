"""MADRID's claims (2401.13460), measured again on this repository's football and its shipped league. Run by reproduce.py.

`python results/madrid.py FOLDER SEED` plays the matches of bots and of the league that some claims are about: matches.json there.
"""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from measure import ROOT, above, constant, equal, last, made_by, over, pooled, seeds_of, spread, summary, trained, under
from scipy import stats

sys.path[:0] = [str(ROOT)]
BOTS_ALONE = "--league none --target hard --references sound --num-updates 100 --eval-every 100"
RUNS = {  # name -> flags of algos/madrid.py
    "MADRID": "",
    "targeted": "--method targeted",
    "random": "--method random",
    "flaw, MADRID": f"{BOTS_ALONE} --flaw never_shoots",
    "flaw, targeted": f"{BOTS_ALONE} --flaw never_shoots --method targeted",
    "no flaw": BOTS_ALONE,
}
FILMS = ("MADRID",)  # the runs whose videos are kept
BEST = 5  # cells of the highest estimates
LEVELS, CHUNK, FULL = 2000, 250, 200  # levels of a pairing, matches side by side, whole matches
GROWN = "467cd0d99a9f"  # at this commit searches that had been looked at after 30 iterations were given 30 more
FAIR = 10  # times as many levels of the hard bot against itself
BOT_NAMES = ("easy", "medium", "hard")


def train(seed: int, num_seeds: int, out: Path) -> dict[str, Path]:
    """Searches by every method on one set of seeds, and plays the matches -> the folders of the runs."""
    folder = lambda name: out / name.replace(", ", "_").replace(" ", "_").lower()
    runs = {name: trained("madrid", flags, seed, num_seeds, folder(name)) for name, flags in RUNS.items()}
    if not (runs["MADRID"] / "matches.json").exists():
        subprocess.run([sys.executable, __file__, str(runs["MADRID"]), str(seed)], check=True)
    return runs


# --- matches


def play_matches(folder: Path, seed: int) -> None:
    """Writes matches.json: shares of short levels won and lost by the left team [pairing -> (won, lost)], statistics of hard bots'
    levels, and whole matches of the league's last team against bots [bot -> won, drawn, lost, scored, conceded]."""
    import jax

    from algos import tizero
    from algos.madrid import CPU, make_players, play, player
    from common.runs import checkpoint
    from common.runs.devices import setup_devices
    from envs.football import Football

    config = replace(CPU, num_checkpoints=99, references=("league", *BOT_NAMES))
    setup_devices(config.cache)
    players = make_players(config)
    target = len(players.names) - 1
    sides = {}

    def share(left: int, right: int, key, times: int = 1) -> list[float]:
        kind = bool(players.is_bot[left]), bool(players.is_bot[right])
        if kind not in sides:

            def many(left, right, keys):
                pair = player(players, left, kind[0]), player(players, right, kind[1])

                def chunk(key):
                    key_level, key_play = jax.random.split(key)
                    level = Football().sample_level(key_level, (CHUNK,))
                    return play(key_play, config, pair, (False, False), level)[0].mean(-1)

                return jax.lax.map(chunk, keys).mean(0)

            sides[kind] = jax.jit(many)
        won = sides[kind](players.place[left], players.place[right], jax.random.split(key, times * LEVELS // CHUNK))
        return [float(x) for x in won]

    keys = iter(jax.random.split(jax.random.key(seed), 99))
    found = {"levels": {}, "names": players.names[:-1]}
    for i, name in enumerate(players.names[:-1]):
        found["levels"][f"target against {name}"] = share(target, i, next(keys))
    hard = players.names.index("hard")
    found["levels"]["hard against hard"] = share(hard, hard, next(keys), FAIR)
    settings = replace(tizero.CPU, seed=seed, final_matches=FULL)
    found["matches"] = tizero.whole_matches(settings, player(players, players.place[target], False), BOT_NAMES)
    found["statistics"] = statistics(config, next(keys))
    text = json.dumps(found)
    checkpoint.write_atomically(folder / "matches.json", lambda file: file.write(text.encode()))


def statistics(config, key) -> dict[str, float]:
    """Of two hard bots in random levels, until the first goal."""
    import jax
    import jax.numpy as jnp

    from algos.madrid import play
    from envs.football import Football
    from envs.football_bots import bot_of
    from envs.football_state import NORMAL

    @jax.jit
    def many(keys):
        def chunk(key):
            key_level, key_play = jax.random.split(key)
            level, hard = Football().sample_level(key_level, (CHUNK,)), bot_of("hard")
            first, states = play(key_play, config, (hard, hard), (False, False), level, True)
            going = jnp.cumsum(states.score.sum(1) > 0, axis=0) == 0  # (T, B): before the first goal
            owned = states.owner.any((1, 2))
            team = jnp.argmax(states.last.any(2), axis=1)  # whose touch was the last
            turned = (team[1:] != team[:-1]) & states.last.any((1, 2))[:-1] & going[1:]
            began = (states.mode[1:] != NORMAL) & (states.mode[:-1] == NORMAL) & going[1:]
            pieces = 1e2 * began.sum() / going.sum()
            values = first.any(0).mean(), (owned & going).sum() / going.sum(), turned.sum(0).mean(), pieces
            return jnp.stack([jnp.float32(x) for x in values])

        return jax.lax.map(chunk, keys).mean(0)

    values = many(jax.random.split(key, LEVELS // CHUNK))
    return dict(zip(("goal", "owned", "turnovers", "set_pieces"), map(float, values), strict=True))


# --- claims


def array(folders, name: str) -> np.ndarray:
    """An array of all seeds' evaluations at the end."""
    return np.concatenate([np.load(folder / "arrays" / f"{name}.npy") for folder in folders])


def exposed(folders) -> np.ndarray:
    """The mean regret, with fresh luck, of the BEST cells by the archive's estimate, for each seed."""
    estimate, fresh = array(folders, "cell_regret"), array(folders, "cell_regret_again")
    estimate, fresh = (x.reshape(len(x), -1) for x in (estimate, fresh))
    best = np.argsort(-np.where(np.isfinite(estimate), estimate, -np.inf), axis=1)[:, :BEST]
    return np.take_along_axis(fresh, best, 1).mean(1)


def claims(sets: list[dict[str, Path]]) -> list[dict]:
    """The claims over the seeds of all sets."""
    runs = pooled(sets)
    of = {name: partial(last, folders) for name, folders in runs.items()}
    games = [json.loads((folder / "matches.json").read_text()) for folder in runs["MADRID"]]
    return [*order(of), *flaws(of, runs), *references(runs["MADRID"], of["MADRID"], games), *world(games), *league(games)]


def order(of) -> list[dict]:
    """Figure 5.4a of the thesis, but with fresh luck."""
    fresh = {name: of[name]("regret_again") for name in ("MADRID", "targeted", "random")}
    words = "regret with fresh luck: MADRID's is higher than that of {}"
    made = [above(f"order-{name}", words.format(name), "fig. 4", fresh["MADRID"], fresh[name]) for name in ("targeted", "random")]
    words = "MADRID's is above 0 and at least 1.2 times that of targeted"
    made.append(above("order-ratio", words, "own bar", fresh["MADRID"], 1.2 * np.maximum(fresh["targeted"], 0)))
    made.append(above("order-base", "targeted's is higher than random's", "fig. 4", fresh["targeted"], fresh["random"]))
    most = constant(0.03, fresh["random"])
    made.append(above("random", "random levels' regret is below .03", "slightly below 0", most, fresh["random"]))
    ours, theirs = of["MADRID"]("coverage"), of["targeted"]("coverage")
    return [*made, above("coverage", "MADRID fills at least as many cells as targeted, to 1 %", "own", ours, theirs - 0.01)]


def flaws(of, runs) -> list[dict]:
    """A planted weakness is found, and where there is none, none is."""
    found, none = exposed(runs["flaw, MADRID"]), exposed(runs["no flaw"])
    words = f"a bot that never shoots, against its sound self: the {BEST} best cells' regret with fresh luck is at least .3"
    made = [above("flaw", words, "own bar", found, constant(0.3, found))]
    made.append(above("flaw-order", "MADRID's is higher than targeted's", "own", found, exposed(runs["flaw, targeted"])))
    made.append(above("flaw-sound", "it is higher than where the target is sound", "own", found, none))
    fresh = of["no flaw"]("regret_again")
    words = "a sound bot against itself: the archive's mean regret with fresh luck is 0"
    made.append(equal("null", words, "own", fresh, constant(0, fresh), 0.02))
    ours = of["no flaw"]("regret")
    words = "while the archive's own estimates say that it is above .05 (the winner's curse, which is built in)"
    return [*made, above("null-curse", words, "own", ours, constant(0.05, ours))]


def references(folders, of, games) -> list[dict]:
    """Figures 5.5 and 5.6."""
    number = sum("bot" not in name and name not in BOT_NAMES for name in games[0]["names"])
    number = min(number, summary(folders[0])["config"]["num_checkpoints"])
    each = array(folders, "reference_regret_again")[:, :number]
    ranks = np.array([stats.spearmanr(np.arange(number), row).statistic for row in each])
    words = "regret rises with the reference's place in the league (rank correlation at least .5)"
    made = [above("strength", words, "fig. 5", ranks, constant(0.5, ranks))]
    share = np.nanmean(significant(folders)[:, :number], (1, 2))
    words = (
        "in over 10 % of scenarios an earlier team does better against the target than the target itself, by 1.64 standard errors"
    )
    made.append(above("weaker", words, "90 %, fig. 6, uncorrected", share, constant(0.1, share)))
    regret = array(folders, "cell_regret_again")
    regret = regret.reshape(*regret.shape[:2], *summary(folders[0])["config"]["grid"])
    half = regret.shape[2] // 2
    halves = np.nanmean(regret[:, :, half:], (1, 2, 3)), np.nanmean(regret[:, :, :half], (1, 2, 3))
    words = "regret is higher with the ball in the target's half than in the reference's"
    return [*made, above("halves", words, "fig. 8", *halves)]


def significant(folders) -> np.ndarray:
    """Whether regret with fresh luck is above 0 by 1.64 standard errors (seeds, references, cells): 0, 1, or NaN
    for empty cells; 5 % are by chance."""
    played = summary(folders[0])["config"]["final_repeats"]
    regret, xp, sp = (array(folders, name) for name in ("cell_regret_again", "cell_xp", "cell_sp"))
    variance = lambda x: x.sum(-1) - (x[..., 0] - x[..., 1]) ** 2  # of a match's value, which is 1, 0 or -1
    bar = 1.64 * np.sqrt((variance(xp) + variance(sp)) / played)
    return np.where(np.isnan(regret), np.nan, regret > bar)


def world(games) -> list[dict]:
    """The world's statistics, two hard bots in random levels."""
    mean = lambda name: float(np.mean([game["statistics"][name] for game in games]))
    bounds = {"goal": (0.04, 0.2), "owned": (0.3, 0.55), "turnovers": (0.5, 3)}
    paper = {"goal": "6 % in the engine", "owned": "38 % in the engine", "turnovers": "0.76 in the engine"}
    what = {"goal": "share of levels with a goal", "owned": "share of steps with an owner", "turnovers": "turnovers a level"}
    made = []
    for name, (low, high) in bounds.items():
        made.append(over(f"world-{name}-low", f"hard bots: {what[name]}", paper[name], mean(name), low))
        made.append(under(f"world-{name}-high", f"hard bots: {what[name]}", paper[name], mean(name), high))
    won, lost = np.mean([game["levels"]["hard against hard"] for game in games], axis=0)
    words = f"the hard bot against itself: |share of decided levels won from the left - .5| ({FAIR * LEVELS} levels a set)"
    return [*made, under("world-fair", words, "own", abs(won / (won + lost) - 0.5), 0.04)]


def decided(game, name: str) -> float:
    """Share of the decided short levels that the league's last team wins against one of the others."""
    won, lost = game["levels"][f"target against {name}"]
    return won / (won + lost)


def league(games) -> list[dict]:
    """The league's last team against bots and its earlier selves."""
    made = []
    for name, bar in (("easy", 0.8), ("hard", 0.55)):
        words = f"the league's last team wins decided levels against the {name} bot"
        made.append(over(f"league-{name}", words, "own bar", float(np.mean([decided(game, name) for game in games])), bar))
    teams = [name for name in games[0]["names"] if name not in BOT_NAMES]
    earlier = teams[: max(1, 2 * len(teams) // 3)]
    value = float(np.mean([[decided(game, name) for name in earlier] for game in games]))
    words = "it wins decided levels against the teams of the league's first two thirds"
    made.append(over("league-earlier", words, "own bar", value, 0.6))
    won, lost = (sum(game["matches"]["hard"][name] for game in games) for name in ("won", "lost"))
    share, decided_matches = won / max(won + lost, 1), max(won + lost, 1)
    words = (
        f"it wins more whole matches than it loses against the hard bot ({FULL} a set): share of the decided, {share:.2f}, minus "
    )
    low = share - 1.64 * (share * (1 - share) / decided_matches) ** 0.5
    return [*made, over("league-matches", words + "1.64 standard errors", "own bar", float(low), 0.5)]


# --- tables and figures


def report(sets: list[dict[str, Path]], out: Path) -> tuple[str, list[str]]:
    """Writes the figures to `out` -> the tables as Markdown, the names of the figures."""
    runs = pooled(sets)
    out.mkdir(parents=True, exist_ok=True)
    plot_regret(runs, out / "regret.png")
    film = sorted((runs["MADRID"][0] / "videos").glob("worst_matches*.gif"))[-1]
    (out / "worst_matches.gif").write_bytes(film.read_bytes())
    return "\n".join([*how(runs), "", *table(runs), "", *match_table(runs["MADRID"])]), ["regret.png", "worst_matches.gif"]


def how(runs) -> list[str]:
    """What was run."""
    config, seeds = summary(runs["MADRID"][0])["config"], seeds_of(runs["MADRID"])
    grown = [str(summary(folder)["config"]["seed"]) for folder in runs["MADRID"] if summary(folder)["commit"] == GROWN]
    words = f"The first three searches of sets {' and '.join(grown)} were looked at after 30 iterations, and then given 30 more."
    return [
        f"Seeds {seeds}; {config['num_updates']} iterations of {config['candidates']} levels a reference, {config['repeats']} "
        f"repeats, {config['duels']} duels, {config['horizon']} steps; {made_by(runs)}. Mean ± standard error over seeds.",
        f"With fresh luck: every elite played {config['final_repeats']} times more. The film: cross-play left, self-play right.",
        *([words] if grown else []),
    ]


def table(runs) -> list[str]:
    """A row for each run."""
    columns = ["regret", "regret_again", "positive_again", "scoring_again", "coverage"]
    names = ["search", "regret, its own estimate", "with fresh luck", "share above 0", "references score first", "coverage"]
    rows = [f"| {' | '.join([*names, 'train time a set'])} |", "| --- |" + " --- |" * len(names)]
    for name, folders in runs.items():
        minutes = np.mean([summary(folder)["train_s"] for folder in folders]) / 60
        rows.append(f"| {' | '.join([name, *(spread(last(folders, c)) for c in columns), f'{minutes:.1f} min'])} |")
    return rows


def match_table(folders) -> list[str]:
    """Whole matches of the league's last team."""
    games = [json.loads((folder / "matches.json").read_text()) for folder in folders]
    rows = ["| the league's last team against | levels won of those decided | whole matches won, drawn, lost | goals |"]
    rows.append("| --- | --- | --- | --- |")
    for name in BOT_NAMES:
        kinds = ("won", "drawn", "lost", "scored", "conceded")
        won, drawn, lost, ours, theirs = (sum(game["matches"][name][kind] for game in games) for kind in kinds)
        share = np.mean([decided(game, name) for game in games])
        rows.append(f"| {name} | {share:.2f} | {won}, {drawn}, {lost} | {ours} : {theirs} |")
    return rows


def plot_regret(runs, path: Path) -> None:
    """Regret with fresh luck over the pitch, a panel for each reference, mean over seeds; and each reference's mean."""
    from matplotlib.figure import Figure

    folders = runs["MADRID"]
    maps = np.nanmean(array(folders, "cell_regret_again"), axis=0).reshape(-1, *summary(folders[0])["config"]["grid"])
    columns = 5
    rows = -(-len(maps) // columns)
    figure = Figure(figsize=(13, 1.7 * rows + 0.6), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel, values in zip(panels, maps, strict=False):
        image = panel.imshow(values.T, cmap="RdBu_r", vmin=-0.5, vmax=0.5, extent=(-1, 1, 0.42, -0.42), aspect="equal")
    for i, panel in enumerate(panels):
        panel.set_axis_off() if i >= len(maps) else panel.set_title(f"reference {i + 1}", fontsize=8)
        panel.tick_params(labelsize=6)
    figure.colorbar(image, ax=panels, label="regret", shrink=0.8)
    figure.suptitle("Regret with fresh luck by the ball's place; the target defends the right goal; the league first, then bots")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    play_matches(Path(sys.argv[1]), int(sys.argv[2]))
