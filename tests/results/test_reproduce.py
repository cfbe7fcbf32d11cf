"""The program that measures the claims, its statistics, and the numbers that it has put into README."""

import ast
import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "results" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reproduce():
    return load("reproduce")


@pytest.fixture(scope="module")
def measure():
    return load("measure")


def test_readme_shows_what_was_measured(reproduce):
    text = (ROOT / "README.md").read_text()
    assert reproduce.with_results(text) == text, "run: python results/reproduce.py readme"


def test_published_claims_are_whole(reproduce):
    readme = (ROOT / "README.md").read_text()
    shown = [method for method in reproduce.METHODS if f"<!-- {method} -->" in readme]
    assert {"ued", "mix_me"} <= set(shown)
    for method in shown:
        claims = json.loads((ROOT / "results" / method / "claims.json").read_text())
        page = (ROOT / "results" / method / "README.md").read_text()
        assert claims and reproduce.claims_table(claims) in page
        assert all({"id", "claim", "paper", "here", "check", "holds", "each_set"} == set(claim) for claim in claims)
        assert len({claim["id"] for claim in claims}) == len(claims)
        assert {claim["holds"] for claim in claims} <= {"yes", "no", "not separated"}


def test_programs_that_are_run_by_hand_find_what_they_import():
    """Of results/ and tests/bench, in functions too: a name that has moved fails here, not after an hour of training."""
    missing = []
    for path in [*(ROOT / "results").glob("*.py"), *(ROOT / "tests" / "bench").glob("*.py")]:
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        for node in nodes:
            if node.module.split(".")[0] in ("algos", "common", "envs"):
                module = importlib.import_module(node.module)
                for name in (alias.name for alias in node.names):
                    if not hasattr(module, name) and not importlib.util.find_spec(f"{node.module}.{name}"):
                        missing.append(f"{path.name}: {node.module} has no {name}")
    assert not missing


def test_verdicts(measure):
    high, low, wide = [0.5, 0.6, 0.4, 0.5], [0.1, 0.0, 0.1, 0.0], [0.1, 0.7, 0.1, 0.7]
    assert measure.above("x", "", "", high, low)["holds"] == "yes"
    assert measure.above("x", "", "", low, high)["holds"] == "no"
    assert measure.above("x", "", "", high, wide)["holds"] == "not separated"
    assert measure.equal("x", "", "", high, high[::-1], 0.2)["holds"] == "yes"
    assert measure.equal("x", "", "", high, low, 0.2)["holds"] == "no"
    assert measure.equal("x", "", "", high, wide, 0.2)["holds"] == "not separated"
    assert measure.over("x", "", "", 2.0, 1.5)["holds"] == "yes" and measure.over("x", "", "", 1.4, 1.5)["holds"] == "no"


def test_pairs_of_the_same_seeds_are_compared_pair_by_pair(measure):
    far_apart = np.array([1.0, 5.0, 9.0])
    assert measure.paired("x", "", "", far_apart + [0.2, 0.3, 0.25], far_apart)["holds"] == "yes"
    assert measure.paired("x", "", "", far_apart, far_apart + [0.2, 0.3, 0.25])["holds"] == "no"
    assert measure.paired("x", "", "", far_apart + [0.2, -0.3, 0.25], far_apart)["holds"] == "not separated"
    low, high = (float(x) for x in measure.paired("x", "", "", [2, 4], [1, 1])["here"].split("[")[1][:-1].split(", "))
    assert (low, high) == pytest.approx((2 - 12.706, 2 + 12.706), abs=1e-3)  # 2 +- t(0.975, 1) * 1


def test_welch_interval_covers(measure):
    """Of differences of two means of four normal draws, about 95 % of intervals hold the true one: 90 to 99 % of 400 here."""
    rng = np.random.default_rng(1)
    intervals = [measure.welch_interval(rng.normal(1, 1, 4), rng.normal(0, 3, 4)) for _ in range(400)]
    assert 0.90 < np.mean([low < 1 < high for low, high in intervals]) < 0.99
    assert measure.welch_interval([1, 1], [0, 0]) == (1.0, 1.0)


def test_interquartile_mean(measure):
    assert measure.iqm([[0, 1, 2, 3], [4, 5, 6, 100]]) == pytest.approx(3.5)  # the mean of 2, 3, 4, 5
    scores = np.random.default_rng(0).normal(0.5, 0.1, (8, 20))
    low, high = measure.iqm_interval(scores)
    assert low < measure.iqm(scores) < high and high - low < 0.1
    assert measure.iqm_interval(np.tile(np.arange(20.0), (4, 1))) == (9.5, 9.5)  # no spread over seeds: none in the interval


