"""Why and how fast a run ends before its last step."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from cluster.contracts.errors import AccordError, Resumable
from cluster.contracts.records import RunState


@dataclass(frozen=True, slots=True, kw_only=True)
class Abandoned:
    """What a run was at when it was told to go back. ``admitted``: groups that workers were asked
    for. ``refused``: results that came too late."""

    state: RunState
    admitted: int
    refused: int


class GoesBack(AccordError):
    """A monitor has the run go on from an earlier checkpoint: this loop ends, another one begins.
    Nothing that was sampled and not trained on is of use."""

    def __init__(self, cause: str, abandoned: Abandoned) -> None:
        super().__init__(cause)
        self.abandoned = abandoned


class Ending:
    """``problem``: what ends the run where nobody asked for it; the newest state is then saved if
    that takes no longer than ``keep_s`` seconds."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.hurried = asyncio.Event()  # it must not wait long for the step under way
        self.problem: Resumable | None = None
        self.keep_s = 0.0

    def now(self) -> None:
        self.hurried.set()
        self.asked.set()

    def because(self, problem: Resumable, keep_s: float) -> None:
        """Only the first counts."""
        if self.problem is None:
            self.problem, self.keep_s = problem, keep_s
        self.now()
