"""Learner steps on random rollouts: model FLOPs utilisation and memory, by size of the model."""

from __future__ import annotations

import gc
import statistics
from pathlib import Path

from benchmarks.gpu.learners import KeepingPublisher, make_learner
from benchmarks.gpu.models import make_model, rollouts
from benchmarks.gpu.report import Found
from benchmarks.gpu.scale import Scale, Shape
from cluster.contracts.metrics import values
from cluster.contracts.records import StepInput

SAMPLES = 8
STEPS = 4  # the first one chooses kernels and is not counted


def run(scale: Scale, folder: Path, found: Found, *, out: Path) -> None:
    for name, shape in scale.trained.items():
        mfu, figures = _measured(scale, folder / name, shape)
        found.figures[name] = figures
        # The smaller model is only noted: its products are too small to fill the device.
        limit = scale.limits.get("mfu") if name == "1.5B" else None
        found.at_least(f"{name}: MFU", mfu, limit)
        found.at_most(
            f"{name}: bytes a parameter at rest",
            figures["bytes_per_parameter"],
            scale.limits.get("bytes_per_parameter"),
        )


def _measured(scale: Scale, folder: Path, shape: Shape) -> tuple[float, dict[str, float]]:
    import torch

    cuda = torch.cuda.is_available() and scale.gpus > 0
    path = make_model(folder, shape, dtype="bfloat16")
    groups = scale.learner_rows // SAMPLES or 1
    learner = make_learner(
        path, "bfloat16", KeepingPublisher(), groups=groups, samples=SAMPLES, gpus=scale.gpus,
        tokens_per_microbatch=max(16 * scale.learner_tokens, 256), steps=STEPS,
    )  # fmt: skip
    learner.start()
    seen = []
    resting = 0.0
    for step in range(STEPS):
        table, ids = rollouts(shape, step, groups, SAMPLES, scale.learner_tokens)
        result = learner.step(StepInput(step=step, group_ids=ids, payloads=(table,)))
        seen.append(values(result.metrics))
        if cuda:
            gc.collect()
            resting = float(torch.cuda.memory_allocated())
    peak = float(torch.cuda.max_memory_allocated()) if cuda else 0.0
    learner.close()
    kept = seen[1:]
    figures = {
        key: statistics.median(row[key] for row in kept)
        for key in ("time/step", "perf/tokens_per_s", "perf/mfu", "time/publish")
    }
    figures |= {
        "parameters": float(shape.parameters),
        "peak_bytes": peak,
        "bytes_per_parameter": resting / shape.parameters,
    }
    if cuda:
        del learner
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return figures["perf/mfu"], figures
