"""A whole run in virtual time: real controller, pool and books; scripted workers and learner.

Every scene ends in an audit of the books.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.contracts.durable import FileDigest
from cluster.contracts.errors import Retryable
from cluster.contracts.records import (
    Assignment,
    GroupMeta,
    Harvest,
    Prompt,
    RunState,
    StepInput,
    StepResult,
    WeightManifest,
)
from cluster.loop.controller import Controller
from cluster.loop.evaluations import EvaluationRole
from cluster.loop.pool import WorkerPool
from cluster.loop.settings import LoopSettings, PoolSettings
from cluster.loop.timeline import Timeline
from cluster.measure.simulation.loop import VirtualClock, VirtualLoop
from cluster.measure.simulation.roles import manifest
from cluster.runs.audit import Audit, Rules, audit_steps
from cluster.runs.control import Wishes
from tests.pool_world import Worker, prompt_of

PROMPTS_PER_STEP = 3
SAMPLES = 2


class Books:
    """Journal and sink: what a run directory would hold."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.rows: list[dict[str, Any]] = []
        self.numbers: dict[str, float] = {}
        self.state: RunState | None = None  # of the newest checkpoint

    def event(self, kind: str, **detail: Any) -> None:
        self.events.append((kind, detail))

    def account(self, **row: Any) -> None:
        self.rows.append(row)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self.numbers = dict(numbers)

    def close(self) -> None: ...

    async def begin_checkpoint(self, step: int, nbytes: int) -> Path:
        return Path(f"step-{step}")

    async def commit_checkpoint(
        self, staging: Path, files: Sequence[FileDigest], state: RunState, keep: int
    ) -> Path:
        self.state = state
        return staging

    async def abandon_checkpoint(self, staging: Path) -> None: ...

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [detail for one, detail in self.events if one == kind]


class Prompts:
    def __len__(self) -> int:
        return 10_000

    def prompt(self, ordinal: int) -> Prompt:
        return prompt_of(ordinal)


