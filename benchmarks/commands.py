"""Accord's commands as a user types them, for benchmarks: run once, with the CPU time they take."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from cluster.runs.artefacts import artefact_hash

ROOT = Path(__file__).resolve().parents[1]
LOOK_EVERY_S = 0.5


def run_once(command: str, config: str, run: Path, settings: Mapping[str, Any]) -> float:
    """`accord COMMAND CONFIG KEY=VALUE...` with its run directory at `run`; CPU minutes.

    A run that finished with the same words and the same content of the files that they name (each
    `Path` of the settings) is not repeated; what is left of another one is removed.
    """
    values = {**settings, "run.dir": run.parent, "run.name": run.name}
    words = [command, str(ROOT / config), *(f"{key}={value}" for key, value in values.items())]
    files = {key: artefact_hash(path) for key, path in settings.items() if isinstance(path, Path)}
    asked = {"words": [*words, "--quiet"], "files": files}
    record = run.with_name(f"{run.name}.command.json")
    if record.is_file():
        kept = json.loads(record.read_text(encoding="utf-8"))
        if all(kept.get(key) == value for key, value in asked.items()) and run.exists():
            return float(kept["cpu_minutes"])
    shutil.rmtree(run, ignore_errors=True)
    run.parent.mkdir(parents=True, exist_ok=True)
    minutes = _cpu_minutes([sys.executable, str(ROOT / "launch.py"), *asked["words"]])
    content = {**asked, "cpu_minutes": minutes}
    record.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return minutes


def _cpu_minutes(words: list[str]) -> float:
    """Of the command and all that it starts, to within half a second per process."""
    used: dict[tuple[int, float], float] = {}
    environment = {**os.environ, "ACCORD_NO_BOOTSTRAP": "1"}
    with subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            _look(process.pid, used)
            time.sleep(LOOK_EVERY_S)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, words)
    return sum(used.values()) / 60


def _look(pid: int, used: dict[tuple[int, float], float]) -> None:
    """Note the CPU seconds of the process and of all below it; what ended keeps its last value."""
    try:
        root = psutil.Process(pid)
        found = [root, *root.children(recursive=True)]
    except psutil.Error:
        return
    for one in found:
        try:
            times = one.cpu_times()
            used[one.pid, one.create_time()] = times.user + times.system
        except psutil.Error:
            continue
