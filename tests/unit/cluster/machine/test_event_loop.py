"""A coroutine from ordinary code, with and without a loop around it."""

from __future__ import annotations

import asyncio
import signal
import threading

import pytest

from cluster.machine.event_loop import StopSwitch, in_own_thread, run_coroutine


async def answer() -> str:
    await asyncio.sleep(0)
    return threading.current_thread().name


async def fails() -> None:
    raise KeyError("inside")


def test_without_a_loop_it_runs_here_and_within_one_in_a_thread() -> None:
    assert run_coroutine(answer()) == threading.current_thread().name

    async def cell() -> str:
        return run_coroutine(answer())

    assert asyncio.run(cell()) == "accord-loop"


def test_what_it_raises_comes_through() -> None:
    async def cell() -> None:
        run_coroutine(fails())

    for call in (lambda: run_coroutine(fails()), lambda: asyncio.run(cell())):
        with pytest.raises(KeyError, match="inside"):
            call()


def test_an_interrupt_raised_by_the_work_ends_the_loop_in_good_order(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ended = []

    async def beside() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("beside")

    async def work() -> None:
        tasks.append(asyncio.create_task(beside()))
        await asyncio.sleep(0)
        raise KeyboardInterrupt

    async def cell() -> None:
        with pytest.raises(KeyboardInterrupt):
            run_coroutine(work())

    tasks: list[asyncio.Task[None]] = []
    asyncio.run(cell())
    assert ended == ["beside"]
    assert tasks[0].cancelled()
    assert capsys.readouterr().err == ""  # the thread shows nobody the interrupt as its own failure


async def until_stopped(stop: StopSwitch, begun: threading.Event) -> str:
    stopped = asyncio.Event()
    with stop.bound(stopped.set):
        begun.set()
        await stopped.wait()
    return "stopped"


@pytest.mark.parametrize("in_a_loop", [False, True])
def test_an_interrupt_asks_for_a_stop(in_a_loop: bool) -> None:
    stop, begun = StopSwitch(), threading.Event()

    def interrupt() -> None:
        begun.wait(10)
        signal.raise_signal(signal.SIGINT) if not in_a_loop else signal.pthread_kill(
            main, signal.SIGINT
        )

    main = threading.main_thread().ident or 0
    threading.Thread(target=interrupt).start()

    async def cell() -> str:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a notebook
        return run_coroutine(until_stopped(stop, begun), stop)

    before = signal.getsignal(signal.SIGINT)
    try:
        found = asyncio.run(cell()) if in_a_loop else run_coroutine(until_stopped(stop, begun))
    finally:
        signal.signal(signal.SIGINT, before)
    assert found == "stopped"


def test_an_interrupt_without_a_switch_cancels() -> None:
    begun = threading.Event()

    async def forever() -> None:
        begun.set()
        await asyncio.sleep(60)

    def interrupt() -> None:
        begun.wait(10)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    async def cell() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Thread(target=interrupt).start()
        run_coroutine(forever())

    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt):
            asyncio.run(cell())
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_wish_uttered_before_the_work_begins_is_heard() -> None:
    stop = StopSwitch()
    stop.ask()
    assert run_coroutine(until_stopped(stop, threading.Event()), stop) == "stopped"


def test_a_call_that_hangs_in_its_own_thread_does_not_hold_up_the_end_of_the_loop() -> None:
    hangs = threading.Event()

    async def scenario() -> int:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(in_own_thread(hangs.wait), 0.01)
        with pytest.raises(ZeroDivisionError):
            await in_own_thread(lambda: 1 // 0)
        return await in_own_thread(lambda: 7)

    assert asyncio.run(scenario()) == 7  # with asyncio.to_thread, this would never end
    hangs.set()
