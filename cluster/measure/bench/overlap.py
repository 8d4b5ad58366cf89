"""How well generation and learning overlap: the whole of `accord train` against its two halves.

async       staleness bound 2: worker on core 0, learner and controller on core 1
sync        the same with bound 0: one side waits while the other works (S1)
colocated   bound 0, all cores for every phase: a worker on each core, then the learner (S2)
alone       plain vLLM, and the learner in process, on the rollouts that an async run recorded

A round measures all of them; rounds go forwards and backwards by turns, and the median of the
rounds' figures is reported. docs/measure.md has the definitions.
"""

from __future__ import annotations

import math
import os
import statistics
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from cluster.contracts.config.base import DType
from cluster.contracts.errors import UserError
from cluster.machine.cores import own_cores
from cluster.measure.bench import overlap_metrics as metrics
from cluster.measure.bench.common import BenchOptions, BenchResult
from cluster.measure.bench.overlap_run import RunMeasures, alone, train
from cluster.measure.bench.overlap_setup import (
    ANSWER_TOKENS,
    BOUND,
    PROMPT_TOKENS,
    Mode,
    Workload,
    make_files,
)

CORES = 2
OPEN = math.inf
TOLERANCES = {
    "overlap efficiency": (0.75, OPEN),
    "speed-up over sync": (1.2, OPEN),
    "generation efficiency": (0.85, OPEN),
    "learner efficiency": (0.85, OPEN),
    "waste": (-OPEN, 0.01),
    "staleness max": (-OPEN, float(BOUND)),
    "used by other processes": (-OPEN, 0.1),  # more, and the times above mean nothing
}

Round = dict[str, Any]  # mode -> RunMeasures, "generate" and "learn" -> what was measured alone


def measure(options: BenchOptions) -> BenchResult:
    """The workload C5 as it is: a bfloat16 learner, answers of equal length."""
    return measure_variant("overlap", options)


def measure_variant(
    name: str, options: BenchOptions, *, dtype: DType = "bfloat16", tail: bool = False
) -> BenchResult:
    """Raises UserError on a machine with fewer than two cores: nothing can overlap there."""
    if len(own_cores()) < CORES:
        raise UserError("two cores are needed", where=f"accord bench {name}")
    modes: tuple[Mode, ...] = ("async", "sync") if options.quick else get_args(Mode)
    rounds: list[Round] = []
    with tempfile.TemporaryDirectory(prefix="accord-bench-") as folder:
        make_files(Path(folder), tail=tail)
        workload = Workload(folder=folder, dtype=dtype, tail=tail)
        if options.quick:
            workload = replace(workload, prompts_per_step=8, running=32, window=8)
        for number in range(options.repeats):
            rounds.append(_round(workload, modes, number, rounds))
    return result(name, workload, rounds)


def _round(workload: Workload, modes: tuple[Mode, ...], number: int, before: list[Round]) -> Round:
    """Everything once. The first round's async run is the trace of all rounds."""
    found: Round = {}
    kinds: tuple[str, ...] = (*modes, "generate", "learn")
    for kind in kinds if number % 2 == 0 else reversed(kinds):
        if kind in modes:
            found[kind] = train(workload, kind, f"{kind}-{number}")
        else:
            trace = (before[0] if before else found)["async"]
            found[kind] = {"kind": kind} | alone(kind, workload, trace.run, workload.window)
    return found


def result(name: str, workload: Workload, rounds: list[Round]) -> BenchResult:
    ratios = [round_ratios(found) for found in rounds]
    middle = {name: statistics.median(r[name] for r in ratios) for name in ratios[0]}
    return BenchResult(
        name=name,
        settings={
            "weights": "4.8M", "answers": workload.answers, "prompt_tokens": PROMPT_TOKENS,
            "answer_tokens": ANSWER_TOKENS, "running": workload.running, "bound": BOUND,
            "dtype": workload.dtype, "tail": workload.tail, "window": workload.window,
            "rounds": len(rounds),
        },
        rows=_rows(rounds),
        ratios=middle,
        tolerances=TOLERANCES,
    )  # fmt: skip


