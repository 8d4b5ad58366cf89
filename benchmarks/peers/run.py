"""Accord against TRL's GRPOTrainer: same model, prompts, reward and cores, one after the other.

    python benchmarks/peers/run.py [--repeats 3] [--sizes 0.3M 1M 19M] [--dtype best] [--out FILE]

Needs Accord's environment for itself and makes TRL's own beside it (benchmarks/peers/.venv). Both
sides get the same two cores. See README.md here for what is measured and what is not.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from sides import HERE, ROOT, Task, figures, make_environment, run_accord, run_trl

OUT = ROOT / "benchmarks" / "results" / "peers.json"

# Learning rates at which both sides' reward climbs; the target is well above where it begins.
LR = {"0.3M": 3e-3, "1M": 2e-3, "19M": 5e-4}
TARGET = {False: 0.40, True: 0.30}  # by whether lengths vary: the rewards differ

KEEP = 'rollout.kv_on_swap="keep"'  # Accord's only setting that is not its default
MOST_STEPS = {"0.3M": 120, "1M": 120, "19M": 24}  # a step of TRL at 19M takes ten seconds
# TRL's: what is tried briefly at each size; the fastest does the repeats.
PLAIN = {"threads": 1, "microbatches": 1, "gradient_checkpointing": False, "bf16": False}
TRL = {
    "1 thread": PLAIN,
    "2 threads": {**PLAIN, "threads": 2},
    "1 thread, as TRL sets itself": {**PLAIN, "gradient_checkpointing": True},
}
# With --dtype best, what each side computes in is its own choice: Accord measures, TRL tries both.
IN_FLOAT32 = ["model.dtype=float32", "rollout.dtype=float32"]
TRL_IN_BFLOAT16 = {
    "1 thread, bf16": {**PLAIN, "bf16": True},
    "2 threads, bf16": {**PLAIN, "threads": 2, "bf16": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sizes", nargs="+", choices=list(LR), default=list(LR))
    parser.add_argument("--lengths", nargs="+", choices=["forced", "varied"], default=["forced"])
    parser.add_argument("--dtype", choices=["float32", "best"], default="float32")
    parser.add_argument("--quick", action="store_true", help="a smoke test: 0.3M, few steps")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    make_environment()
    sizes = ["0.3M"] if args.quick else args.sizes
    cases = [
        compare(size, varied, args.dtype, 1 if args.quick else args.repeats, args.quick)
        for size in sizes
        for varied in ((False,) if args.quick else [name == "varied" for name in args.lengths])
    ]
    report(cases, args.out or (None if args.quick else OUT))


def compare(size: str, varied: bool, dtype: str, repeats: int, quick: bool) -> dict[str, Any]:
    """All runs of one size and variant, in the order A B, B A, A B, ..."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        task, parameters = make_task(folder, size, varied)
        if quick:
            task = replace(task, least_steps=10, most_steps=10)
        best = dtype == "best"
        accord = [KEEP, *([] if best else IN_FLOAT32)]
        options, tried = fastest_trl(task, folder, TRL | (TRL_IN_BFLOAT16 if best else {}), quick)
        runs: dict[str, list[dict[str, Any]]] = {"accord": [], "trl": []}
        versions: dict[str, str] = {}
        for repeat in range(repeats):
            for side in ("accord", "trl") if repeat % 2 == 0 else ("trl", "accord"):
                place = folder / f"{side}-{repeat}"
                seeded = replace(task, seed=repeat)
                if side == "trl":
                    watched = run_trl(seeded, place, options)
                else:
                    watched = run_accord(seeded, place, accord)
                versions |= watched.versions
                row = figures(seeded, watched)
                runs[side].append(row)
                show(size, varied, side, row)
    return {
        "size": size,
        "parameters": parameters,
        "lengths": "varied" if varied else "forced",
        "lr": task.lr,
        "target": task.target,
        "dtype": dtype,
        "accord_settings": accord,
        "trl_settings": options,
        "trl_tried_samples_per_s": tried,
        "runs": runs,
        "ratios": ratios(runs),
        "versions": versions,
    }


