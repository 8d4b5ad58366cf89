"""Fault 9 on the real controller and pool: Ray's head answers no more. No Ray."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.assembly.head_watch import HeadLost, HeadWatch
from tests.unit.cluster.loop.test_controller import FakeLearner, World, build, drive, events

LOOK_S, DEADLINE_S = 0.02, 0.2


class Head:
    def __init__(self) -> None:
        self.asked = 0
        self.misses: list[int] = []  # single calls that are not answered
        self.gone = threading.Event()
        self.how: Callable[[], bool] = lambda: False

    def answers(self) -> bool:
        self.asked += 1
        return self.how() if self.gone.is_set() or self.asked in self.misses else True


def refuse() -> bool:
    raise ConnectionError("refused")


def hang() -> bool:
    return threading.Event().wait(30)  # far beyond every deadline of this test


class Saving(FakeLearner):
    """``hangs``: it cannot save any more, as what it needs went with the head."""

    def __init__(self, head: Head, *, hangs: bool) -> None:
        super().__init__(seconds=0.002)
        self.head, self.hangs = head, hangs

    async def step(self, batch: Any) -> Any:
        result = await super().step(batch)
        if batch.step == 4:  # step 4 is saved already, step 5 is not
            self.head.gone.set()
        return result

    async def snapshot(self) -> int:
        if self.hangs and self.head.gone.is_set():
            await asyncio.sleep(3600)
        return await super().snapshot()


async def watched(tmp_path: Path, head: Head, learner: FakeLearner, steps: int) -> Any:
    controller, pool, run, _ = build(tmp_path, World(), learner, steps=steps)
    watch = HeadWatch(
        head.answers,
        lambda: controller.end(HeadLost("the cluster's head is lost"), 0.5),
        run.event,
        LOOK_S,
        DEADLINE_S,
    )
    task = asyncio.ensure_future(watch.run())
    try:
        with pytest.raises(HeadLost, match="head is lost"):
            await drive(controller, pool)
    finally:
        task.cancel()
    return run


@pytest.mark.parametrize("how", [refuse, hang, lambda: False], ids=["refuses", "hangs", "no"])
def test_09_the_head_is_lost_and_the_newest_state_is_saved(
    tmp_path: Path, how: Callable[[], bool]
) -> None:
    head = Head()
    head.how = how
    learner = Saving(head, hangs=False)
    run = asyncio.run(watched(tmp_path, head, learner, steps=100_000))
    saved = run.checkpoints.newest_good().state
    assert saved.step == learner.version > 4  # all that was trained
    assert [e["unanswered"] for e in events(run) if e["kind"] == "head_lost"] == [3]


def test_09_the_head_is_lost_with_the_learner_and_the_newest_checkpoint_stays(
    tmp_path: Path,
) -> None:
    head = Head()
    run = asyncio.run(watched(tmp_path, head, Saving(head, hangs=True), steps=100_000))
    assert run.checkpoints.newest_good().state.step == 4


def test_09_the_loss_is_noticed_while_the_event_loop_waits_for_the_head_itself() -> None:
    """As when a lost role is to be started again, which Ray does on its head."""
    head, noticed, lost = Head(), threading.Event(), asyncio.Event()

    async def scenario() -> None:
        watch = HeadWatch(
            head.answers, lost.set, lambda *_, **__: None, LOOK_S, DEADLINE_S, noticed.set
        )
        task = asyncio.ensure_future(watch.run())
        await asyncio.sleep(0)
        head.gone.set()
        assert noticed.wait(20)  # on the event loop
        assert not lost.is_set()
        await asyncio.wait_for(task, 20)
        assert lost.is_set()

    asyncio.run(scenario())


def test_09_a_watch_that_is_ended_looks_no_more() -> None:
    head = Head()

    async def scenario() -> None:
        watch = HeadWatch(head.answers, lambda: None, lambda *_, **__: None, 0.001)
        task = asyncio.ensure_future(watch.run())
        while head.asked < 3:
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(scenario())
    deadline = time.monotonic() + 20
    while any(t.name == "accord-own-thread" for t in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_09_single_calls_without_an_answer_are_no_lost_head(tmp_path: Path) -> None:
    head = Head()
    head.misses = [2, 3, 6, 8, 9]
    head.how = refuse

    async def scenario() -> None:
        lost: list[int] = []
        watch = HeadWatch(head.answers, lambda: lost.append(1), lambda *_, **__: None, 0.001)
        task = asyncio.ensure_future(watch.run())
        while head.asked < 12:
            await asyncio.sleep(0.001)
        assert lost == []
        head.gone.set()
        await asyncio.wait_for(task, 20)
        assert lost == [1]

    asyncio.run(scenario())
