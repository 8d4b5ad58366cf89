"""The learner's steps, one after the other: what each trains on, what follows when it ends, and
what becomes of it when its rollouts or the learner are lost."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from cluster.contracts.crash_points import passing
from cluster.contracts.errors import Fatal, Fault, LearnerLost, Retryable, RolledBack
from cluster.contracts.protocols import PromptSource
from cluster.contracts.records import Assignment, GroupMeta, StepResult, WeightManifest
from cluster.loop.bookkeeping import Bookkeeping
from cluster.loop.broadcasts import Broadcasts
from cluster.loop.context import LoopContext
from cluster.loop.learner_supervisor import LearnerSupervisor
from cluster.loop.pacing import Pacer
from cluster.loop.saving import Saving
from cluster.loop.staleness import GroupBuffer, require_fresh
from cluster.runs.monitor_actions import MonitorActions


class Workers(Protocol):
    """What the learner's steps ask of the worker pool."""

    @property
    def sent_version(self) -> int | None: ...

    @property
    def faults(self) -> Counter[Fault]: ...

    def submit(self, assignments: Sequence[Assignment]) -> None: ...

    def weights_lost(self) -> None: ...


class LearnerSteps:
    """``after_each``: called with its result when the books of a step are closed."""

    def __init__(
        self,
        prompts: PromptSource,
        workers: Workers,
        learner: LearnerSupervisor,
        buffer: GroupBuffer,
        books: Bookkeeping,
        broadcasts: Broadcasts,
        saving: Saving,
        pacer: Pacer,
        loop: LoopContext,
        after_each: Callable[[StepResult], None],
        monitors: MonitorActions,
    ) -> None:
        self._settings = loop.settings
        self._prompts = prompts
        self._workers = workers
        self._learner = learner
        self._buffer = buffer
        self._books = books
        self._broadcasts = broadcasts
        self._saving = saving
        self._pacer = pacer
        self._run = loop.run
        self._activities = loop.activities
        self._clock = loop.clock
        self._after_each = after_each
        self._monitors = monitors
        self._taken: list[GroupMeta] = []  # groups of the step under way
        self._attempts = 0  # of it
        self._begun: set[int] = set()  # parts of the next step that the learner was told of
        self._lacked = -1  # groups of it that were not there when this was looked at last
        self._fetching = -1  # the newest step that the learner was told to fetch ahead
        self.done = buffer.next_step  # steps finished

    def start(self) -> None:
        """Begin the next step if its groups and the learner are there."""
        if self._activities.any_of("step", "snapshot", "successor"):
            self._fetch_ahead()
            return  # one learner, one step: steps change the same weights
        if self._learner.succession.redo:
            self._learner.ask(self._learner.succession.redo[0], self._workers.sent_version)
            return
        taken = self._buffer.take()
        if taken is None:
            self._work_ahead()
            return
        batch, metas = taken
        self._books.step_taken(metas)
        if not batch.group_ids:
            causes = {m.failure for m in metas}
            raise Fatal(f"every prompt of step {batch.step} failed: {'; '.join(map(str, causes))}")
        # The ledger's promise, checked on what really came.
        require_fresh(batch.step, metas, self._settings.staleness_bound)
        self._nothing_is_begun()
        self._taken = metas
        now = self._clock.now()
        self._books.accounts.step_begins(now)
        self._pacer.step_began(now)
        batch = replace(batch, kl_coef=self._monitors.kl_coef)
        self._learner.ask(batch, self._workers.sent_version)

    def _fetch_ahead(self) -> None:
        """Once for each step that is complete before the one under way has ended."""
        step = self._buffer.next_step
        if step > self._fetching and "step" in self._activities and self._buffer.is_complete(step):
            self._fetching = step
            self._learner.fetch_ahead(self._buffer.upcoming())

    def _work_ahead(self) -> None:
        """Tell the learner, which waits for the rest of the step, of the parts that are complete:
        of each once."""
        parts, lacking = self._settings.stream_parts, self._buffer.lacking()
        # Each group that comes wakes the loop; which parts are complete is asked of arrivals only.
        if parts == 1 or "ahead" in self._activities or lacking == self._lacked:
            return
        self._lacked = lacking
        new = set(self._buffer.complete_parts(parts)) - self._begun
        batch = self._buffer.input_of(new, parts)
        if batch.group_ids:  # not all have failed
            self._begun |= new
            self._learner.work_ahead(batch)

    def _nothing_is_begun(self) -> None:
        self._begun, self._lacked = set(), -1

    def after(self, task: asyncio.Task[Any]) -> None:
        """The step has ended."""
        # Only what was lost on the way is tried again: any other problem is the learner's own, and
        # its weights may be half changed.
        if isinstance(problem := task.exception(), Retryable):
            self._again(problem)
        else:
            self._trained(task.result())

    def _trained(self, result: StepResult) -> None:
        succession = self._learner.succession
        succession.published(result.manifest)
        succession.redo = succession.redo[1:]
        if result.step < self.done:  # done once more by a new learner
            self._learner.becomes("waiting", in_vain=True)
            if result.version == self.done:  # older ones were held by all before
                self._broadcasts.queue(result.manifest)
            return
        passing("driver.after_step")
        self._learner.becomes("waiting")
        now = self._learner.since
        self.done = result.step + 1
        self._attempts = 0
        self._monitors.next_step_trained()
        self._learner.published = result.version
        self._books.step_ended(result, self._taken, now)
        self._pacer.step_ended(now)
        # First of all: workers fetch while the numbers are written.
        self._broadcasts.queue(result.manifest)
        self._broadcasts.start()
        self._books.write_metrics(result, now, self._pacer.lead_s)
        passing("driver.after_metrics")
        self._after_each(result)
        self._saving.step_ended(self.done, now)
        self._books.accounts.next_window(now, waiting_since=self._clock.now())

    def _again(self, problem: Retryable) -> None:
        """The step's rollouts were lost on their way; nothing was learnt. Generate them again."""
        self._attempts += 1
        redone = self._learner.succession.redo[:1]
        if redone and redone[0].step < self.done:
            raise RolledBack(f"rollouts of step {redone[0].step} are lost: {problem}")
        self._learner.succession.given_back(self.done)
        if self._attempts >= self._settings.max_step_attempts:
            raise Fatal(f"step {self.done} was tried {self._attempts} times: {problem}")
        # The same ids under a higher attempt, so that a late answer to the first one is refused.
        lost = self._buffer.give_back(self.done, self._taken)
        self._books.accounts.step_lost(self._clock.now(), lost)
        self._pacer.step_failed()
        self._learner.becomes("waiting", in_vain=True)
        self._run.event("step_retried", step=self.done, groups=len(lost), cause=str(problem))
        self._workers.submit(
            [
                Assignment(
                    group_id=meta.group_id,
                    prompt=self._prompts.prompt(meta.group_id),
                    samples=self._settings.samples_per_prompt,
                    attempt=meta.attempt + 1,
                )
                for meta in lost
            ]
        )

    # -- another learner --------------------------------------------------------------------------

    def learner_lost(self, problem: LearnerLost) -> None:
        """Have another one start. Workers go on meanwhile, as far as the bound allows; finished
        groups wait for it."""
        step = self._activities.get("step")
        if step is not None and step.done() and not step.exception():
            self._activities.take("step")
            self._trained(step.result())  # the last that it did
        # All of them end with it, each in its own way; the first has told.
        for name in ("step", "ahead", "watch", "snapshot", "save", "successor"):
            if (task := self._activities.take(name)) is not None:
                task.cancel()
                self._saving.due |= name in ("snapshot", "save")
        self._nothing_is_begun()
        self._broadcasts.forget()
        self._workers.weights_lost()
        self._workers.faults["learner"] += 1
        self._pacer.step_failed()
        self._learner.replace(problem, self.done)

    def learner_succeeded(self, manifest: WeightManifest) -> None:
        self._learner.succeeded(manifest, self.done)
        if manifest.version == self.done:
            self._broadcasts.queue(manifest)  # the same weights, at another place

    # -- at the end of the run --------------------------------------------------------------------

    async def finish(self, hurried: asyncio.Event) -> None:
        """On a stop: wait for the step under way. Once ``hurried``, only ``stop_grace_s``; the step
        is lost if it takes longer."""
        if self._learner.being_replaced(self.done):
            self._run.event("step_abandoned", step=self.done)
            self._saving.saved = self.done  # by nobody, but a resume trains it again
            return
        task = self._activities.get("step")
        if task is None:
            return
        hurry = asyncio.ensure_future(hurried.wait())
        await asyncio.wait([task, hurry], return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        # A person is waiting: better to lose the step than to hold the terminal for a long one.
        done, _ = await asyncio.wait([task], timeout=self._settings.stop_grace_s)
        if not done:
            self._run.event("step_abandoned", step=self.done)
            self._saving.abandoned = True
            return
        self._activities.take("step")
        if isinstance(task.exception(), Retryable | LearnerLost):
            return  # nothing of it is kept
        self._learner.becomes("waiting")
        result, now = task.result(), self._learner.since
        self.done = result.step + 1
        self._books.step_ended(result, self._taken, now)
        self._books.write_metrics(result, now, self._pacer.lead_s)
