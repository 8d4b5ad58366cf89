"""What a run writes down of its steps: where every group is, the numbers of each step for the
sinks, and the state that a checkpoint holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from cluster.contracts.metrics import values
from cluster.contracts.protocols import PromptSource, Sink
from cluster.contracts.records import GroupMeta, RunState, StepResult, SwapReport
from cluster.loop.context import LoopContext
from cluster.loop.loop_metrics import Accounts, PoolNumbers, Standing
from cluster.loop.outages import Outage, Sinks
from cluster.loop.staleness import AdmissionLedger, GroupBuffer
from cluster.loop.steering import Steering


class Bookkeeping:
    """``began``: when the loop of this session began, 0 before. ``accounts``: what is measured
    between two lines of metrics, from the loop's beginning."""

    accounts: Accounts

    def __init__(
        self,
        prompts: PromptSource,
        pool: PoolNumbers,
        sinks: Sequence[Sink],
        buffer: GroupBuffer,
        steering: Steering,
        state: RunState | None,
        cpu_s: Callable[[], float],
        loop: LoopContext,
    ) -> None:
        self._settings = loop.settings
        self._prompts = prompts
        self._pool = pool
        self._run = loop.run
        self._sinks = Sinks(sinks, loop.run.event)
        self._buffer = buffer
        self._ledger: AdmissionLedger = buffer.ledger
        self._steering = steering
        self._clock = loop.clock
        self._timeline = loop.timeline
        self._cpu_s = cpu_s
        self._elapsed_before = state.elapsed_s if state else 0.0
        self._dropped: dict[int, Mapping[str, Any]] = (
            {row["group"]: row for row in state.dropped} if state else {}
        )
        self._rollbacks = state.rollbacks if state else ()
        self._rollouts_disk = Outage()
        self._noted: dict[str, float] = {}
        self.began = 0.0

    def loop_began(self, learner: Callable[[float], Mapping[str, float]]) -> None:
        """``learner``: seconds of what it did until a moment, by its state."""
        self.accounts = Accounts(self._settings, self._pool, self._clock.now, self._cpu_s, learner)

    def note(self, numbers: Mapping[str, float]) -> None:
        """Take them into the next line of metrics."""
        self._noted |= numbers

    def broadcast_ended(self, reports: Iterable[SwapReport], seconds: float) -> None:
        self.accounts.broadcast_ended(reports, seconds)

    def elapsed_s(self, now: float) -> float:
        """Of the run, in all its sessions."""
        return self._elapsed_before + now - self.began

    def state(self, step: int) -> RunState:
        """Of a run that has done ``step`` steps."""
        return RunState(
            step=step,
            version=step,
            # Not the ledger's: what was admitted beyond is generated again by newer weights.
            next_group=step * self._settings.prompts_per_step,
            prompts_total=len(self._prompts),
            dropped=tuple(self._dropped.values()),
            elapsed_s=self.elapsed_s(self._clock.now()),
            rollbacks=self._rollbacks,
        )

    def step_taken(self, metas: Sequence[GroupMeta]) -> None:
        """A step's groups go to the learner; those that had failed are dropped."""
        now = self._clock.now()
        self._timeline.span("learner", "wait for batch", self.accounts.waiting_since, now)
        for meta in metas:
            if meta.failure is not None and meta.group_id not in self._dropped:
                prompt = self._prompts.prompt(meta.group_id)
                row = {"group": meta.group_id, "prompt": prompt.id, "cause": meta.failure}
                self._dropped[meta.group_id] = row
                self._run.event("group_dropped", **row)

    def step_ended(self, result: StepResult, taken: Sequence[GroupMeta], now: float) -> None:
        """Enter the step that has just ended into the books, and where every other group is."""
        began = self.accounts.step_ended(now, result.trained_tokens)
        self._timeline.span("learner", f"step {result.step}", began, now)
        trained = [meta for meta in taken if meta.failure is None]
        self._run.account(
            step=result.step,
            trained=[meta.group_id for meta in trained],
            dropped={str(m.group_id): m.failure for m in taken if m.failure is not None},
            samples=sum(meta.samples for meta in trained),
            tokens=sum(meta.response_tokens for meta in trained),
            version_min=min(meta.version_min for meta in trained),
            version_max=max(meta.version_max for meta in trained),
            issued=self._ledger.admitted,
            ready=len(self._buffer) + self._pool.unread,
            in_flight=self._pool.in_flight,
            refused=self._buffer.refused,
        )

    def write_metrics(self, result: StepResult, now: float, lead_s: float) -> None:
        """The numbers of the step that ended at ``now``, to every sink. ``lead_s``: how long before
        their step groups are admitted at present."""
        step = result.step + 1
        self._note_rollouts(step, result.not_written)
        if (tokens := result.smaller_microbatches) is not None:
            self._run.event("learner_out_of_memory", step=step, tokens_per_microbatch=tokens)
        standing = Standing(
            queued=len(self._buffer),
            refused=self._buffer.refused,
            refused_tokens=self._buffer.refused_tokens,
            dropped=len(self._dropped),
            held=self._ledger.held,
            lead_s=lead_s,
            elapsed_s=self.elapsed_s(now),
            sink_errors=self._sinks.errors,
        )
        numbers = values(result.metrics) | self.accounts.numbers(result, now, standing)
        noted, self._noted = self._noted, {}
        numbers |= noted
        # JSON has no NaN; a number that could not be measured is left out.
        numbers = {name: v for name, v in numbers.items() if math.isfinite(v)}
        self._steering.step_ended(numbers, now=now, wanted=self._pool.wanted)
        self._sinks.write(step, numbers)

    def _note_rollouts(self, step: int, not_written: Sequence[str]) -> None:
        for cause in not_written:
            if self._rollouts_disk.fails():
                self._run.event("rollouts_not_written", step=step, cause=cause)
        if not not_written and (files := self._rollouts_disk.works()):
            self._run.event("rollouts_written_again", step=step, missing=files)
