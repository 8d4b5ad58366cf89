"""Accord's commands as a user types them, for benchmarks: run once, with the CPU time they take.

    python benchmarks/commands.py [--beside CHECKOUT] [--repeats 3]

measures `generate`, `evaluate` and `chat` on what the quickstart made, here and in another checkout
by turns (both with this Python), and writes benchmarks/results/commands.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from cluster.runs.artefacts import artefact_hash

ROOT = Path(__file__).resolve().parents[1]
LOOK_EVERY_S = 0.5
QUESTION = b"How do I reset my password?\n"


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


def _cpu_minutes(
    words: list[str], look_every_s: float = LOOK_EVERY_S, folder: Path | None = None
) -> float:
    """Of the command and all that it starts, to within ``look_every_s`` per process."""
    used: dict[tuple[int, float], float] = {}
    environment = {**os.environ, "ACCORD_NO_BOOTSTRAP": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # else each start compiles Accord anew
    with subprocess.Popen(
        words, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    ) as process:
        assert process.stdin is not None
        process.stdin.write(QUESTION)  # for `chat`; nothing else reads it
        process.stdin.close()
        while process.poll() is None:
            _look(process.pid, used)
            time.sleep(look_every_s)
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


# -- `python benchmarks/commands.py`: short commands, beside another checkout ----------------------


def main() -> None:
    """CPU and wall seconds of `generate`, `evaluate` and `chat` on the quickstart's results."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--quickstart", type=Path, default=ROOT / "runs" / "quickstart")
    parser.add_argument("--beside", type=Path, help="another checkout, measured by turns")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/commands.json")
    asked = parser.parse_args()
    roots = {"this": ROOT} | ({"beside": asked.beside} if asked.beside else {})
    found: dict[str, dict[str, list[list[float]]]] = {}
    for _ in range(asked.repeats):
        for command in SHORT:
            for name, root in roots.items():
                with tempfile.TemporaryDirectory() as folder:
                    words = _short(command, asked.quickstart.resolve(), Path(folder))
                    began = time.perf_counter()
                    command_line = [sys.executable, str(root / "launch.py"), *words]
                    # In its own folder: Ray's workers would import from this one.
                    cpu = 60 * _cpu_minutes(command_line, 0.1, root)
                    took = [cpu, time.perf_counter() - began]
                found.setdefault(command, {}).setdefault(name, []).append(took)
    medians = {
        command: {
            name: {
                key: statistics.median(one[place] for one in rounds)
                for place, key in enumerate(("cpu_s", "wall_s"))
            }
            for name, rounds in sides.items()
        }
        for command, sides in found.items()
    }
    asked.out.write_text(json.dumps({"medians": medians, "rounds": found}, indent=1) + "\n")
    print(json.dumps(medians, indent=1))


SHORT = ("generate", "evaluate", "chat")


def _short(command: str, quickstart: Path, folder: Path) -> list[str]:
    prompts = quickstart / "data" / "eval_prompts.jsonl"
    if command == "generate":
        words = [quickstart / "policy", prompts, "--out", folder / "answers.jsonl"]
    elif command == "evaluate":
        config = folder / "evaluate.toml"
        text = (ROOT / "examples" / "evaluate.toml").read_text(encoding="utf-8")
        text = text.replace("examples/", f"{ROOT}/examples/")
        config.write_text(text.replace("runs/quickstart", str(quickstart)), encoding="utf-8")
        words = [config, f"run.dir={folder}"]
    else:
        words = [quickstart, "--no-history"]
    return [command, *map(str, words)]


if __name__ == "__main__":
    main()
