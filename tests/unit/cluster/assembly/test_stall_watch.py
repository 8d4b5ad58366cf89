"""A run that stands still says why and then ends: the real controller, a clock of our own."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from cluster.assembly.stall_watch import Stalled, StallWatch, processes
from cluster.contracts.records import StepInput, StepResult
from cluster.loop.live import LiveMeter
from cluster.loop.live_feed import LiveFeed
from cluster.loop.watchdog import OwnDeadlines
from tests.unit.cluster.loop.test_controller import (
    FakeLearner,
    RealClock,
    World,
    build,
    drive,
    events,
)

OWN = OwnDeadlines(
    learner_start_s=0,
    step_s=0,
    weights_s=0,
    sampling_s=0,
    workers_s=0,
    outage_s=0,
    min_workers=1,
    evaluation_s=1200,
)


class Hanging(FakeLearner):
    """Its sixth step, after the checkpoint of the fourth, never ends."""

    def __init__(self) -> None:
        super().__init__(seconds=0.002)
        self.hangs = asyncio.Event()

    async def step(self, batch: StepInput) -> StepResult:
        if batch.step == 5:
            self.hangs.set()
            await asyncio.sleep(3600)
        return await super().step(batch)

    async def snapshot(self) -> int:
        if self.hangs.is_set():
            await asyncio.sleep(3600)
        return await super().snapshot()

    async def stacks(self) -> str:
        return "thread MainThread\n  in backward"


class Silent:
    async def stacks(self) -> str:
        await asyncio.sleep(3600)
        return ""


class Gone:
    async def stacks(self) -> str:
        raise ConnectionError("the process has ended")


class FastClock:
    """Once the learner hangs, time passes with each sleep."""

    def __init__(self, hangs: asyncio.Event) -> None:
        self.time, self._hangs = 0.0, hangs

    def now(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        await self._hangs.wait()
        await asyncio.sleep(0.001)
        self.time += seconds


def test_a_run_that_stands_still_says_why_and_ends_resumable(tmp_path: Path) -> None:
    async def scenario() -> Any:
        learner = Hanging()
        controller, pool, run, _ = build(tmp_path, World(), learner)
        feed = LiveFeed(LiveMeter("run"), controller.facts, pool.facts, [], RealClock(), run.event)
        clock = FastClock(learner.hangs)

        watch = StallWatch(
            timeout_s=600,
            own=OWN,
            folder=run.path,
            loop=controller.facts,
            pool=pool.facts,
            look=feed.look,
            processes=lambda: processes(learner, pool.handles(), [Silent(), Gone()]),
            event=run.event,
            end=lambda problem, _: controller.end(problem, 0.1),
            clock=clock,
            answer_s=0.1,
        )
        task = asyncio.ensure_future(watch.run())
        try:
            with pytest.raises(Stalled, match=r"nothing has moved for 12\d\d s"):
                await drive(controller, pool)
        finally:
            task.cancel()
        return run

    run = asyncio.run(scenario())
    told = [event for event in events(run) if event["kind"] == "stalled"]
    assert [600 <= told[0]["idle_s"] < 700, 1200 <= told[1]["idle_s"] < 1300] == [True, True]
    assert {event["waits_for"] for event in told} == {"learner step 5"}
    text = Path(told[0]["file"]).read_text()
    for words in (
        "The run waits for learner step 5",
        "learner: training",
        "w0: serving, version 5",
        "thread MainThread\n  File",
        "in step",  # the driver's task that waits for the learner
        "== driver ==",
        "== learner ==\nthread MainThread\n  in backward",
        "== reward service 0 ==\ndid not answer within 0 s",
        "== reward service 1 ==\ncannot be asked: the process has ended",
    ):
        assert words in text
    assert run.checkpoints.newest_good().state.step == 4
