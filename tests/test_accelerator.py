"""The script for accelerators, at the tests' sizes on this machine's CPU."""

import json
import subprocess
import sys

import pytest
from sizes import ROOT


@pytest.mark.slow
def test_every_line_is_measured_or_says_why_not(tmp_path):
    """Two methods in full; and a third that has no time to be."""
    script, out = str(ROOT / "tests" / "bench" / "accelerator.py"), tmp_path / "accelerator.json"
    subprocess.run([sys.executable, script, "--tiny", "--methods", "dr", "lola", "--limit", "900", "--out", str(out)], check=True)
    rows = json.loads(out.read_text())["rows"]
    assert [(row["method"], row["preset"]) for row in rows] == [(m, p) for m in ("dr", "lola") for p in ("tiny", "agreement")]
    for speed, agreement in zip(rows[::2], rows[1::2], strict=True):
        assert speed["finite"] and speed["updates_per_s"] > 0 and speed["compile_s"] > 0 and 50 < speed["memory_mb"] < 10_000
        assert agreement["agrees"] == 0 and agreement["within_the_bar"], "the CPU does not agree with itself"
    assert rows[0]["env_steps_per_s"] > 0
    subprocess.run([sys.executable, script, "--tiny", "--methods", "dr", "--limit", "0.01", "--out", str(out)], check=True)
    assert {row["failed"] for row in json.loads(out.read_text())["rows"]} == {"not done after 0.01 s"}
