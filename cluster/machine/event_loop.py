"""Running a coroutine from ordinary code, also where an event loop runs already (a notebook)."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar, cast

from cluster.machine.signals import (
    WORDS,
    first_acts_second_interrupts,
    in_command,
    listening,
    signal_handlers_kept,
)

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

    @contextmanager
    def bound(self, act: Callable[[], None]) -> Iterator[None]:
        """In the running loop: ``act`` is called in it as soon as somebody asks. Where this is the
        main thread, the first SIGINT or SIGTERM asks; the work may then take its time to end."""
        self._loop, self._act = asyncio.get_running_loop(), act
        if self._asked:
            act()
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        with listening(self.ask, patient=True) if in_command() else _handlers(self._loop, act):
            yield


@contextmanager
def _handlers(loop: asyncio.AbstractEventLoop, act: Callable[[], None]) -> Iterator[None]:
    """In a program that imports Accord: the first signal calls ``act`` in the loop, the second
    interrupts it."""
    handle = first_acts_second_interrupts(act)
    with signal_handlers_kept():
        for number in WORDS:
            loop.add_signal_handler(number, handle)
        try:
            yield
        finally:
            for number in WORDS:
                loop.remove_signal_handler(number)


async def in_own_thread(call: Callable[[], T]) -> T:
    """As `asyncio.to_thread`, for a call that may hang for ever: nobody waits for the thread, also
    not the end of the loop."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()

    def put(result: T | None, problem: BaseException | None) -> None:
        if answer.done():  # nobody waits any more
            return
        if problem is not None:
            answer.set_exception(problem)
        else:
            answer.set_result(cast(T, result))

    def run() -> None:
        result, problem = None, None
        try:
            result = call()
        except BaseException as raised:
            problem = raised
        with suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(put, result, problem)

    threading.Thread(target=run, name="accord-own-thread", daemon=True).start()
    return await answer


def run_coroutine(work: Coroutine[Any, Any, T], stop: StopSwitch | None = None) -> T:
    """``asyncio.run``, or, where a loop runs in this thread already, the same in another thread.

    The caller waits. An interrupt of its waiting asks ``stop``; the second one, or the first where
    there is no ``stop``, cancels the work and is raised.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        if stop is None and in_command():
            return _cancelled_by_signals(work)
        return asyncio.run(work)
    return _in_a_thread(work, stop)


def _cancelled_by_signals(work: Coroutine[Any, Any, T]) -> T:
    """An interrupt raised wherever the loop is just now might be lost in a callback."""

    async def cancellable() -> T:
        loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)

        def cancel() -> None:
            loop.call_soon_threadsafe(task.cancel)

        with listening(cancel):
            await asyncio.wait([task])
        if task.cancelled():
            raise KeyboardInterrupt
        return task.result()

    return asyncio.run(cancellable())


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
        with suppress(KeyboardInterrupt):  # raised by the work: the caller finds it in the task
            loop.run_until_complete(asyncio.wait([task]))
        loop.run_until_complete(_cancel_the_rest())
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        asyncio.set_event_loop(None)
        loop.close()
        ended.set()


async def _cancel_the_rest() -> None:
    rest = asyncio.all_tasks() - {asyncio.current_task()}
    for task in rest:
        task.cancel()
    await asyncio.gather(*rest, return_exceptions=True)
