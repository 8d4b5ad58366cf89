"""A LoRA run against full training on the same model: step, push, and parity with the engine."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.gpu import runs
from benchmarks.gpu.report import Found
from benchmarks.gpu.scale import Scale

RANK = 8
# Nats: the canary's largest difference in float32, its median in bfloat16.
LIMITS = {"float32": 1e-4, "bfloat16": 0.05}
KINDS: dict[str, dict[str, Any]] = {"full": {}, "lora": {"lora.rank": RANK, "learner.lr": 1e-4}}
FIGURES = (
    "time/step", "perf/throughput", "perf/mfu", "weight_sync/bytes", "weight_sync/seconds",
    "weight_sync/canary_logp_diff",
)  # fmt: skip


def run(scale: Scale, folder: Path, found: Found, *, out: Path) -> None:
    files = runs.prepare(folder, scale, next(iter(scale.trained.values())))
    for name, settings in KINDS.items():
        steps = {"batch.steps": scale.run_steps}
        run = runs.train(files, name, {**settings, **steps}, timeout_s=240)
        runs.keep_metrics(run, out, "lora")
        rows = runs.steps(run)
        kept = [row for row in rows if "weight_sync/seconds" in row][1:]
        found.figures[name] = {key: statistics.median(row[key] for row in kept) for key in FIGURES}
        difference = max(row["weight_sync/canary_logp_diff"] for row in kept)
        limit = LIMITS["bfloat16" if scale.gpus else "float32"]
        found.at_most(f"{name}: canary, nats", difference, limit)
    lora, full = found.figures["lora"], found.figures["full"]
    ratio = full["weight_sync/bytes"] / lora["weight_sync/bytes"]
    # Of a tiny model, the adapters are no small part.
    found.at_least("push: full over LoRA", ratio, 10.0 if scale.gpus else None)
    found.at_least("step: full over LoRA", full["time/step"] / lora["time/step"], None)
