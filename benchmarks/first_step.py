"""Seconds from the command to the first trained step, and where they go.

    python benchmarks/first_step.py examples/ppo.toml [--repeats 3] [KEY=VALUE]...

Runs `accord train` until its first step is in metrics.jsonl, then interrupts it. Prints the median
over the repeats of: seconds from the command to each event of the start, and CPU seconds by process
until the first step. Run it on a quiet machine; every repeat starts its own processes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

LAUNCH = Path(__file__).resolve().parents[1] / "launch.py"
LONGEST_S = 300.0
LOOK_EVERY_S = 0.2
# Part of a process's command line -> the row it is counted in.
ROWS = {
    "RolloutActor": "rollout worker",
    "LearnerActor": "learner",
    "RewardActor": "reward service",
    "ray::step": "learner",
    "ray::DashboardAgent": "Ray daemons",
    "ray::RuntimeEnvAgent": "Ray daemons",
    "ray::": "other Ray workers",
    "cluster.machine.fork_server": "fork server",
    "ray_worker.py": "Ray daemons",
    "gcs_server": "Ray daemons",
    "raylet": "Ray daemons",
    "ray/": "Ray daemons",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    seconds: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    for _ in range(asked.repeats):
        with tempfile.TemporaryDirectory() as folder:
            times, used = one_start(asked.config, asked.settings, Path(folder))
        for kept, found in ((seconds, times), (cpu, used)):
            for name, value in found.items():
                kept.setdefault(name, []).append(value)
    show("seconds after the command", seconds)
    show("CPU seconds until the first step", cpu)


def one_start(config: Path, settings: list[str], folder: Path) -> tuple[dict[str, float], Counter]:
    """Seconds to each event, and CPU seconds by row, of a run that is stopped at its first step."""
    run, output = folder / "run", folder / "output"
    words = [sys.executable, str(LAUNCH), "train", str(config), *settings]
    words += [f"run.dir={folder}", "run.name=run"]
    times: dict[str, float] = {}
    used: dict[tuple[int, float], tuple[str, float]] = {}
    environment = {**os.environ, "ACCORD_NO_BOOTSTRAP": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # else each start compiles Accord anew
    began = time.time()
    with output.open("wb") as stream:
        process = subprocess.Popen(words, env=environment, stdout=stream, stderr=stream)
    try:
        while not first_step(run):
            if process.poll() is not None or time.time() - began > LONGEST_S:
                sys.exit(f"no step was done:\n{output.read_text()}")
            if output.stat().st_size:
                times.setdefault("first line of output", time.time() - began)
            look(process.pid, used)
            time.sleep(LOOK_EVERY_S)
        look(process.pid, used)
        times |= {name: at - began for name, at in events(run).items()}
        times["first step"] = first_step(run) - began
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
    by_row: Counter = Counter()
    for row, spent in used.values():
        by_row[row] += spent
    by_row["all"] = sum(by_row.values())
    return times, by_row


def first_step(run: Path) -> float:
    """When the first step was written (seconds of the clock), or 0."""
    file = run / "metrics.jsonl"
    line = file.read_text().partition("\n") if file.exists() else ("", "", "")
    return float(json.loads(line[0])["time"]) if line[1] else 0.0


def events(run: Path) -> dict[str, float]:
    """When each kind of event came first."""
    found: dict[str, float] = {}
    for line in (run / "events.jsonl").read_text().splitlines():
        row = json.loads(line)
        name = " ".join(str(row[key]) for key in ("kind", "part", "state") if key in row)
        found.setdefault(re.sub("_", " ", name), float(row["time"]))
    return found


def look(pid: int, used: dict[tuple[int, float], tuple[str, float]]) -> None:
    """Note the CPU seconds of the process and of all that it started."""
    root = psutil.Process(pid)
    for process in [root, *root.children(recursive=True)]:
        try:
            times, words = process.cpu_times(), " ".join(process.cmdline())
            row = next((row for part, row in ROWS.items() if part in words), "the command")
            used[process.pid, process.create_time()] = (row, times.user + times.system)
        except psutil.Error:  # it ended meanwhile; what was noted last stays
            continue


def show(title: str, found: dict[str, list[float]]) -> None:
    print(f"\n{title} (median of {max(map(len, found.values()))})")
    for name, values in sorted(found.items(), key=lambda item: statistics.median(item[1])):
        each = " ".join(f"{value:.1f}" for value in values)
        print(f"  {name:<32} {statistics.median(values):6.1f}   ({each})")


if __name__ == "__main__":
    main()
