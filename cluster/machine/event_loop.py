"""Running a coroutine from ordinary code, also where an event loop runs already (a notebook)."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


class StopSwitch:
    """A wish to stop that any thread may utter, also before there is anything to be stopped."""

    def __init__(self) -> None:
        self._asked = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._act: Callable[[], None] | None = None

    def ask(self) -> None:
        self._asked = True
        if self._loop is not None and self._act is not None:
            with suppress(RuntimeError):  # the loop is closed: it has ended by itself
                self._loop.call_soon_threadsafe(self._act)

    def bind(self, act: Callable[[], None]) -> None:
        """In the running loop: ``act`` is called in it as soon as somebody asks; where this is the
        main thread, SIGINT and SIGTERM ask."""
        self._loop, self._act = asyncio.get_running_loop(), act
        if threading.current_thread() is threading.main_thread():
            for name in (signal.SIGINT, signal.SIGTERM):
                self._loop.add_signal_handler(name, act)
        if self._asked:
            act()


def run_coroutine(work: Coroutine[Any, Any, T], stop: StopSwitch | None = None) -> T:
    """``asyncio.run``, or, where a loop runs in this thread already, the same in another thread.

    The caller waits. An interrupt of its waiting asks ``stop``; the second one, or the first where
    there is no ``stop``, cancels the work and is raised.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    return _in_a_thread(work, stop)


def _in_a_thread(work: Coroutine[Any, Any, T], stop: StopSwitch | None) -> T:
    loop = asyncio.new_event_loop()
    task = loop.create_task(work)
    ended = threading.Event()
    thread = threading.Thread(target=_run, args=(loop, task, ended), name="accord-loop")
    thread.daemon = True
    begun = interrupts = 0
    while not ended.is_set():
        try:
            if not begun:
                begun = 1  # before, since starting it can be interrupted, too
                thread.start()
            ended.wait(0.2)  # a wait without limit cannot be interrupted on every system
        except KeyboardInterrupt:
            interrupts += 1
            if stop is not None and interrupts == 1:
                stop.ask()
            else:
                with suppress(RuntimeError):
                    loop.call_soon_threadsafe(task.cancel)
    if task.cancelled():
        raise KeyboardInterrupt
    return task.result()


def _run(loop: asyncio.AbstractEventLoop, task: asyncio.Task[Any], ended: threading.Event) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_until_complete(asyncio.wait([task]))
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        asyncio.set_event_loop(None)
        loop.close()
        ended.set()
