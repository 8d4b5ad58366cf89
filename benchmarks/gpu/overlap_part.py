"""A run at 0.5B on one device: asynchronous against time-slicing (`staleness.bound = 0`).

Both share the GPU. Time-slicing lets one side wait while the other works, as a trainer does that
generates and trains in turns.
"""

from __future__ import annotations

import statistics
from itertools import pairwise
from pathlib import Path

from benchmarks.gpu import runs
from benchmarks.gpu.report import Found
from benchmarks.gpu.scale import Scale

BOUND = 2
SKIPPED = 3  # steps in which kernels are chosen and caches filled


def run(scale: Scale, folder: Path, found: Found, *, out: Path) -> None:
    shape = next(iter(scale.trained.values()))
    files = runs.prepare(folder, scale, shape)
    step_s = {}
    for name, bound in (("asynchronous", BOUND), ("time-slicing", 0)):
        settings = {"staleness.bound": bound, "batch.steps": scale.run_steps}
        run = runs.train(files, name, settings, timeout_s=240)
        runs.keep_metrics(run, out, "overlap")
        rows = runs.steps(run)
        kept = rows[SKIPPED:] or rows
        # From one step's end to the next: what a user waits for.
        ends = [row["time"] for row in kept]
        gaps = [b - a for a, b in pairwise(ends)]
        step_s[name] = statistics.median(gaps) if gaps else kept[-1]["time/step"]
        found.figures[name] = {
            key: statistics.median(row[key] for row in kept)
            for key in ("time/step", "perf/throughput", "perf/mfu", "async/staleness_mean")
        } | {"step_s": step_s[name]}
        found.at_most(
            f"{name}: staleness", max(row["async/staleness_max"] for row in rows), float(bound)
        )
    gain = step_s["time-slicing"] / step_s["asynchronous"]
    found.at_least("time-slicing over asynchronous", gain, scale.limits.get("overlap"))
