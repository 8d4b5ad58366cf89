"""The first hour with a GPU, in parts of less than nine minutes: is Accord right there, how fast?

    python -m benchmarks.gpu.check [PART ...] --out FOLDER [--dry-run] [--packages FOLDER] [--again]

Each part runs in a process of its own and leaves PART.json in the folder: figures, checks with
their limits, versions, commit, date. A part that has passed is not run again, so the same command
goes on after a break. The exit code is 1 if a part failed. `--dry-run` runs the same code on a CPU
with tiny shapes: it finds errors in the scripts, and says nothing about speed. `--packages` is a
folder of Python packages (vLLM, Ray) for a machine that cannot install any.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu.report import Found, device_facts, read, write
from benchmarks.gpu.scale import DRY, GPU, Scale

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 530.0
PARTS = {
    "install": "versions, device, speed of matrix products, import of vLLM, start of Ray",
    "learner": "a PPO step on the device against the same step on the CPU",
    "engine_float32": "vLLM through weight swaps with requests in flight, against transformers",
    "engine_bfloat16": "the same in bfloat16",
    "transports": "weights from one process to another by each transport, every byte",
    "mfu": "speed and memory of learner steps at 0.5B and 1.5B",
    "overlap": "a run at 0.5B, asynchronous against time-slicing",
    "lora": "a LoRA run against full training: step, push, parity with the engine",
    "soak_1": "a long run in pieces: it is ended and resumed, a worker is killed",
    "soak_2": "",
    "soak_3": "",
    "soak_4": "",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"))
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with tiny shapes")
    parser.add_argument("--packages", type=Path, help="folder to import vLLM and Ray from")
    parser.add_argument("--again", action="store_true", help="also what has passed")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    unknown = [part for part in asked.parts if part not in PARTS]
    if unknown:
        parser.error(f"there is no part {unknown[0]!r}: {', '.join(PARTS)}")
    parts = asked.parts or list(PARTS)
    asked.out.mkdir(parents=True, exist_ok=True)
    if asked.here:
        run_here(parts, asked.out, DRY if asked.dry_run else GPU)
        return 0
    for part in parts:
        before = read(asked.out / f"{part}.json")
        if before is not None and before["ok"] and not asked.again:
            print(f"{part}: passed before", flush=True)
            continue
        (asked.out / f"{part}.json").unlink(missing_ok=True)
        run_apart(part, asked)
    return summary(parts, asked.out)


def run_apart(part: str, asked: argparse.Namespace) -> None:
    """In a process of its own, ended with all that it started when its time is over."""
    words = [sys.executable, "-m", "benchmarks.gpu.check", part, "--here", "--out", str(asked.out)]
    words += ["--dry-run"] if asked.dry_run else []
    paths = [str(asked.packages)] if asked.packages else []
    paths += [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    began = time.monotonic()
    with (
        (asked.out / f"{part}.log").open("w", encoding="utf-8") as log,
        subprocess.Popen(
            words, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process,
    ):  # fmt: skip
        try:
            process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            print(f"{part}: not over after {LIMIT_S:.0f} s, ended", flush=True)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    print(f"{part}: {time.monotonic() - began:.0f} s, code {process.returncode}", flush=True)


def run_here(parts: list[str], out: Path, scale: Scale) -> None:
    """In this process. What a part raises is in its log; it then leaves no record."""
    for part in parts:
        name, _, argument = part.partition("_")
        module = importlib.import_module(f"benchmarks.gpu.{name}_part")
        found, began = Found(), time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="accord-gpu-") as folder:
            module.run(scale, Path(folder), found, *([argument] if argument else []), out=out)
        write(out / f"{part}.json", part, found, time.perf_counter() - began, device_facts())


def summary(parts: list[str], out: Path) -> int:
    """Print a line a check; 1 where a part failed or left no record."""
    code = 0
    for part in parts:
        record = read(out / f"{part}.json")
        if record is None:
            print(f"{part}: FAILED, see {out / part}.log")
            code = 1
            continue
        code = code if record["ok"] else 1
        for check in record["checks"]:
            sign = ">=" if check["at_least"] else "<="
            wanted = "" if check["limit"] is None else f" ({sign} {check['limit']:g})"
            word = "" if check["ok"] else "  FAILED"
            print(f"{part}: {check['name']} = {check['value']:.4g}{wanted}{word}")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