class Learner:
    """Takes ``step_s`` for a step. ``lose``: steps whose rollouts are lost once on their way."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.step_s = 1.0
        self.lose: set[int] = set()
        self.trained: list[int] = []

    async def start(self, step: int | None = None) -> WeightManifest:
        return manifest(self.version)

    async def lost(self) -> None:
        await asyncio.get_running_loop().create_future()

    def fetch_ahead(self, payloads: Sequence[Any]) -> None: ...

    async def work_ahead(self, batch: StepInput) -> None: ...

    async def step(self, batch: StepInput) -> StepResult:
        await asyncio.sleep(self.step_s)
        if batch.step in self.lose:
            self.lose.remove(batch.step)
            raise Retryable("rollouts are lost with the worker that held them")
        self.trained += batch.group_ids
        self.version = batch.step + 1
        return StepResult(
            step=batch.step,
            version=self.version,
            metrics=(),
            manifest=manifest(self.version),
            trained_tokens=len(batch.group_ids),
        )

    async def snapshot(self) -> int:
        return 0

    async def store(self, directory: str) -> tuple[FileDigest, ...]:
        await asyncio.sleep(0.1)
        return ()

    async def stop(self) -> None: ...


class Sampler(Worker):
    """Finishes what it was given after ``pace_s``; None: only when it is told to."""

    def __init__(self, index: int, incarnation: int) -> None:
        super().__init__(index, incarnation)
        self.pace_s: float | None = 0.5
        self.fail: dict[int, str] = {}  # groups whose prompt cannot be completed, with the cause
        self._begun: list[tuple[float, Assignment, int]] = []

    async def submit(self, assignments: Any) -> None:
        await super().submit(assignments)
        now = asyncio.get_running_loop().time()
        self._begun += [(now, assignment, self.loaded[-1]) for assignment in assignments]

    async def harvest(self, timeout_s: float) -> Harvest:
        if self.pace_s is not None:
            self.finish_begun(asyncio.get_running_loop().time() - self.pace_s)
        self.stats["generated_tokens"] = self.stats.get("generated_tokens", 0.0)
        return await super().harvest(timeout_s)

    def finish_begun(self, before: float, most: int = 10**6) -> None:
        due = [entry for entry in self._begun if entry[0] <= before][:most]
        self._begun = [entry for entry in self._begun if entry not in due]
        for _, given, version in due:
            cause = self.fail.get(given.group_id)
            if given.prompt.id in self.poison:
                self._begun.append((0.0, given, version))
                continue
            self.given.remove(given)
            self._done.append(self.meta(given, version, cause))
            self.stats["generated_tokens"] = self.stats.get("generated_tokens", 0.0) + 5

    def meta(self, given: Assignment, version: int, cause: str | None) -> GroupMeta:
        return GroupMeta(
            group_id=given.group_id,
            attempt=given.attempt,
            samples=0 if cause else given.samples,
            prompt_tokens=1,
            response_tokens=5,
            version_min=version,
            version_max=self.loaded[-1],
            failure=cause,
        )


class Training:
    """One session of a run; ``books`` outlive it."""

    def __init__(
        self,
        loop: VirtualLoop,
        books: Books,
        change: Callable[[Sampler], None],
        *,
        steps: int,
        workers: int,
        bound: int,
        checkpoint_every: int = 2,
        evaluation: EvaluationRole | None = None,
        **pool: Any,
    ) -> None:
        self.books, self._change = books, change
        self.rules = Rules(
            prompts_per_step=PROMPTS_PER_STEP, samples_per_prompt=SAMPLES, bound=bound, steps=steps
        )
        self.workers: dict[tuple[int, int], Sampler] = {}
        self.wishes = Wishes()
        clock = VirtualClock(loop)
        usual = dict(start_timeout_s=100, stall_timeout_s=30, weights_timeout_s=20, max_restarts=5)
        self.pool = WorkerPool(self._make, PoolSettings(**{**usual, **pool}), clock, books.event)
        state = books.state
        self.learner = Learner(state.step if state else 0)
        self.controller = Controller(
            LoopSettings(
                steps=steps,
                prompts_per_step=PROMPTS_PER_STEP,
                samples_per_prompt=SAMPLES,
                staleness_bound=bound,
                workers=workers,
                checkpoint_every=checkpoint_every,
                keep_checkpoints=1,
            ),
            Prompts(),
            self.learner,
            self.pool,
            books,
            [books],
            clock,
            Timeline(),
            state=state,
            wishes=lambda: self.wishes,
            cpu_s=lambda: 0.0,
            evaluation=evaluation,
        )
        self.running = asyncio.ensure_future(self.controller.run())

    def _make(self, index: int, incarnation: int) -> Sampler:
        made = self.workers[index, incarnation] = Sampler(index, incarnation)
        self._change(made)
        return made

    def serving(self) -> list[Sampler]:
        """The processes that serve now, by number of the worker."""
        newest = {index: worker for (index, _), worker in sorted(self.workers.items())}
        members = self.pool._members.those("serving")
        return [newest[member.index] for member in members]

    async def end(self) -> None:
        """As a kill of the command would: nothing is waited for, nothing saved."""
        self.running.cancel()
        await asyncio.gather(self.running, return_exceptions=True)
        await self.pool.stop()

    def audit(self) -> Audit:
        found = Audit()
        audit_steps(self.books.rows, self.rules, found)
        return found


def train(
    scene: Callable[[Training], Awaitable[None]],
    change: Callable[[Sampler], None] = lambda _: None,
    *,
    steps: int = 12,
    workers: int = 3,
    bound: int = 2,
    world: type[Training] = Training,
    **pool: Any,
) -> tuple[Training, Audit]:
    """Play ``scene`` while the run goes on, and let it run to its end. Returns the run and its
    audit, which holds: finished, and every group trained or dropped."""
    loop = VirtualLoop()

    async def whole() -> Training:
        training = world(loop, Books(), change, steps=steps, workers=workers, bound=bound, **pool)
        try:
            acting = asyncio.ensure_future(scene(training))
            await asyncio.wait([acting, training.running], return_when=asyncio.FIRST_COMPLETED)
            if acting.done():
                acting.result()
            await training.running
            acting.cancel()
        finally:
            await training.end()
        return training

    training = loop.run(whole())
    audit = training.audit()
    assert audit.violations == []
    assert audit.steps == steps
    assert audit.in_flight == 0
    assert audit.issued == audit.trained + audit.dropped.total() == steps * PROMPTS_PER_STEP
    return training, audit
