"""The over-optimisation benchmark on a tiny task: reward models, a pool, PPO with vLLM, fits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "overoptimisation.py"


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_quick_overoptimisation(tmp_path: Path) -> None:
    out, plot = tmp_path / "curves.json", tmp_path / "curves.svg"
    done = subprocess.run(
        [sys.executable, SCRIPT, "--quick", "--work", tmp_path, "--out", out, "--plot", plot],
        capture_output=True,
        text=True,
        timeout=1700,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    curves = json.loads(out.read_text(encoding="utf-8"))["curves"]
    assert sorted((curve["method"], curve["pairs"]) for curve in curves) == [
        (method, pairs) for method in ("best-of-n", "rl") for pairs in (50, 100, 150)
    ]
    for curve in curves:
        assert len(curve["distance"]) == len(curve["gold"]) == len(curve["proxy"])
        assert curve["distance"] == sorted(curve["distance"]) or curve["method"] == "rl"
    assert "<svg" in plot.read_text(encoding="utf-8")
    assert "| best-of-n | 50 |" in done.stdout
