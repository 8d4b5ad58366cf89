"""Groups are admitted: as early as the staleness bound allows, and not before they are needed."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Protocol

from cluster.contracts.crash_points import passing
from cluster.contracts.protocols import PromptSource
from cluster.contracts.records import Assignment
from cluster.loop.context import LoopContext
from cluster.loop.pacing import Pacer
from cluster.loop.staleness import GroupBuffer


class Workers(Protocol):
    def submit(self, assignments: Sequence[Assignment]) -> None: ...


class Admission:
    def __init__(
        self,
        prompts: PromptSource,
        workers: Workers,
        buffer: GroupBuffer,
        pacer: Pacer,
        loop: LoopContext,
    ) -> None:
        self._prompts = prompts
        self._workers = workers
        self._buffer = buffer
        self._ledger = buffer.ledger
        self._pacer = pacer
        self._samples = loop.settings.samples_per_prompt
        self._activities = loop.activities
        self._clock = loop.clock
        self._timer: asyncio.TimerHandle | None = None  # until the next groups are due

    def admit(self) -> None:
        """Have the workers begin whatever is due."""
        self.cancel()
        if ids := self._ledger.admit(self._due()):
            self._workers.submit(
                [
                    Assignment(group_id=i, prompt=self._prompts.prompt(i), samples=self._samples)
                    for i in ids
                ]
            )
            passing("driver.after_admit")

    def note_complete_steps(self) -> None:
        """To be called when groups have come in."""
        for step in self._pacer.open_steps:
            if self._buffer.is_complete(step):
                self._pacer.complete(step, self._clock.now())

    def cancel(self) -> None:
        """Stop waiting for the next groups to be due."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _due(self) -> int:
        """How many of the groups that the bound allows are due; the loop wakes for the others."""
        ledger, now = self._ledger, self._clock.now()
        due, room = 0, ledger.room()
        while due < room:
            step = ledger.step_of(ledger.admitted + due)
            if (at := self._pacer.due(step, now)) > now:
                if math.isfinite(at):
                    loop = asyncio.get_running_loop()
                    self._timer = loop.call_later(at - now, self._activities.wake)
                break
            self._pacer.admitted(step, now)
            due += min(ledger.prompts_per_step, room - due)
        return due