def test_curves_are_read_for_each_seed(measure, tmp_path):
    rows = ["update,seed,solved,env_steps", "0,5,0.0,", "0,6,0.2,", "10,5,,100", "10,6,,100", "20,5,1.0,200", "20,6,0.4,200"]
    (tmp_path / "metrics.csv").write_text("\n".join(rows) + "\n")
    first, second = measure.curve([tmp_path], "env_steps", "solved")
    np.testing.assert_array_equal(first, [[0, 200], [0, 1]])
    np.testing.assert_array_equal(second, [[0, 200], [0.2, 0.4]])
    # the mean of a straight line over [80, 100] of 200, and over [8, 10] of 20
    np.testing.assert_allclose(measure.late_value([tmp_path, tmp_path], "env_steps", "solved", 100), [0.45, 0.29] * 2)
    np.testing.assert_allclose(measure.late_value([tmp_path], "ppo_updates", "solved", 10), [0.45, 0.29])


def test_a_promise_that_is_not_kept_is_an_error(reproduce, tmp_path, monkeypatch):
    """A claim is promised if it was published as holding in every set; when it does not hold again, the program fails."""

    over = reproduce.ued.over

    def claims(sets):
        here = [over("c", "c", "", 1.0, 0.5)] if any(sets) else []  # such as a page's speed, where there is no browser
        return [over("a", "a", "", min(sets), 0.5), over("b", "b", "", max(sets), 0.5), *here]

    def method(gain):
        return SimpleNamespace(
            train=lambda seed, num_seeds, out: gain.get(seed, 1.0),
            claims=claims,
            report=lambda sets, out: ("table", []),
        )

    def run(gain, *flags):
        monkeypatch.setattr(reproduce, "METHODS", {"toy": method(gain)})
        monkeypatch.setattr(sys, "argv", ["reproduce.py", "toy", *flags])
        reproduce.main()

    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    run({7: 0.0}, "--seed", "0", "7", "--publish")  # neither holds in set 7 alone
    published = json.loads((tmp_path / "results" / "toy" / "claims.json").read_text())
    verdicts = [("no", ["yes", "no"]), ("yes", ["yes", "no"]), ("yes", ["yes", "not measured"])]
    assert [(c["holds"], c["each_set"]) for c in published] == verdicts
    run({0: 0.0}, "--seed", "0")
    run({}, "--seed", "0", "7", "--publish")
    with pytest.raises(SystemExit, match=r"a \(no\), b \(no\)"):
        run({3: 0.0}, "--seed", "3")


def test_kept_runs_have_all_but_checkpoints(reproduce, tmp_path):
    for name in ("summary.json", "arrays/loss.npy", "videos/film.gif", "checkpoints/00000001.npz"):
        (tmp_path / "study" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "study" / name).write_text(json.dumps({"config": {"load": "/there", "out": "/here", "seed": 7}}))
    for films in (("another",), ()):
        reproduce.keep_runs([{"the study": tmp_path / "study"}], tmp_path / "kept", [7], films)
    reproduce.keep_runs([{"the study": tmp_path / "study"}], tmp_path / "with_films", [7])
    assert (tmp_path / "with_films/7/study/videos/film.gif").exists()
    kept = sorted(str(path.relative_to(tmp_path / "kept")) for path in (tmp_path / "kept").rglob("*") if path.is_file())
    assert kept == ["7/study/arrays/loss.npy", "7/study/summary.json"]
    assert json.loads((tmp_path / "kept/7/study/summary.json").read_text())["config"] == {"load": None, "out": None, "seed": 7}
    reproduce.take_kept(tmp_path / "kept", tmp_path / "out", [7, 8])
    assert sorted(path.name for path in (tmp_path / "out" / "7" / "study").rglob("*.*")) == ["loss.npy", "summary.json"]


def test_finished_runs_are_reused_and_others_go_on(measure, tmp_path, monkeypatch):
    calls = []
    config = json.dumps({"config": {"seed": 0, "num_seeds": 2}})

    def train(command, check):
        calls.append(command)
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "summary.json").write_text(config)

    monkeypatch.setattr(measure.subprocess, "run", train)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "1.npz").write_text("")
    measure.trained("dr", "--lr 1", 0, 2, tmp_path / "run")
    measure.trained("dr", "--lr 1", 0, 2, tmp_path / "run")
    assert len(calls) == 1 and "--resume" in calls[0] and calls[0][2:4] == ["--lr", "1"]
    with pytest.raises(SystemExit, match="another --out"):
        measure.trained("dr", "", 5, 2, tmp_path / "run")
