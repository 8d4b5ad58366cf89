"""A long run in pieces of less than nine minutes. Each piece resumes it, loses a worker to SIGKILL
on the way, and ends it as `accord stop` does; then every prompt has to be accounted for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.gpu import runs
from benchmarks.gpu.report import Found
from benchmarks.gpu.scale import Scale

ENDLESS = 100_000
PIECE_S = 400.0
LOOK_EVERY_S = 0.5


def run(scale: Scale, folder: Path, found: Found, piece: str, *, out: Path) -> None:
    number, home = int(piece), out / "soak"
    if number == 1:
        # Under the results: the next pieces are other processes, perhaps after a break.
        # More steps than are wanted: a run that ended by itself could not be stopped or resumed.
        settings = {"batch.steps": ENDLESS, "checkpoint.every": 5}
        files = runs.prepare(home.resolve(), scale, next(iter(scale.trained.values())))
        words = ["train", str(files["config"]), f"run.dir={files['dir']}", "run.name=run"]
        words += [f"{key}={value}" for key, value in settings.items()]
    else:
        words = ["train", "--resume", str(home.resolve() / "runs" / "run")]
    path = home.resolve() / "runs" / "run"
    goal = number * scale.soak_steps
    with _started(words) as process:
        killed = _lead(process, path, goal)
    found.at_least("worker killed", float(killed), 1.0)
    found.at_most("exit code", float(process.returncode), 0.0)
    rows = runs.steps(path)
    found.at_least("steps", rows[-1]["step"], goal)
    found.at_most("staleness", max(row["async/staleness_max"] for row in rows), 2.0)
    text = runs.accord(["audit", str(path)], timeout_s=120)  # exits with 1 if one is missing
    found.figures |= {"audit": text.strip().splitlines()[0], "steps": rows[-1]["step"]}


def _started(words: list[str]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "ACCORD_NO_BOOTSTRAP": "1"}
    command = [sys.executable, str(runs.ROOT / "launch.py"), *words]
    return subprocess.Popen(command, cwd=runs.ROOT, env=environment)


def _lead(process: subprocess.Popen[bytes], path: Path, goal: int) -> bool:
    """Kill a worker half-way, stop the run at `goal` steps or when the piece's time is over."""
    began, first, killed = time.monotonic(), _steps(path), False
    stopped = False
    while process.poll() is None:
        time.sleep(LOOK_EVERY_S)
        done = _steps(path)
        if not killed and done > first + (goal - first) // 2:
            killed = _kill_a_worker(process.pid)
        over = time.monotonic() - began > PIECE_S
        if not stopped and killed and (done >= goal or over):
            runs.accord(["stop", str(path), "--wait", "0"], timeout_s=60)
            stopped = True
        if time.monotonic() - began > PIECE_S + 90:
            process.terminate()
    return killed


def _steps(path: Path) -> int:
    metrics = path / "metrics.jsonl"
    rows: list[dict[str, Any]] = runs.steps(path) if metrics.is_file() else []
    return int(rows[-1]["step"]) if rows else 0


def _kill_a_worker(parent: int) -> bool:
    for child in psutil.Process(parent).children(recursive=True):
        try:
            if any("RolloutActor" in word for word in child.cmdline()):
                child.send_signal(signal.SIGKILL)
                return True
        except psutil.Error:
            continue
    return False
