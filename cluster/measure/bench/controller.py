"""CPU time of the real controller a sample, and how soon an admitted group reaches its worker.

Workers and learner do nothing and answer at once, so what is left is the controller's own work:
admission, leases, accounts, its event loop. One thread, real clock.

The loop is never idle here and a step's groups are admitted all at once, so the time from admission
to submit is that of the whole burst, the longest it can be.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from cluster.contracts.durable import FileDigest
from cluster.contracts.errors import Retryable
from cluster.contracts.records import (
    AS_TRAINED,
    Assignment,
    Draw,
    GroupMeta,
    Harvest,
    Prompt,
    Rollout,
    RunState,
    StepInput,
    StepResult,
    SwapReport,
    WeightManifest,
)
from cluster.loop.controller import Controller
from cluster.loop.pool import WorkerPool
from cluster.loop.settings import LoopSettings, PoolSettings
from cluster.loop.timeline import Timeline
from cluster.machine.clock import MonotonicClock
from cluster.measure.bench.common import BenchOptions, BenchResult
from cluster.measure.simulation.roles import SimulatedPrompts, manifest

TARGET_US = 50.0
PROMPTS_PER_WORKER = 4
BOUND = 2


class _Prompts(SimulatedPrompts):
    """Notes when a group was admitted: the controller asks for its prompt right then."""

    def __init__(self) -> None:
        self.admitted: dict[int, float] = {}

    def prompt(self, ordinal: int) -> Prompt:
        self.admitted[ordinal] = time.perf_counter()
        return super().prompt(ordinal)


class _Worker:
    """Has every answer at once."""

    def __init__(self, index: int, incarnation: int, admitted: Mapping[int, float]) -> None:
        self.name, self.incarnation = f"worker-{index}", incarnation
        self._admitted = admitted
        self._done: list[GroupMeta] = []
        self._news = asyncio.Event()
        self._version = 0
        self.waits_s: list[float] = []

    async def placed(self) -> None: ...

    async def start(self) -> Mapping[str, Any]:
        return {}

    async def submit(self, assignments: Sequence[Assignment]) -> None:
        now = time.perf_counter()
        for a in assignments:
            self.waits_s.append(now - self._admitted[a.group_id])
            self._done.append(
                GroupMeta(
                    group_id=a.group_id,
                    attempt=a.attempt,
                    samples=a.samples,
                    prompt_tokens=1,
                    response_tokens=a.samples,
                    version_min=self._version,
                    version_max=self._version,
                )
            )
        self._news.set()

    async def harvest(self, timeout_s: float) -> Harvest:
        await self._news.wait()
        self._news.clear()
        # One group at a time, as they come in from real workers: the dearest way.
        done = (self._done.pop(0),) if self._done else ()
        if self._done:
            self._news.set()
        return Harvest(
            worker=self.name,
            incarnation=self.incarnation,
            groups=done,
            payload=self,
            stats={"generated_tokens": float(len(self.waits_s)), "busy_s": 0.0},
        )

    async def load_weights(self, manifest: WeightManifest) -> SwapReport:
        self._version = manifest.version
        return SwapReport(
            version=manifest.version,
            fetch_s=0.0,
            verify_s=0.0,
            stage_s=0.0,
            pause_s=0.0,
            prove_s=0.0,
            canary_logp_diff=0.0,
        )

    async def sample(
        self, prompts: Sequence[Prompt], samples: int, timeout_s: float, draw: Draw = AS_TRAINED
    ) -> list[Rollout]:
        raise Retryable("this worker writes no completions")

    async def stop(self) -> None: ...


class _Learner:
    async def start(self, step: int | None = None) -> WeightManifest:
        return manifest(0)

    def fetch_ahead(self, payloads: Sequence[Any]) -> None: ...

    async def work_ahead(self, batch: StepInput) -> None: ...

    async def step(self, batch: StepInput) -> StepResult:
        return StepResult(
            step=batch.step,
            version=batch.step + 1,
            metrics=(),
            manifest=manifest(batch.step + 1),
            trained_tokens=len(batch.group_ids),
        )

    async def snapshot(self) -> int:
        return 0

    async def lost(self) -> None:
        await asyncio.get_running_loop().create_future()

    async def store(self, directory: str) -> tuple[FileDigest, ...]:
        return ()

    async def stop(self) -> None: ...


class _NoJournal:
    def event(self, kind: str, **detail: Any) -> None: ...

    def account(self, **row: Any) -> None: ...

    async def begin_checkpoint(self, step: int, nbytes: int) -> Path:
        return Path()

    async def commit_checkpoint(
        self, staging: Path, files: Sequence[FileDigest], state: RunState, keep: int
    ) -> Path:
        return staging

    async def abandon_checkpoint(self, staging: Path) -> None: ...


def measure(options: BenchOptions) -> BenchResult:
    """Samples of 1, 8 and 16 a prompt; 16 and 512 workers."""
    cases = [(16, 1), (16, 8), (512, 1), (512, 8), (512, 16)]
    groups = 8_192 if options.quick else 40_960
    rows = []
    for workers, samples in cases:
        runs = [one(workers, samples, groups) for _ in range(options.repeats)]
        rows.append(
            {
                "workers": workers,
                "samples a prompt": samples,
                "groups": groups,
                "CPU us a sample": median(us for us, _ in runs) / samples,
                "CPU us a group": median(us for us, _ in runs),
                "admission to submit p50 ms": median(ms[0] for _, ms in runs),
                "admission to submit p99 ms": median(ms[1] for _, ms in runs),
            }
        )
    per_group = {(row["workers"], row["samples a prompt"]): row["CPU us a group"] for row in rows}
    ratios = {
        "us_per_sample_of_8": per_group[512, 8] / 8,
        "us_per_group": per_group[512, 1],
        "growth_16_to_512_workers": per_group[512, 8] / per_group[16, 8],
        "p99_submit_ms": max(row["admission to submit p99 ms"] for row in rows),
    }
    return BenchResult(
        name="controller",
        settings={"prompts_per_worker": PROMPTS_PER_WORKER, "bound": BOUND},
        rows=rows,
        ratios=ratios,
        tolerances={
            "us_per_sample_of_8": (0.0, TARGET_US),
            "growth_16_to_512_workers": (0.0, 2.0),
        },
    )


def one(workers: int, samples: int, groups: int) -> tuple[float, tuple[float, float]]:
    """(CPU microseconds a group, (p50, p99) milliseconds from admission to submit)."""
    prompts_per_step = workers * PROMPTS_PER_WORKER
    steps = max(4, groups // prompts_per_step)
    cpu_s, waits = asyncio.run(_drive(workers, samples, prompts_per_step, steps))
    waits.sort()
    quantiles = (waits[len(waits) // 2] * 1e3, waits[int(0.99 * len(waits))] * 1e3)
    return cpu_s / (steps * prompts_per_step) * 1e6, quantiles


async def _drive(
    workers: int, samples: int, prompts_per_step: int, steps: int
) -> tuple[float, list[float]]:
    prompts = _Prompts()
    made: list[_Worker] = []

    def make(index: int, incarnation: int) -> _Worker:
        made.append(_Worker(index, incarnation, prompts.admitted))
        return made[-1]

    journal, clock = _NoJournal(), MonotonicClock()
    limits = PoolSettings(
        start_timeout_s=60, stall_timeout_s=600, weights_timeout_s=60, max_restarts=0
    )
    pool = WorkerPool(make, limits, clock, journal.event)
    controller = Controller(
        LoopSettings(
            steps=steps,
            prompts_per_step=prompts_per_step,
            samples_per_prompt=samples,
            staleness_bound=BOUND,
            workers=workers,
            checkpoint_every=steps,
            keep_checkpoints=1,
        ),
        prompts,
        _Learner(),
        pool,
        journal,
        [],
        clock,
        Timeline(),
    )
    began = time.thread_time()
    try:
        await controller.run()
    finally:
        await pool.stop()
    return time.thread_time() - began, [wait for worker in made for wait in worker.waits_s]
