"""Measurements in processes of their own: each imports anew, keeps to its cores, and ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from cluster.contracts.errors import AccordError
from cluster.measure.bench.common import ROOT

MARK = "RESULT "
LIMIT_S = 1800.0


def spawn(module: str, task: Mapping[str, Any]) -> subprocess.Popen[str]:
    """Start ``python -m module``, whose ``answer(work)`` will get ``task``."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # One compute thread unless the task sets more: two that spin on one core stop both.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.Popen(
        [sys.executable, "-m", module, json.dumps(task)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def outcome(child: subprocess.Popen[str], what: str) -> dict[str, Any]:
    """Wait for what a child measured. Raises AccordError with its last words when it failed."""
    try:
        out, err = child.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        child.terminate()
        raise AccordError(f"{what} was not done within {LIMIT_S:.0f} s") from None
    except BaseException:
        child.terminate()
        child.wait(20)
        raise
    for line in out.splitlines():
        if line.startswith(MARK):
            return dict(json.loads(line.removeprefix(MARK)))
    raise AccordError(f"{what} failed ({child.returncode}):\n{err[-2000:]}")


def run(module: str, task: Mapping[str, Any], what: str) -> dict[str, Any]:
    return outcome(spawn(module, task), what)


def answer(work: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
    """The child's side: do the task of the command line and hand over what came out."""
    found = work(json.loads(sys.argv[1]))
    sys.stdout.write(f"\n{MARK}{json.dumps(found)}\n")
    sys.stdout.flush()
    os._exit(0)  # an engine's threads need not be waited for


def timed(work: Callable[[], int]) -> dict[str, float]:
    """Tokens of ``work()``, and its seconds by the clock and of this process's CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    tokens = work()
    return {
        "tokens": tokens,
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
    }
