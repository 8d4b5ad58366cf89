"""The measurement of what a push takes runs, and sends every byte in buckets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.long]


def test_the_measurement_of_a_push_runs(repo_root: Path) -> None:
    words = ["--size", "1M", "--bucket-mb", "0.2", "--store-mb", "100"]
    done = subprocess.run(
        [sys.executable, "benchmarks/push_memory.py", *words],
        cwd=repo_root,
        env={**os.environ, "PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["buckets"] >= 5
    for part in ("canary", "publish", "receive"):
        assert found[part].keys() == {"heap", "mapped", "seconds"}
