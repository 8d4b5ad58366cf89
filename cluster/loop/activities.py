"""What the loop has begun and not ended, by name: at most one of each at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator
from typing import Any, Literal

Name = Literal[
    "look around",
    "watch",
    "step",
    "ahead",
    "snapshot",
    "save",
    "broadcast",
    "successor",
    "resize",
    "evaluation",
]
BACKGROUND: frozenset[Name] = frozenset({"look around", "watch"})
"""Of a run that rests, nothing else is under way."""


class Activities:
    """The end of any of them, and ``wake``, end the wait for ``news``."""

    def __init__(self) -> None:
        self._tasks: dict[Name, asyncio.Task[Any]] = {}
        self._news = asyncio.Event()

    def begin(self, name: Name, work: Awaitable[Any]) -> None:
        task = asyncio.ensure_future(work)
        task.add_done_callback(lambda _: self._news.set())
        self._tasks[name] = task

    def __contains__(self, name: Name) -> bool:
        return name in self._tasks

    def any_of(self, *names: Name) -> bool:
        return any(name in self._tasks for name in names)

    @property
    def under_way(self) -> tuple[str, ...]:
        """All but those that go on in the background, sorted."""
        return tuple(sorted(self._tasks.keys() - BACKGROUND))

    def get(self, name: Name) -> asyncio.Task[Any] | None:
        return self._tasks.get(name)

    def take(self, name: Name) -> asyncio.Task[Any] | None:
        """It is the caller's from now on, ended or not: its end is no news any more."""
        return self._tasks.pop(name, None)

    def take_ended(self) -> Iterator[tuple[Name, asyncio.Task[Any]]]:
        """Those that have ended. What the caller does with one may take others away."""
        for name in [name for name, task in self._tasks.items() if task.done()]:
            if (task := self.take(name)) is not None:
                yield name, task

    def wake(self) -> None:
        self._news.set()

    async def news(self) -> None:
        """Wait until something has ended, or somebody calls ``wake``."""
        await self._news.wait()
        self._news.clear()

    async def cancel(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
