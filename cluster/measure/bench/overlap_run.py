"""One training run in a child process, and what its files and /proc say about its window."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.assembly.auto.resolve import resolve_here
from cluster.contracts.config.file import dump_toml
from cluster.contracts.errors import AccordError
from cluster.measure.bench import children, overlap_child
from cluster.measure.bench.overlap_metrics import Window, grown, waste, window_of, within
from cluster.measure.bench.overlap_processes import ProcessSampler
from cluster.measure.bench.overlap_setup import WARM_UP, Mode, Workload, train_config

CHILD = overlap_child.__name__
Spans = list[tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunMeasures:
    """Of the window unless said otherwise; times in seconds, CPU in CPU-seconds.

    trained, generated: answer tokens. pauses: standstill of generation at each swap.
    publishing, no_core: the learner's. waiting: the learner's, for rollouts. handing_over: from the
    controller's call of a step to its answer, the step itself taken off. waste: of the whole run.
    elsewhere: CPU of other processes.
    """

    run: str
    mode: Mode
    window: Window
    trained: float
    generated: float
    worker_busy: float
    learner_busy: float
    learner_cpu: float
    cpu: dict[str, float]
    elsewhere: float
    pauses: list[float]
    publishing: float
    waiting: float
    handing_over: float
    no_core: float
    staleness_mean: float
    staleness_max: float
    waste: float


def train(workload: Workload, mode: Mode, name: str) -> RunMeasures:
    """Train from the start with the real parts and measure the window."""
    config = Path(workload.folder) / f"{name}.toml"
    # Resolved here, so that what runs alone afterwards reads the same values.
    settings = resolve_here(train_config(workload, mode, name)).config
    config.write_text(dump_toml(settings), encoding="utf-8")
    task = {"kind": "train", "mode": mode, "config": str(config)}
    child = children.spawn(CHILD, task)
    sampler = ProcessSampler(child.pid)
    try:
        found = children.outcome(child, f"the run {name}")
    finally:
        sampler.stop()
    return read_run(Path(found["run"]), mode, workload.window, sampler)


def alone(kind: str, workload: Workload, run: str, steps: int) -> dict[str, Any]:
    """``kind`` "generate" or "learn" by itself on the first ``steps`` steps that ``run`` recorded.

    Returns tokens, wall_s, cpu_s and the steps these cover.
    """
    task = {"kind": kind, "config": str(Path(run) / "config.toml"), "run": run, "steps": steps}
    return children.run(CHILD, task, f"{kind} alone")


def read_run(run: Path, mode: Mode, steps: int, sampler: ProcessSampler) -> RunMeasures:
    """From metrics.jsonl, timeline.json and the samples of its processes."""
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    every = [json.loads(line) for line in text.splitlines()]
    learning = learner_spans(run / "timeline.json")
    window = window_of([end for _, end in learning], WARM_UP, steps)
    rows = every[WARM_UP : WARM_UP + steps]
    if len(every) != len(learning):
        raise AccordError(f"{run}: {len(every)} lines of metrics for {len(learning)} steps")
    return RunMeasures(
        run=str(run),
        mode=mode,
        window=window,
        trained=_total(rows, "perf/throughput"),
        generated=_total(rows, "rollout/tokens_per_s"),
        worker_busy=sum((1 - row["perf/rollout_idle_frac"]) * row["time/step"] for row in rows),
        learner_busy=within(learning, window),
        learner_cpu=sum(row["perf/learner_cpu_s"] for row in rows),
        cpu={role: grown(samples, window) for role, samples in sampler.by_role.items()},
        elsewhere=grown(sampler.elsewhere, window),
        pauses=[row["weight_sync/pause_s"] for row in rows if "weight_sync/pause_s" in row],
        publishing=sum(row["time/publish"] for row in rows),
        waiting=sum(row["time/wait_batch"] for row in rows),
        handing_over=sum(row["time/hand_over"] for row in rows),
        no_core=sum(row.get("perf/learner_no_core_s", 0.0) for row in rows),
        staleness_mean=sum(row["async/staleness_mean"] for row in rows) / len(rows),
        staleness_max=max(row["async/staleness_max"] for row in rows),
        waste=waste(_total(every, "perf/throughput"), _total(every, "rollout/tokens_per_s")),
    )


def learner_spans(timeline: Path) -> Spans:
    """(start, end) of every learner step, in seconds of the monotonic clock."""
    events = json.loads(timeline.read_text(encoding="utf-8"))["traceEvents"]
    return [
        (event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6)
        for event in events
        if event.get("cat") == "learner" and event["name"].startswith("step ")
    ]


def _total(rows: list[dict[str, Any]], rate: str) -> float:
    """Tokens, from their rate."""
    return float(round(sum(row[rate] * row["time/step"] for row in rows)))
