"""Waiting no longer than a deadline, in an asyncio program that may itself be held up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")
LATE_S = 5.0


async def within(limit_s: float, work: Awaitable[T]) -> T:
    """What ``work`` answers; raises TimeoutError and cancels it when it has not after ``limit_s``.

    Unlike ``asyncio.wait_for``, it takes an answer that came in time and could not be looked at,
    because this process was busy beyond the limit.
    """
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait([task], timeout=limit_s)
        if not done:  # an answer that lies ready takes a few turns of the loop to come through
            done, _ = await asyncio.wait([task], timeout=min(LATE_S, limit_s))
        if not done:
            raise TimeoutError
        return task.result()
    finally:
        task.cancel()
