"""When a checkpoint is due, and how it is written beside the steps: one at a time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.contracts.crash_points import passing
from cluster.contracts.errors import LearnerLost, NotSaved, Resumable
from cluster.contracts.records import RunState
from cluster.loop.context import LoopContext
from cluster.loop.learner_supervisor import LearnerSupervisor

EVERY_ONE = 1 << 30  # checkpoints that are kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A copy of the state in the learner's memory: of which moment, and how large."""

    state: RunState
    nbytes: int
    began: float
    copied: float


@dataclass(slots=True)
class Wanted:
    """A checkpoint of one step that an evaluation needs. ``known``: whether it is ``there``."""

    step: int
    copied: bool = False
    there: bool = False
    known: asyncio.Event = field(default_factory=asyncio.Event)

    def settle(self, *, there: bool) -> None:
        self.copied, self.there = True, there
        self.known.set()

    def copied_at(self, step: int) -> None:
        """The learner's state is being copied at ``step``. Where the copy made at the wanted step
        was lost with the learner, and the run has gone on since, there is no other."""
        self.copied = True
        if step != self.step and not self.known.is_set():
            self.settle(there=False)


class Saving:
    """``state``: where the run stands now. ``saved``: step of the newest checkpoint."""

    def __init__(
        self,
        learner: LearnerSupervisor,
        state: Callable[[], RunState],
        saved: int,
        loop: LoopContext,
    ) -> None:
        self._settings = loop.settings
        self._learner = learner
        self._run = loop.run
        self._state = state
        self._activities = loop.activities
        self._clock = loop.clock
        self._timeline = loop.timeline
        self.saved = saved
        self.due = False
        self.abandoned = False  # the learner is busy: the last state cannot be had
        self._since = 0.0  # when the loop or the newest snapshot began
        self._wanted: Wanted | None = None

    def loop_began(self, now: float) -> None:
        self._since = now

    def step_ended(self, step: int, now: float) -> None:
        every, every_s = self._settings.checkpoint_every, self._settings.checkpoint_every_s
        self.due |= (
            step % every == 0
            or step == self._settings.steps
            or (every_s is not None and now - self._since >= every_s)
        )

    def want(self, step: int) -> None:
        """Of this very step, the newest one, there is to be a checkpoint: an evaluation may find it
        the best. Until ``decided`` none is deleted."""
        self._wanted = Wanted(step)
        if self.saved == step:
            self._wanted.settle(there=True)
        else:
            self.due = True

    @property
    def holds_step(self) -> bool:
        """Whether the learner must not go on before its state is copied."""
        return self._wanted is not None and not self._wanted.copied

    async def kept(self) -> bool:
        """Whether the wanted checkpoint is there; waits until that is known."""
        wanted = self._wanted
        if wanted is None:
            return False
        await wanted.known.wait()
        return wanted.there

    def decided(self) -> None:
        """Whether the wanted checkpoint is the best is known."""
        self._wanted = None

    def start(self) -> None:
        """Begin what is due, once the learner is between two steps and nothing is being saved."""
        busy = self._activities.any_of("step", "ahead", "snapshot", "save", "successor")
        if self.due and not busy and not self._learner.behind(self._state().step):
            self.due = False
            self._activities.begin("snapshot", self._snapshot())

    def copied(self, task: asyncio.Task[Any]) -> None:
        """The copy is there: write it, while the next step goes on."""
        self._activities.begin("save", self._write(task.result()))

    def written(self, task: asyncio.Task[Any]) -> None:
        if isinstance(problem := task.exception(), NotSaved):
            # What was trained is in the learner's memory; it is written at the next interval.
            self._run.event("checkpoint_failed", step=self._state().step, cause=str(problem))
        else:
            task.result()  # raises any other problem

    async def settle(self) -> None:
        """Wait for the checkpoint under way; begin none."""
        if (task := self._activities.take("save")) is not None:
            await asyncio.wait([task])
            with contextlib.suppress(LearnerLost):
                self.written(task)

    async def finish(self, *, stopped: bool) -> None:
        """At the end: wait for the checkpoint under way, and write the newest state. Raises
        Resumable when that cannot be written; LearnerLost, where a run has come to its end and was
        not ``stopped``, for another learner to write it."""
        step = self._state().step
        try:
            if (task := self._activities.take("snapshot")) is not None:
                self._activities.begin("save", self._write(await task))
            if (task := self._activities.take("save")) is not None:
                await asyncio.wait([task])
                self.written(task)
            if step > 0 and step != self.saved and not self.abandoned:
                await self._write(await self._snapshot())
        except (NotSaved, LearnerLost) as problem:
            if isinstance(problem, LearnerLost) and not stopped:
                raise
            raise Resumable(
                f"the run has ended, and its last state, of step {step}, could not be saved: "
                f"{problem}"
            ) from problem

    async def _snapshot(self) -> Snapshot:
        """The only part of a checkpoint that a step has to wait for."""
        state, began = self._state(), self._clock.now()
        self._since = began
        if self._wanted is not None:
            self._wanted.copied_at(state.step)
        nbytes = await self._learner.snapshot()
        copied = self._clock.now()
        self._timeline.span("learner", "copy state", began, copied)
        return Snapshot(state=state, nbytes=nbytes, began=began, copied=copied)

    async def _write(self, snapshot: Snapshot) -> Path:
        try:
            path = await self._commit(snapshot)
        except NotSaved:
            self._settle(snapshot.state.step, there=False)
            raise
        self._settle(snapshot.state.step, there=True)
        return path

    def _settle(self, step: int, *, there: bool) -> None:
        if self._wanted is not None and self._wanted.step == step:
            self._wanted.settle(there=there)

    async def _commit(self, snapshot: Snapshot) -> Path:
        """Beside the loop: hashing and copying many gigabytes takes minutes."""
        state, nbytes = snapshot.state, snapshot.nbytes
        # Written beside and renamed last: an interrupt leaves the checkpoint before it whole.
        staging = await self._run.begin_checkpoint(state.step, nbytes)
        try:
            files = await self._learner.store(str(staging))
        except NotSaved:
            await self._run.abandon_checkpoint(staging)
            raise
        passing("driver.mid_save")
        keep = self._settings.keep_checkpoints if self._wanted is None else EVERY_ONE
        path = await self._run.commit_checkpoint(staging, files, state, keep)
        self.saved = state.step
        ended = self._clock.now()
        self._timeline.span("checkpoint", f"step {state.step}", snapshot.copied, ended)
        self._run.event(
            "checkpoint",
            step=state.step,
            path=str(path),
            bytes=nbytes,
            learner_waited_s=round(snapshot.copied - snapshot.began, 3),
            seconds=round(ended - snapshot.began, 3),
        )
        return path