def round_ratios(found: Round) -> dict[str, float]:
    """The headline numbers of one round."""
    run: RunMeasures = found["async"]
    generate, learn = found["generate"], found["learn"]
    times = [part["wall_s"] / part["steps"] for part in (generate, learn)]
    step_s, sync_s = run.window.step_s, found["sync"].window.step_s
    parts_cpu = [part["cpu_s"] / part["steps"] for part in (generate, learn)]
    ratios = {
        "overlap efficiency": metrics.overlap_efficiency(times, step_s),
        "same, had nobody waited": metrics.overlap_efficiency(parts_cpu, _cpu_bound(run)),
        "speed-up over sync": sync_s / step_s,
        "ceiling of speed-up": metrics.ceiling(*times),
        "overlap realised": metrics.realised(sync_s, step_s, times),
        "generation efficiency": run.generated / run.cpu["worker"] / _cpu_rate(generate),
        "learner efficiency": run.trained / run.learner_cpu / _cpu_rate(learn),
        "stall of generation": sum(run.pauses) / run.window.seconds,
        "stall of learner": run.publishing / run.window.seconds,
        "bubble, hand-over and publish": (run.waiting + run.handing_over + run.publishing)
        / run.window.seconds,
        "waste": run.waste,
        "staleness max": run.staleness_max,
        "used by other processes": max(
            found[mode].elsewhere / (_cores() * found[mode].window.seconds)
            for mode in get_args(Mode)
            if mode in found
        ),
    }
    if "colocated" in found:
        ratios["speed-up over colocated"] = found["colocated"].window.step_s / step_s
    return ratios


def _cpu_bound(run: RunMeasures) -> float:
    """From CPU time alone, so also true on a busy machine. The worker is taken at the tokens that
    were trained: at the window's ends it may be a little ahead."""
    cpu, steps = run.cpu, run.window.steps
    worker = cpu["worker"] / run.generated * run.trained / steps
    beside = (cpu["learner"] + cpu["reward"]) / steps
    return metrics.cpu_bound_step(worker, beside, (cpu["controller"] + cpu["ray"]) / steps)


def _cpu_rate(part: dict[str, float]) -> float:
    return part["tokens"] / part["cpu_s"]


def _rows(rounds: list[Round]) -> list[dict[str, Any]]:
    """A row a figure, a column a way to run; medians over the rounds."""
    columns = {name: [_figures(found[name]) for found in rounds] for name in rounds[0]}
    names = dict.fromkeys(name for seen in columns.values() for name in seen[0])
    titles = {"generate": "generation alone", "learn": "learner alone"}
    return [
        {"": name}
        | {
            titles.get(column, column): _median(figures.get(name) for figures in seen)
            for column, seen in columns.items()
        }
        for name in names
    ]


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _cores() -> int:
    return os.cpu_count() or CORES


def _figures(found: RunMeasures | dict[str, Any]) -> dict[str, float]:
    if isinstance(found, dict):
        role = {"generate": "worker", "learn": "learner"}[found["kind"]]
        return {
            "step, s": found["wall_s"] / found["steps"],
            "tokens/s": found["tokens"] / found["wall_s"],
            f"{role} tokens/cpu-s": _cpu_rate(found),
            f"{role} cpu-s a step": found["cpu_s"] / found["steps"],
            "cpu share while busy": found["cpu_s"] / found["wall_s"],
        }
    window = found.window
    workers = 2 if found.mode == "colocated" else 1
    cpu = metrics.split({**found.cpu, "other processes": found.elsewhere}, _cores(), window)
    return {
        "step, s": window.step_s,
        "tokens/s": found.trained / window.seconds,
        "worker tokens/cpu-s": found.generated / max(found.cpu["worker"], 1e-9),
        "learner tokens/cpu-s": found.trained / found.learner_cpu,
        "worker cpu-s a step": found.cpu["worker"] / window.steps,
        "learner cpu-s a step": found.learner_cpu / window.steps,
        "cpu share while busy": found.learner_cpu / found.learner_busy,
        "bubble of generation": metrics.bubble(found.worker_busy, workers, window.seconds),
        "bubble of learner": metrics.bubble(found.learner_busy, 1, window.seconds),
        "pause p50, ms": 1e3 * metrics.percentile(found.pauses, 0.5),
        "pause p99, ms": 1e3 * metrics.percentile(found.pauses, 0.99),
        "pause max, ms": 1e3 * metrics.percentile(found.pauses, 1.0),
        "hand-over a step, ms": 1e3 * found.handing_over / window.steps,
        "publish a step, ms": 1e3 * found.publishing / window.steps,
        "learner without a core a step, ms": 1e3 * found.no_core / window.steps,
        "staleness mean": found.staleness_mean,
        "staleness max": found.staleness_max,
        "waste": found.waste,
        **{f"cores: {role}": share for role, share in cpu.items()},
    }
