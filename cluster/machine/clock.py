"""The clock of a run; the simulation has one of its own."""

from __future__ import annotations

import asyncio
import time

import psutil


def command_began() -> float:
    """When this process was started, in seconds of ``time.monotonic``."""
    return time.monotonic() - (time.time() - psutil.Process().create_time())


class MonotonicClock:
    def now(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
