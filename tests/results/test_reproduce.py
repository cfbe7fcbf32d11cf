"""The program that measures the claims, and the numbers that it has put into README."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.timeout(60)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def reproduce():
    spec = importlib.util.spec_from_file_location("reproduce", ROOT / "results" / "reproduce.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_shows_what_was_measured(reproduce):
    text = (ROOT / "README.md").read_text()
    assert reproduce.with_results(text) == text, "run: python results/reproduce.py readme"


def test_published_claims_are_whole(reproduce):
    for method in reproduce.METHODS:
        claims = json.loads((ROOT / "results" / method / "claims.json").read_text())
        page = (ROOT / "results" / method / "README.md").read_text()
        assert claims and reproduce.claims_table(claims) in page
        assert all({"id", "claim", "paper", "here", "check", "holds"} == set(claim) for claim in claims)


def test_a_claim_holds_only_beyond_its_spread(reproduce):
    clear = reproduce.above("x", "", "", [0.5, 0.6, 0.4, 0.5], [0.1, 0.0, 0.1, 0.0])
    noise = reproduce.above("x", "", "", [0.5, 0.0, 0.4, 0.0], [0.1, 0.3, 0.1, 0.3])
    assert clear["holds"] and not noise["holds"]


def test_bootstrap_interval_covers(reproduce):
    """Of means of 20 normal draws, about 95 % lie in the interval: at least 85 % of 200 here."""
    rng = np.random.default_rng(1)
    intervals = [reproduce.bootstrap_interval(rng.normal(size=20), draws=500) for _ in range(200)]
    covered = np.mean([low < 0 < high for low, high in intervals])
    assert 0.85 < covered < 1
