"""The way of some groups from prompt to the weights they changed, as OpenTelemetry traces.

It looks at what the loop asks of its roles and at what they answer, by standing in front of them.
So the loop knows nothing of it, and a run without traces has none of this.

    group ─┬─ wait for a worker    admitted, until a worker has it
           ├─ generate             the worker's own measure
           ├─ score                the worker's own measure
           ├─ wait for the step    until the learner begins the step
           ├─ optimizer step       until the new weights are published
           └─ update the workers   until every worker has them
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.contracts.protocols import Clock, LearnerHandle, PromptSource, WorkerHandle
from cluster.contracts.records import (
    Assignment,
    GroupMeta,
    Harvest,
    Prompt,
    StepInput,
    StepResult,
    SwapReport,
    WeightManifest,
)


@dataclass(frozen=True, slots=True)
class Span:
    """``start`` and ``end``: seconds since 1970."""

    name: str
    start: float
    end: float
    facts: Mapping[str, str | int | float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Trace:
    """One group: the span of the whole, and its parts in order."""

    whole: Span
    parts: tuple[Span, ...]


Export = Callable[[Trace], None]


@dataclass(slots=True)
class _Way:
    """Of one group so far; moments of the loop's clock."""

    prompt: str
    admitted: float
    placed: float = 0.0
    worker: str = ""
    finished: float = 0.0
    meta: GroupMeta | None = None


@dataclass(slots=True)
class _Update:
    """A step that is over, until its weights are everywhere."""

    began: float
    ended: float
    step: int
    tokens: int
    ways: Mapping[int, _Way]


class Traces:
    """``share``: of all groups, which ones are traced is decided by their number alone."""

    def __init__(self, share: float, clock: Clock, export: Export) -> None:
        self._share = share
        self._clock = clock
        self._export = export
        self._to_time_of_day = time.time() - clock.now()
        self._ways: dict[int, _Way] = {}
        self._updates: dict[int, _Update] = {}  # by the version that the step made
        self._loading: dict[int, int] = {}  # version -> workers that take it now

    def of_prompts(self, prompts: PromptSource) -> PromptSource:
        return _Prompts(prompts, self)

    def of_workers(
        self, factory: Callable[[int, int], WorkerHandle]
    ) -> Callable[[int, int], WorkerHandle]:
        return lambda index, incarnation: _Worker(factory(index, incarnation), self)

    def of_learner(self, learner: LearnerHandle) -> LearnerHandle:
        return _Learner(learner, self)

    def now(self) -> float:
        return self._clock.now()

    # -- what happened ----------------------------------------------------------------------------

    def admitted(self, group: int, prompt: Prompt) -> None:
        chosen = int((group + 1) * self._share) > int(group * self._share)
        if chosen and group not in self._ways:
            self._ways[group] = _Way(prompt.id, self._clock.now())

    def placed(self, assignments: Sequence[Assignment], worker: str) -> None:
        for assignment in assignments:
            if way := self._ways.get(assignment.group_id):
                way.placed, way.worker = self._clock.now(), worker

    def finished(self, harvest: Harvest) -> None:
        for meta in harvest.groups:
            if (way := self._ways.get(meta.group_id)) and meta.failure is None:
                way.finished, way.meta = self._clock.now(), meta

    def stepped(self, batch: StepInput, result: StepResult, began: float) -> None:
        ways = {group: self._ways.pop(group) for group in batch.group_ids if group in self._ways}
        # Groups of earlier steps that are still here were left out.
        first = min(batch.group_ids, default=0)
        for group in [group for group in self._ways if group < first]:
            del self._ways[group]
        if ways:
            self._updates[result.version] = _Update(
                began, self._clock.now(), result.step, result.trained_tokens, ways
            )

    def loads(self, version: int) -> None:
        self._loading[version] = self._loading.get(version, 0) + 1

    def loaded(self, version: int) -> None:
        self._loading[version] -= 1
        if self._loading[version] == 0:
            del self._loading[version]
            # A newer version also ends the way of those that were never sent.
            for older in [v for v in self._updates if v <= version]:
                self._tell(self._updates.pop(older))

    def _tell(self, update: _Update) -> None:
        now = self._clock.now()
        for group, way in update.ways.items():
            if way.meta is not None:
                self._export(self._trace(group, way, way.meta, update, now))

    def _trace(self, group: int, way: _Way, meta: GroupMeta, update: _Update, now: float) -> Trace:
        scored = way.finished - meta.score_s
        generated = max(scored - meta.generate_s, way.placed)
        tokens = {"tokens": meta.response_tokens, "version_max": meta.version_max}
        parts = (
            self._span("wait for a worker", way.admitted, way.placed),
            self._span("generate", generated, scored, worker=way.worker, **tokens),
            self._span("score", scored, way.finished),
            self._span("wait for the step", way.finished, update.began),
            self._span("optimizer step", update.began, update.ended, tokens=update.tokens),
            self._span("update the workers", update.ended, now),
        )
        whole = self._span(
            "group",
            way.admitted,
            now,
            group=group,
            prompt=way.prompt,
            attempt=meta.attempt,
            completions=meta.samples,
            step=update.step,
            staleness=update.step - meta.version_min,
        )
        return Trace(whole, parts)

    def _span(self, name: str, start: float, end: float, **facts: str | int | float) -> Span:
        shift = self._to_time_of_day
        return Span(name, start + shift, max(start, end) + shift, facts)


class _Prompts:
    """A prompt is first asked for when its group is admitted."""

    def __init__(self, prompts: PromptSource, traces: Traces) -> None:
        self._prompts, self._traces = prompts, traces

    def __len__(self) -> int:
        return len(self._prompts)

    def prompt(self, ordinal: int) -> Prompt:
        found = self._prompts.prompt(ordinal)
        self._traces.admitted(ordinal, found)
        return found


class _Worker:
    def __init__(self, worker: WorkerHandle, traces: Traces) -> None:
        self._worker, self._traces = worker, traces
        self.name, self.incarnation = worker.name, worker.incarnation

    def __getattr__(self, name: str) -> Any:
        return getattr(self._worker, name)

    async def submit(self, assignments: Sequence[Assignment]) -> None:
        self._traces.placed(assignments, self.name)
        await self._worker.submit(assignments)

    async def harvest(self, timeout_s: float) -> Harvest:
        harvest = await self._worker.harvest(timeout_s)
        self._traces.finished(harvest)
        return harvest

    async def load_weights(self, manifest: WeightManifest) -> SwapReport:
        self._traces.loads(manifest.version)
        try:
            return await self._worker.load_weights(manifest)
        finally:
            self._traces.loaded(manifest.version)


class _Learner:
    def __init__(self, learner: LearnerHandle, traces: Traces) -> None:
        self._learner, self._traces = learner, traces

    def __getattr__(self, name: str) -> Any:
        return getattr(self._learner, name)

    async def step(self, batch: StepInput) -> StepResult:
        began = self._traces.now()
        result = await self._learner.step(batch)
        self._traces.stepped(batch, result, began)
        return result
