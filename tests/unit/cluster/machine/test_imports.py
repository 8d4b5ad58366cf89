"""Imports of large libraries, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[4]
CODE = """
import gc
from cluster.machine.imports import quick_imports
with quick_imports():
    import learner.evaluation.win_rate
print(gc.isenabled(), gc.get_freeze_count() > 100_000)
"""


def test_what_needs_scipy_finds_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["True True"]
