"""Traces of groups: the real controller's order of calls, by hand, with a clock that we move."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.assembly.otel import TraceExporter, traces_of
from cluster.contracts.config.base import LoggingConfig
from cluster.contracts.records import (
    Assignment,
    Canary,
    GroupMeta,
    Harvest,
    Prompt,
    StepInput,
    StepResult,
    SwapReport,
    WeightManifest,
)
from cluster.loop.traces import Trace, Traces


class Clock:
    def __init__(self) -> None:
        self.time = 100.0

    def now(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None: ...


class Prompts:
    def __len__(self) -> int:
        return 100

    def prompt(self, ordinal: int) -> Prompt:
        return Prompt(id=f"p{ordinal}", messages=(), token_ids=(1,))


def manifest(version: int) -> WeightManifest:
    canary = Canary(token_ids=(1, 2), logprobs=(-1.0,), tolerance=1e-3)
    return WeightManifest(
        version=version, tensors=(), canary=canary, transport="fake", locator=None
    )


class Worker:
    name, incarnation = "worker-0", 0
    node = "host-7"

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._taken: list[Assignment] = []

    async def placed(self) -> None: ...

    async def start(self) -> Mapping[str, Any]:
        return {}

    async def submit(self, assignments: Sequence[Assignment]) -> None:
        self._taken += assignments

    async def harvest(self, timeout_s: float) -> Harvest:
        self._clock.time += 10.0
        metas = tuple(
            GroupMeta(
                group_id=a.group_id,
                attempt=a.attempt,
                samples=2,
                prompt_tokens=1,
                response_tokens=50,
                version_min=3,
                version_max=4,
                generate_s=6.0,
                score_s=3.0,
            )
            for a in self._taken
        )
        return Harvest(worker=self.name, incarnation=0, groups=metas, payload=None)

    async def load_weights(self, manifest: WeightManifest) -> SwapReport:
        self._clock.time += 2.0
        return SwapReport(
            version=manifest.version,
            fetch_s=0,
            verify_s=0,
            stage_s=0,
            pause_s=0,
            prove_s=0,
            canary_logp_diff=0,
        )

    async def stop(self) -> None: ...


class Learner:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    async def start(self) -> WeightManifest:
        return manifest(0)

    def fetch_ahead(self, payloads: Sequence[Any]) -> None: ...

    async def work_ahead(self, batch: StepInput) -> None: ...

    async def step(self, batch: StepInput) -> StepResult:
        self._clock.time += 7.0
        return StepResult(
            step=batch.step,
            version=batch.step + 1,
            metrics=(),
            manifest=manifest(batch.step + 1),
            trained_tokens=400,
        )

    async def snapshot(self) -> int:
        return 0

    async def store(self, directory: str) -> tuple[()]:
        return ()

    async def stop(self) -> None: ...


async def one_step(traces: Traces, clock: Clock, groups: Sequence[int]) -> None:
    prompts = traces.of_prompts(Prompts())
    worker = traces.of_workers(lambda index, incarnation: Worker(clock))(0, 0)
    learner = traces.of_learner(Learner(clock))
    asked = [Assignment(group_id=n, prompt=prompts.prompt(n), samples=2) for n in groups]
    clock.time += 1.0
    await worker.submit(asked)
    await worker.harvest(1.0)
    clock.time += 4.0
    step = groups[0] // 4
    result = await learner.step(StepInput(step=step, group_ids=tuple(groups), payloads=()))
    await worker.load_weights(result.manifest)
    assert getattr(worker, "node") == "host-7"  # noqa: B009 - not part of the protocol


def test_a_group_is_followed_from_its_prompt_to_the_weights_it_changed() -> None:
    clock, traces = Clock(), []
    asyncio.run(one_step(Traces(1.0, clock, traces.append), clock, [20, 21, 22, 23]))
    assert len(traces) == 4
    trace: Trace = traces[0]
    spent = {part.name: round(part.end - part.start, 3) for part in trace.parts}
    assert spent == {
        "wait for a worker": 1.0,
        "generate": 6.0,
        "score": 3.0,
        "wait for the step": 4.0,
        "optimizer step": 7.0,
        "update the workers": 2.0,
    }
    assert round(trace.whole.end - trace.whole.start, 3) == 24.0
    facts = trace.whole.facts
    assert (facts["group"], facts["prompt"], facts["step"], facts["staleness"]) == (20, "p20", 5, 2)
    ends = [part.end for part in trace.parts]
    assert ends == sorted(ends)


def test_a_share_of_the_groups_is_traced_and_nothing_is_kept_of_the_others() -> None:
    clock, traces = Clock(), []
    followed = Traces(0.25, clock, traces.append)
    for step in range(10):
        asyncio.run(one_step(followed, clock, list(range(4 * step, 4 * step + 4))))
    assert [trace.whole.facts["group"] for trace in traces] == list(range(3, 40, 4))
    assert not followed._ways
    assert not followed._updates


def test_spans_are_exported_as_one_trace() -> None:
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    memory = InMemorySpanExporter()
    exporter = TraceExporter("mine", memory, lambda: None)
    clock = Clock()
    asyncio.run(one_step(Traces(1.0, clock, exporter), clock, [0, 1, 2, 3]))
    exporter._provider.force_flush()
    spans = memory.get_finished_spans()
    roots = [span for span in spans if span.parent is None]
    assert [root.name for root in roots] == ["group"] * 4
    root = roots[0]
    parts = [s for s in spans if s.parent is not None and s.parent.span_id == root.context.span_id]
    assert [part.name for part in parts] == [
        *("wait for a worker", "generate", "score"),
        *("wait for the step", "optimizer step", "update the workers"),
    ]
    assert {part.context.trace_id for part in parts} == {root.context.trace_id}
    assert root.attributes is not None
    assert root.attributes["accord.prompt"] == "p0"
    assert root.resource.attributes["accord.run"] == "mine"
    assert root.start_time is not None
    assert root.end_time is not None
    assert round((root.end_time - root.start_time) / 1e9, 3) == 24.0
    exporter.close()


def test_a_collector_that_is_away_is_told_once_and_holds_up_nothing() -> None:
    told: list[str] = []
    config = LoggingConfig(otel="http://127.0.0.1:9", otel_share=1.0)  # nobody listens there
    clock = Clock()
    with traces_of(config, "mine", told.append) as traces:
        assert traces is not None
        asyncio.run(one_step(traces, clock, [0, 1, 2, 3]))
        deadline = time.monotonic() + 60
        while not told and time.monotonic() < deadline:
            time.sleep(0.05)
        ending = time.monotonic()
    assert time.monotonic() - ending < 10
    assert len(told) == 1
    assert "http://127.0.0.1:9" in told[0]


def test_without_a_collector_there_are_no_traces() -> None:
    with traces_of(LoggingConfig(), "mine", print) as traces:
        assert traces is None
