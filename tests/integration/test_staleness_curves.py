"""The staleness benchmark on a tiny task: is the lag what it says, and is nothing run twice?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "staleness_curves.py"
STEPS = 10


def _run(work: Path, out: Path) -> tuple[str, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--quick", "--work", work, "--out", out, "--plot", work / "p.svg"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, json.loads(out.read_text(encoding="utf-8"))


@pytest.mark.long
@pytest.mark.timeout(2500)
def test_quick_curves(tmp_path: Path) -> None:
    printed, results = _run(tmp_path, tmp_path / "first.json")
    runs = {(run["variant"], run["seed"]): run for run in results["runs"]}
    assert len(runs) == 2 * len(results["summary"]["variants"])
    for (name, seed), run in runs.items():
        lag = int(name.removeprefix("lag ").split(",")[0])
        training = run["training"]
        # Every token is as old as the lag allows from the first step that can be.
        assert training["age"] == [min(step, lag) for step in range(STEPS)], name
        # All variants of a seed draw the same first batch from the same weights ...
        assert training["score"][0] == runs["lag 0", seed]["training"]["score"][0]
        # ... and the weights of their answers show how far the policy has gone since.
        if lag == 0:
            assert min(training["ess"]) > 0.999
        elif "none" not in name:
            assert min(training["ess"]) < 0.99
    assert runs["lag 0", 0]["curve"] != runs["lag 0", 1]["curve"]
    assert f"| {next(iter(results['summary']['variants'])).removeprefix('lag ')} |" in printed
    assert (tmp_path / "p.svg").stat().st_size > 1000
    again, second = _run(tmp_path, tmp_path / "second.json")
    assert "CPU s" not in again, "a finished run was run again"
    assert second["runs"] == results["runs"]
