"""The scripts of the GPU check, all of them, on a CPU with tiny shapes: no hour with a GPU may be
lost to an error in a script."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# The float32 engine runs every line that the bfloat16 one runs, the second piece of the soak every
# line of the others.
PARTS = (
    "install",
    "learner",
    "engine_float32",
    "transports",
    "mfu",
    "overlap",
    "lora",
    "soak_1",
    "soak_2",
)


@pytest.mark.slow
@pytest.mark.parallel
@pytest.mark.timeout(900)
def test_every_script_runs_on_a_cpu_and_is_not_run_again(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu.check", *PARTS, "--dry-run"]
    command += ["--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    logs = {log.name: log.read_text(encoding="utf-8")[-3000:] for log in tmp_path.glob("*.log")}
    assert done.returncode == 0, (done.stdout, logs)
    for part in PARTS:
        record = json.loads((tmp_path / f"{part}.json").read_text(encoding="utf-8"))
        assert record["ok"], record
        assert record["commit"]
        assert record["versions"]["torch"]
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0
    assert again.stdout.count("passed before") == len(PARTS)
