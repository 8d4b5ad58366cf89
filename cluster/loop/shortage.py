"""While too few workers serve: says what a run waits for, and ends it when that takes too long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from cluster.contracts.errors import WorkersGone
from cluster.contracts.protocols import Clock
from cluster.loop.members import Members

FIRST_WORD_S = 30.0  # with too few workers for so long, the run says what it waits for,
NEXT_WORD_S = 60.0  # and says it again after each of these


class Shortage:
    """``least``: with fewer serving workers there is a shortage. ``limit_s``: the longest one that
    a run bears; 0: any. ``end``: called with what ends the run."""

    def __init__(
        self,
        members: Members,
        least: Callable[[], int],
        limit_s: float,
        clock: Clock,
        event: Callable[..., None],
        end: Callable[[BaseException], None],
    ) -> None:
        self._members = members
        self._least = least
        self._limit_s = limit_s
        self._clock = clock
        self._event = event
        self._end = end
        self._waiting: asyncio.Task[None] | None = None  # while there is one
        self._stopped = False

    def look(self) -> None:
        """To be called after every change of a member or of the number that is wanted."""
        short = self._members.count("serving") < self._least() and not self._stopped
        if short and self._waiting is None:
            self._waiting = asyncio.create_task(self._wait())
        elif not short and self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def stop(self) -> None:
        self._stopped = True
        self.look()

    async def _wait(self) -> None:
        began, limit, word_s = self._clock.now(), self._limit_s, FIRST_WORD_S
        while True:
            due_s = min(word_s, limit) if limit else word_s
            while (left := began + due_s - self._clock.now()) > 0:
                await self._clock.sleep(left)
            serving, least, cause = self._members.count("serving"), self._least(), self._cause()
            if limit and due_s >= limit:
                waited = f"{serving} workers serve, {least} must, for {limit:.0f} s by now"
                self._end(WorkersGone(f"{waited}: {cause}"))
                return
            numbers = {"serving": serving, "min_workers": least, "waited_s": round(due_s)}
            self._event("workers_missing", **numbers, cause=cause)
            word_s = due_s + NEXT_WORD_S

    def _cause(self) -> str:
        waiting = self._members.those("starting", "broken")
        return "; ".join(f"{member.name} waits for {member.waits_for}" for member in waiting)
