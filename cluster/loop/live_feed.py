"""Every two seconds, from the start of the roles to their end: look at the run, show what is seen.

A task of its own beside the controller. It only reads what controller and pool know, and lets files
and gauges be written on another thread, so a slow disk holds up no step.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence

from cluster.contracts.errors import AccordError
from cluster.contracts.live import LIVE_EVERY_S, LiveView
from cluster.contracts.protocols import Clock
from cluster.loop.live import LiveMeter, LoopFacts, PoolFacts
from cluster.loop.outages import Outage

Show = Callable[[LiveView], None]
PULSE_TIMEOUT_S = 60.0


class LiveFeed:
    """``shows``: where views go. ``pulse``: returns when the learner's process has answered. As a
    ``Sink`` it gets the numbers of each step."""

    def __init__(
        self,
        meter: LiveMeter,
        loop: Callable[[], LoopFacts],
        pool: Callable[[], PoolFacts],
        shows: Sequence[Show],
        clock: Clock,
        event: Callable[..., None],
        pulse: Callable[[], Awaitable[None]] | None = None,
        time_of_day: Callable[[], float] = time.time,
    ) -> None:
        self._meter = meter
        self._loop, self._pool = loop, pool
        self._shows = shows
        self._clock = clock
        self._event = event
        self._pulse = pulse
        self._time_of_day = time_of_day
        self._numbers: Mapping[str, float] = {}
        self._learner_heard: float | None = None
        self._outages: defaultdict[str, Outage] = defaultdict(Outage)
        self._showing = threading.Lock()  # the last view may come while one is being written

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._numbers = dict(numbers)

    def close(self) -> None: ...

    async def run(self) -> None:
        """Until it is cancelled; shows once more before it ends."""
        listener = asyncio.ensure_future(self._listen())
        try:
            while True:
                await asyncio.to_thread(self._show, self.look())
                await self._clock.sleep(LIVE_EVERY_S)
        finally:
            listener.cancel()
            self._show(self.look())

    def look(self) -> LiveView:
        return self._meter.view(
            self._clock.now(),
            self._time_of_day(),
            self._loop(),
            self._pool(),
            self._learner_heard,
            self._numbers,
        )

    def _show(self, view: LiveView) -> None:
        with self._showing:
            for show in self._shows:
                name = type(show).__name__
                try:
                    show(view)
                except Exception as problem:  # to be seen must not stop a run
                    if self._outages[name].fails():
                        self._event("live_failed", sink=name, cause=repr(problem))
                else:
                    if failures := self._outages[name].works():
                        self._event("live_recovered", sink=name, failures=failures)

    async def _listen(self) -> None:
        while True:
            await self.listen_once()
            await self._clock.sleep(LIVE_EVERY_S)

    async def listen_once(self) -> None:
        """Ask the learner's process for an answer, and note when it came."""
        if self._pulse is None:
            return
        # One that does not answer: its age says so, and who waits for its step ends it.
        with contextlib.suppress(AccordError, TimeoutError):
            await asyncio.wait_for(self._pulse(), PULSE_TIMEOUT_S)
            self._learner_heard = self._clock.now()
