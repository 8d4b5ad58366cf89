"""Why and how fast a run ends before its last step."""

from __future__ import annotations

import asyncio

from cluster.contracts.errors import Resumable


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
