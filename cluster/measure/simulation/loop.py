"""An asyncio event loop on virtual time: when nothing can run, the clock jumps to the next timer.

Code written for asyncio runs unchanged, in order of time and then of scheduling: the same program
gives the same order of events each time. There is no file, socket or thread in it.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, TypeVar

from cluster.contracts.errors import Fatal

T = TypeVar("T")
_FEW = 1000  # cancelled timers that are not worth clearing out


class VirtualLoop(asyncio.AbstractEventLoop):
    """What tasks, futures, timeouts, locks and events need of a loop. Time starts at 0 seconds."""

    def __init__(self) -> None:
        self._now = 0.0
        self._ready: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._number = 0
        self._cancelled = 0
        self._problem: BaseException | None = None
        self.handled = 0  # callbacks run

    def time(self) -> float:
        return self._now

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_at(  # type: ignore[override]
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self._number += 1
        heapq.heappush(self._timers, (when, self._number, handle))
        return handle

    def call_later(  # type: ignore[override]
        self,
        delay: float,
        callback: Callable[..., object],
        *args: Any,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(  # type: ignore[override]
        self,
        coro: Coroutine[Any, Any, T],
        *,
        name: str | None = None,
        context: Context | None = None,
    ) -> asyncio.Task[T]:
        return asyncio.Task(coro, loop=self, name=name, context=context)

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return asyncio._get_running_loop() is self

    def is_closed(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Nobody would read a log: what went wrong in a callback ends ``run``."""
        self._problem = self._problem or context.get("exception") or Fatal(context["message"])

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        self._cancelled += 1
        if self._cancelled > _FEW and 2 * self._cancelled > len(self._timers):
            self._timers = [entry for entry in self._timers if not entry[2].cancelled()]
            heapq.heapify(self._timers)
            self._cancelled = 0

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """Run ``main`` and what it starts. Raises Fatal when everything waits in vain."""
        asyncio._set_running_loop(self)
        try:
            task = self.create_task(main)
            while not task.done():
                self._turn()
            return task.result()
        finally:
            asyncio._set_running_loop(None)

    def _turn(self) -> None:
        ready = self._ready
        if not ready:
            self._jump()
        while ready:
            handle = ready.popleft()
            if not handle.cancelled():
                self.handled += 1
                handle._run()
        if self._problem is not None:
            raise self._problem

    def _jump(self) -> None:
        """To the next moment at which a timer is due; all timers of that moment are ready then."""
        timers = self._timers
        while timers and timers[0][2].cancelled():
            heapq.heappop(timers)
            self._cancelled -= 1
        if not timers:
            raise Fatal(f"at {self._now:.3f} s of virtual time everything waits for nothing")
        self._now = max(self._now, timers[0][0])
        while timers and timers[0][0] <= self._now:
            _, _, handle = heapq.heappop(timers)
            if handle.cancelled():
                self._cancelled -= 1
            else:
                self._ready.append(handle)


class VirtualClock:
    """``cluster.contracts.protocols.Clock`` of a virtual loop."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def now(self) -> float:
        return self._loop.time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
