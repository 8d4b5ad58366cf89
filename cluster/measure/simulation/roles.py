"""Workers, learner, prompts and journal that only pass the time. They stand behind the protocols
of the real ones, so that controller and pool cannot tell the difference."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.contracts.durable import FileDigest
from cluster.contracts.errors import Retryable
from cluster.contracts.records import (
    AS_TRAINED,
    Assignment,
    Canary,
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
from cluster.measure.simulation.record import Record, TrainedStep
from cluster.measure.simulation.scenario import Lengths, Scenario, worker_speed

_CANARY = Canary(token_ids=(1, 2), logprobs=(-1.0,), tolerance=1e-3)
TOLD_PER_SLOTS = 8  # a worker says so when an eighth of its slots have finished
_PROMPT = Prompt(id="simulated", messages=(), token_ids=(1,))


def manifest(version: int) -> WeightManifest:
    return WeightManifest(
        version=version, tensors=(), canary=_CANARY, transport="simulated", locator=None
    )


@dataclass(frozen=True, slots=True)
class Answers:
    """One group as it was really generated; times are the worker's own, without its pauses."""

    assignment: Assignment
    starts: list[float]
    ends: list[float]
    tokens: float


@dataclass(frozen=True, slots=True)
class Trace:
    """What the learner is told of one group instead of tokens."""

    tokens: float
    version_tokens: float  # the version of each token, summed
    heads: list[int]  # the version of each sample's first token