def make_task(folder: Path, size: str, varied: bool) -> tuple[Task, int]:
    command = [sys.executable, str(HERE / "world.py"), str(folder / "world"), size]
    command.append("varied" if varied else "forced")
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        sys.exit(f"the model could not be made:\n{made.stderr[-3000:]}")
    task = Task(
        size=size,
        varied=varied,
        model=str(folder / "world" / "model"),
        prompts=str(folder / "world" / "prompts.jsonl"),
        reward="brief_vowels" if varied else "vowel_share",
        lr=LR[size],
        target=TARGET[varied],
        most_steps=MOST_STEPS[size],
    )
    return task, int(made.stdout.split()[-1])


def fastest_trl(
    task: Task, folder: Path, candidates: dict[str, dict[str, Any]], quick: bool
) -> tuple[dict[str, Any], dict[str, float | None]]:
    """(TRL's best options, samples per second of each that was tried)."""
    names = list(candidates)[:1] if quick else list(candidates)
    short = replace(task, least_steps=8, most_steps=8, warm_up=2)
    rates: dict[str, float | None] = {}
    for name in names:
        if quick:
            rates[name] = None
            continue
        watched = run_trl(short, folder / f"try-{len(rates)}", candidates[name])
        rates[name] = figures(short, watched)["samples_per_s"]
        print(f"{task.size} TRL, {name}: {rates[name]:.1f} samples/s", flush=True)
    best = max(rates, key=lambda name: rates[name] or 0.0)
    return {"name": best, **candidates[best]}, rates


def ratios(runs: dict[str, list[dict[str, Any]]]) -> dict[str, float | None]:
    """Accord's medians over TRL's; for times the other way round: over 1 is better for Accord."""

    def median(side: str, key: str) -> float | None:
        found = [row[key] for row in runs[side] if row[key] is not None]
        # A run that did not get there counts as slower than all others.
        return statistics.median(found) if 2 * len(found) > len(runs[side]) else None

    out: dict[str, float | None] = {}
    for key in ("samples_per_s", "tokens_per_s"):
        out[key] = (median("accord", key) or 0.0) / (median("trl", key) or 1.0)
    for key in ("to_target_s", "to_target_with_start_s", "cpu_ms_per_sample"):
        mine, theirs = median("accord", key), median("trl", key)
        out[key] = theirs / mine if mine and theirs else None
    return out


def show(size: str, varied: bool, side: str, row: dict[str, Any]) -> None:
    reached, whole = row["to_target_s"], row["to_target_with_start_s"]
    time = "target not reached" if reached is None else f"target after {reached:.1f} s"
    time += "" if whole is None else f" ({whole:.1f} with start-up)"
    print(
        f"{size:>5} {'varied' if varied else 'forced'} {side:>6}: {row['samples_per_s']:7.1f} "
        f"samples/s, {row['cpu_ms_per_sample']:6.2f} CPU-ms a sample, {row['mean_length']:.0f} "
        f"tokens each, reward {row['last_reward']:.3f} at step {row['steps']}, {time}",
        flush=True,
    )


def report(cases: list[dict[str, Any]], out: Path | None) -> None:
    print("\nAccord over TRL (medians; over 1 is better for Accord)")
    for case in cases:
        numbers = ", ".join(
            f"{name} {'-' if value is None else f'{value:.2f}'}"
            for name, value in case["ratios"].items()
        )
        print(f"{case['size']:>5} {case['lengths']}: {numbers}")
    if out is None:
        return
    result = {
        "benchmark": "peers",
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "hardware": {"cores": 2, "cpu": cpu_name(), "platform": platform.platform()},
        "python": platform.python_version(),
        "cases": cases,
    }
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {out}")


def commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