class SimulatedWorker:
    """Continuous batching with a fixed number of slots, first come, first served.

    It has a clock of its own, which stands still during a swap; on it, an answer takes its length
    over the speed, so that start and end are known as soon as it is submitted.
    """

    def __init__(
        self, index: int, incarnation: int, scenario: Scenario, lengths: Lengths, record: Record
    ) -> None:
        self.name, self.incarnation = f"worker-{index}", incarnation
        self._scenario, self._lengths, self._record = scenario, lengths, record
        self._loop = asyncio.get_running_loop()
        self._speed, self._life_s = worker_speed(scenario, index, incarnation)
        self._rate = self._speed * scenario.tokens_per_s
        self._free = [0.0] * scenario.slots  # when each slot is free: a heap
        self._open: list[tuple[float, int, Answers]] = []  # by end: a heap
        self._ends: list[float] = []  # of each answer that is not finished: a heap
        self._sampled = self._told = 0  # answers finished, of groups that are not; as said last
        self._order = itertools.count()
        self._paused_s = 0.0
        self._swapped_at: list[float] = []  # own time of each swap, and
        self._versions: list[int] = []  # the version from then on
        self._waiter: asyncio.Future[None] | None = None
        self._alarm: asyncio.TimerHandle | None = None
        self._deadline = 0.0
        self._dead = False
        self._finished_tokens = 0.0
        self._busy_s = 0.0
        self._busy_since: float | None = None  # it has something in hand

    async def placed(self) -> None: ...

    async def start(self) -> Mapping[str, Any]:
        if self.incarnation:
            await asyncio.sleep(self._scenario.restart_s)
            self._live()
        return {"engine": "simulated"}

    async def submit(self, assignments: Sequence[Assignment]) -> None:
        self._refuse_if_dead()
        self._busy()
        now, free, rate = self._own_time(), self._free, self._rate
        for assignment in assignments:
            lengths = self._lengths.of(assignment.group_id, assignment.attempt)
            starts: list[float] = []
            ends: list[float] = []
            for length in lengths:
                start = free[0] if free[0] > now else now
                end = start + length / rate
                heapq.heapreplace(free, end)
                starts.append(start)
                ends.append(end)
                heapq.heappush(self._ends, end)
            answers = Answers(assignment, starts, ends, sum(lengths))
            ready = max(ends) + self._scenario.score_s
            heapq.heappush(self._open, (ready, next(self._order), answers))
            self._record.samples_generated += len(lengths)
            self._record.occupation.add(
                [t + self._paused_s for t in starts], [t + self._paused_s for t in ends]
            )
        self._busy_since = self._loop.time()
        self._arm()

    async def harvest(self, timeout_s: float) -> Harvest:
        self._refuse_if_dead()
        if not self._due():
            self._waiter = self._loop.create_future()
            self._deadline = self._loop.time() + timeout_s
            self._arm()
            try:
                await self._waiter
            finally:
                self._waiter = None
            self._refuse_if_dead()
        metas: list[GroupMeta] = []
        traces: dict[int, Trace] = {}
        while self._group_is_due():
            _, _, answers = heapq.heappop(self._open)
            meta, traces[answers.assignment.group_id] = self._hand_over(answers)
            metas.append(meta)
            self._finished_tokens += answers.tokens
            self._sampled -= meta.samples
        self._count()
        self._told = self._sampled
        return Harvest(
            worker=self.name,
            incarnation=self.incarnation,
            groups=tuple(metas),
            payload=traces,
            stats={
                "generated_tokens": self._finished_tokens,
                "busy_s": self._busy(),
                "sampled": float(self._sampled),
            },
        )

    async def sample(
        self, prompts: Sequence[Prompt], samples: int, timeout_s: float, draw: Draw = AS_TRAINED
    ) -> list[Rollout]:
        raise Retryable("a simulated worker writes no completions")

    async def load_weights(self, manifest: WeightManifest) -> SwapReport:
        self._refuse_if_dead()
        fetch_s = self._scenario.fetch_s / self._speed
        await asyncio.sleep(fetch_s)
        self._refuse_if_dead()
        if not self._swapped_at and not self.incarnation:
            self._live()  # one that is lost before the run has begun would end it
        self._swapped_at.append(self._own_time())
        self._versions.append(manifest.version)
        pause_s = self._scenario.pause_s
        self._paused_s += pause_s
        if self._waiter is not None:
            self._arm()
        await asyncio.sleep(pause_s)
        self._refuse_if_dead()
        return SwapReport(
            version=manifest.version,
            fetch_s=fetch_s,
            verify_s=0.0,
            stage_s=0.0,
            pause_s=pause_s,
            prove_s=0.0,
            canary_logp_diff=0.0,
        )

    async def stop(self) -> None:
        self._dead = True

    def _busy(self) -> float:
        now = self._loop.time()
        if self._busy_since is not None:
            self._busy_s += now - self._busy_since
        self._busy_since = now if self._open else None
        return self._busy_s

    def _live(self) -> None:
        if self._life_s < self._scenario.seconds:
            self._loop.call_later(self._life_s, self._die)

    def _due(self) -> bool:
        """A group is finished, or as many answers as are worth a word."""
        return self._group_is_due() or self._word_at() <= self._loop.time()

    def _group_is_due(self) -> bool:
        # The same sum as in _arm, or rounding would ring the alarm a moment early, for ever.
        return bool(self._open) and self._open[0][0] + self._paused_s <= self._loop.time()

    def _word_at(self) -> float:
        """When so many answers more are finished that the pool is told."""
        worth = max(1, self._scenario.slots // TOLD_PER_SLOTS)
        lacking = worth - (self._count() - self._told)
        if lacking <= 0:
            return self._loop.time()
        if lacking > len(self._ends):
            return math.inf
        return heapq.nsmallest(lacking, self._ends)[-1] + self._paused_s

    def _count(self) -> int:
        now = self._loop.time()
        while self._ends and self._ends[0] + self._paused_s <= now:
            heapq.heappop(self._ends)
            self._sampled += 1
        return self._sampled

    def _own_time(self) -> float:
        """The loop's time less the pauses; it stands still during one."""
        own = self._loop.time() - self._paused_s
        return max(own, self._swapped_at[-1]) if self._swapped_at else own

    def _arm(self) -> None:
        """Wake whoever waits for a harvest at the next finished group, at its deadline at last."""
        if self._waiter is None or self._waiter.done():
            return
        due = min(self._deadline, self._word_at())
        if self._open:
            due = min(due, self._open[0][0] + self._paused_s)
        if self._alarm is not None:
            if self._alarm.when() == due:
                return
            self._alarm.cancel()
        self._alarm = self._loop.call_at(due, self._ring)

    def _ring(self) -> None:
        self._alarm = None
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _hand_over(self, answers: Answers) -> tuple[GroupMeta, Trace]:
        swapped_at, versions = self._swapped_at, self._versions
        heads: list[int] = []
        version_tokens, newest = 0.0, 0
        for start, end in zip(answers.starts, answers.ends, strict=True):
            at = max(0, bisect_right(swapped_at, start) - 1)
            heads.append(versions[at])
            last = len(versions) - 1
            spent = 0.0
            while at < last and swapped_at[at + 1] < end:  # a swap while it was being decoded
                upto = swapped_at[at + 1]
                spent += versions[at] * (upto - start)
                start = upto
                at += 1
            version_tokens += spent + versions[at] * (end - start)
            newest = max(newest, versions[at])
        assignment = answers.assignment
        meta = GroupMeta(
            group_id=assignment.group_id,
            attempt=assignment.attempt,
            samples=assignment.samples,
            prompt_tokens=1,
            response_tokens=int(answers.tokens),
            version_min=min(heads),
            version_max=newest,
        )
        return meta, Trace(answers.tokens, version_tokens * self._rate, heads)

    def _die(self) -> None:
        """Everything in hand is lost; what was decoded of it counts as waste."""
        if self._dead:
            return
        self._dead = True
        self._record.losses += 1
        now, occupation = self._own_time(), self._record.occupation
        for _, _, answers in self._open:
            for start, end in zip(answers.starts, answers.ends, strict=True):
                self._record.lost_tokens += max(0.0, min(end, now) - start) * self._rate
                if end > now:
                    occupation.cut(start + self._paused_s, end + self._paused_s, self._loop.time())
        self._open.clear()
        self._ring()

    def _refuse_if_dead(self) -> None:
        if self._dead:
            raise Retryable("the simulated machine is gone")


class SimulatedLearner:
    def __init__(self, scenario: Scenario, record: Record) -> None:
        self._scenario, self._record = scenario, record
        self.groups: list[int] = []  # every group trained on, in order

    async def start(self, step: int | None = None) -> WeightManifest:
        return manifest(0)

    def fetch_ahead(self, payloads: Sequence[Any]) -> None:
        """It has no payloads."""

    async def work_ahead(self, batch: StepInput) -> None:
        """It begins with whole steps."""

    async def step(self, batch: StepInput) -> StepResult:
        scenario, loop = self._scenario, asyncio.get_running_loop()
        began = loop.time()
        traces: dict[int, Trace] = {}
        for payload in batch.payloads:
            traces.update(payload)
        tokens = version_tokens = 0.0
        heads: Counter[int] = Counter()
        for group in batch.group_ids:
            trace = traces[group]
            tokens += trace.tokens
            version_tokens += trace.version_tokens
            heads.update(trace.heads)
        samples = len(batch.group_ids) * scenario.samples_per_prompt
        await asyncio.sleep(
            scenario.learn_step_s
            + scenario.learn_sample_s * samples
            + scenario.learn_token_s * tokens
            + scenario.publish_s
        )
        self.groups += batch.group_ids
        self._record.steps.append(
            TrainedStep(
                began,
                loop.time(),
                samples,
                tokens,
                batch.step * tokens - version_tokens,
                Counter({batch.step - version: count for version, count in heads.items()}),
            )
        )
        return StepResult(
            step=batch.step,
            version=batch.step + 1,
            metrics=(),
            manifest=manifest(batch.step + 1),
            trained_tokens=int(tokens),
        )

    async def snapshot(self) -> int:
        return 0

    async def lost(self) -> None:
        await asyncio.get_running_loop().create_future()

    async def store(self, directory: str) -> tuple[FileDigest, ...]:
        return ()

    async def stop(self) -> None: ...


class SimulatedPrompts:
    def __len__(self) -> int:
        return 1

    def prompt(self, ordinal: int) -> Prompt:
        return _PROMPT


class Trail:
    """Journal and sink in one: every event and every line of numbers, with its virtual time."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.rows: list[tuple[float, str, Mapping[str, Any]]] = []

    def event(self, kind: str, **detail: Any) -> None:
        self.rows.append((self._loop.time(), kind, detail))

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self.rows.append((self._loop.time(), f"step {step}", dict(numbers)))

    def close(self) -> None: ...

    def account(self, **row: Any) -> None: ...

    async def begin_checkpoint(self, step: int, nbytes: int) -> Path:
        return Path(f"step-{step}")

    async def commit_checkpoint(
        self, staging: Path, files: Sequence[FileDigest], state: RunState, keep: int
    ) -> Path:
        return staging

    async def abandon_checkpoint(self, staging: Path) -> None: ...
