"""The live view: its arithmetic, its bottleneck, and what a stopped process looks like."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.contracts.errors import Retryable
from cluster.contracts.live import (
    Bottleneck,
    LearnerView,
    LiveView,
    QueueView,
    RewardView,
    StalenessView,
    WeightsView,
    WorkerView,
    read_live,
)
from cluster.contracts.stopwatch import Stopwatch
from cluster.loop.advice import bottleneck
from cluster.loop.live import LiveMeter, LoopFacts, PoolFacts, WorkerFacts
from cluster.loop.live_feed import LiveFeed
from cluster.runs.live_file import LiveFile


def loop_facts(**changes: Any) -> LoopFacts:
    facts = LoopFacts(
        step=3,
        steps=10,
        elapsed_s=30.0,
        learner="waiting",
        learner_since=0.0,
        waits={},
        ready=1,
        missing=3,
        per_step=4,
        published=3,
        held=3,
        sending=False,
        bound=1,
    )
    return replace(facts, **changes)


def worker(name: str = "worker-0", age: float = 0.5, **stats: float) -> WorkerFacts:
    return WorkerFacts(
        name=name,
        incarnation=0,
        status="serving",
        version=3,
        groups=2,
        heard_s_ago=age,
        late_s=age - 1.0,
        finished=0,
        stats=stats,
    )


def pool_facts(*workers: WorkerFacts, **changes: Any) -> PoolFacts:
    return replace(
        PoolFacts(workers=workers, unplaced=0, restarts=0, left=0, score_failures=0), **changes
    )


def look(
    meter: LiveMeter,
    now: float,
    loop: LoopFacts,
    pool: PoolFacts,
    heard: float | None = None,
    numbers: Mapping[str, float] | None = None,
) -> LiveView:
    return meter.view(now, 1_000.0 + now, loop, pool, heard, numbers or {})


def test_waits_add_up_to_the_time_that_passed() -> None:
    waits = Stopwatch(100.0, "groups")
    waits.turn(103.0, "learner")
    waits.turn(105.0, "weights")
    waits.turn(105.5, "groups")
    assert waits.totals(107.0) == {"groups": 4.5, "learner": 2.0, "weights": 0.5}


def test_rates_are_those_of_the_last_ten_seconds() -> None:
    meter = LiveMeter("mine")
    for now, tokens in ((0, 0), (2, 1000), (4, 1000), (6, 1000), (8, 1000), (10, 1000), (12, 1500)):
        facts = pool_facts(worker(generated_tokens=tokens, busy_s=now / 2, unfinished=5, running=3))
        view = look(meter, float(now), loop_facts(), facts)
    # From second 2, when the thousand were there already.
    assert view.workers[0].tokens_per_s == 50.0
    assert view.workers[0].busy == 0.5
    assert (view.workers[0].running, view.workers[0].waiting) == (3, 2)
    assert view.tokens_per_s == 50.0


def test_a_restarted_worker_counts_from_zero_again() -> None:
    meter = LiveMeter("mine")
    look(meter, 0.0, loop_facts(), pool_facts(worker(generated_tokens=9000)))
    again = replace(worker(generated_tokens=40), incarnation=1)
    assert look(meter, 2.0, loop_facts(), pool_facts(again)).workers[0].tokens_per_s == 20.0


def test_shares_say_what_the_run_waited_for() -> None:
    meter = LiveMeter("mine")
    generating, scoring = worker(unfinished=4), worker(unfinished=0, scoring=2)
    look(meter, 0.0, loop_facts(), pool_facts(generating))
    spent = {"groups": 4.0, "learner": 5.0, "weights": 1.0}
    look(meter, 10.0, loop_facts(waits=spent), pool_facts(generating))
    spent = {"groups": 14.0, "learner": 5.0, "weights": 1.0}
    view = look(meter, 20.0, loop_facts(waits=spent), pool_facts(scoring))
    assert view.bottleneck.shares == {
        "rollout": 0.2,
        "reward": 0.5,
        "learner": 0.25,
        "weights": 0.05,
    }
    assert view.bottleneck.stage == "reward"
    # In seconds that the workers tell of, if they tell of any.
    told = worker(unfinished=0, busy_s=1.0, score_s=3.0)
    spent = {"groups": 22.0, "learner": 5.0, "weights": 1.0}
    view = look(meter, 28.0, loop_facts(waits=spent), pool_facts(told))
    assert view.bottleneck.shares["reward"] == pytest.approx(16 / 28, abs=1e-3)
    assert view.bottleneck.shares["rollout"] == pytest.approx(6 / 28, abs=1e-3)
    # An hour later all of that is long past.
    spent = {"groups": 22.0, "learner": 5.0 + 3600.0, "weights": 1.0}
    look(meter, 3600.0, loop_facts(waits=spent), pool_facts(generating))
    spent["learner"] += 10.0
    view = look(meter, 3610.0, loop_facts(waits=spent), pool_facts(generating))
    assert view.bottleneck.shares["learner"] == 1.0


def view_with(shares: Mapping[str, float], **changes: Any) -> LiveView:
    view = LiveView(
        run="mine",
        time=0.0,
        step=3,
        steps=10,
        elapsed_s=30.0,
        workers=(
            WorkerView(name="worker-0", status="serving", busy=0.9),
            WorkerView(name="worker-1", status="serving", busy=0.9),
        ),
        workers_by_status={"serving": 2, "starting": 0},
        learner=LearnerView(state="waiting"),
        rewards=RewardView(waiting=7),
        queue=QueueView(),
        weights=WeightsView(last_s=2.5),
        staleness=StalenessView(bound=1),
        bottleneck=Bottleneck(shares=shares),
        addresses={},
    )
    return replace(view, **changes)


IDLE = (
    WorkerView(name="worker-0", status="serving", busy=0.2),
    WorkerView(name="worker-1", status="serving", busy=0.3),
)
SILENT = (
    WorkerView(name="worker-0", status="serving", busy=0.9),
    WorkerView(name="worker-1", status="serving", heartbeat_age_s=14.2, silent=True),
)


@pytest.mark.parametrize(
    ("view", "stage", "why", "advice"),
    [
        (view_with({"learner": 0.7, "rollout": 0.3}), "learner", "70%", "learner.processes"),
        (
            view_with({"learner": 0.7, "rollout": 0.3}, workers=IDLE),
            "learner",
            "while the learner trains",
            "accord scale mine 1",
        ),
        (view_with({"rollout": 0.8, "learner": 0.2}), "rollout", "80%", "accord scale mine 3"),
        (
            view_with({"rollout": 0.8}, staleness=StalenessView(bound=0)),
            "rollout",
            "waits for completions",
            "staleness.bound=1",
        ),
        (
            view_with({"rollout": 0.8}, workers=SILENT),
            "rollout",
            "worker-1 for 14 s",
            "rollout.stall_timeout_s",
        ),
        (
            view_with({"rollout": 1.0}, workers_by_status={"serving": 0, "starting": 2}),
            "rollout",
            "2 are starting",
            "Wait",
        ),
        (
            view_with({"rollout": 1.0}, workers_by_status={"serving": 0, "starting": 0}),
            "rollout",
            "There are no workers",
            "accord scale mine 1",
        ),
        (view_with({"reward": 0.6, "rollout": 0.4}), "reward", "7 groups", "reward.max_batch"),
        (view_with({"weights": 0.6, "rollout": 0.4}), "weights", "2.5 s", "staleness.bound above"),
        (view_with({}), None, "Starting", ""),
        (
            view_with({}, learner=LearnerView(state="starting")),
            None,
            "the learner",
            "",
        ),
        (
            view_with(
                {"rollout": 1.0},
                learner=LearnerView(state="training", heartbeat_age_s=12.0, silent=True),
            ),
            "learner",
            "not answered for 12 s",
            "stopped",
        ),
    ],
)
def test_the_bottleneck_has_a_name_and_advice(
    view: LiveView, stage: str | None, why: str, advice: str
) -> None:
    found = bottleneck(view)
    assert found.stage == stage
    assert why in found.why
    assert advice in found.advice


def test_live_json_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    meter = LiveMeter("mine", addresses={"page": "http://127.0.0.1:1/?token=x"})
    look(meter, 0.0, loop_facts(), pool_facts(worker(generated_tokens=1)))
    view = look(meter, 2.0, loop_facts(), pool_facts(worker()), 1.0, {"objective/scores": 0.5})
    LiveFile(tmp_path)(view)
    assert read_live(tmp_path) == view
    path = tmp_path / "live.json"
    assert path.stat().st_mode & 0o777 == 0o600
    newer = json.loads(path.read_text()) | {"a key of another release": 1}
    path.write_text(json.dumps(newer))
    assert read_live(tmp_path) == view


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"run": "mine"}', '{"workers": 3}'])
def test_a_damaged_live_json_is_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "live.json").write_text(text)
    assert read_live(tmp_path) is None
    assert read_live(tmp_path / "nowhere") is None


class FakeClock:
    """Time that passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)
        self.time += seconds


async def watched(stopped: str) -> float:
    """Seconds from when a process was stopped until a view calls it silent."""
    clock = FakeClock()
    views: list[LiveView] = []
    answered = {"learner": 0.0, "worker": 0.0}

    def pool() -> PoolFacts:
        age = clock.now() - answered["worker"]
        return pool_facts(worker(age=age))

    async def pulse() -> None:
        if stopped == "learner" and clock.now() > 30.0:
            raise Retryable("the learner does not answer")

    feed = LiveFeed(
        LiveMeter("mine"), loop_facts, pool, [views.append], clock, lambda *_, **__: None, pulse
    )
    seen = None
    for _ in range(60):
        if not (stopped == "worker" and clock.now() > 30.0):
            answered["worker"] = clock.now()
        await feed.listen_once()
        view = feed.look()
        silent = view.learner.silent if stopped == "learner" else view.workers[0].silent
        if silent:
            seen = clock.now()
            break
        await clock.sleep(2.0)
    assert seen is not None, "the stopped process was never called silent"
    return seen - 30.0


@pytest.mark.parametrize("stopped", ["learner", "worker"])
def test_a_stopped_process_shows_within_fifteen_seconds(stopped: str) -> None:
    seconds = asyncio.run(watched(stopped))
    assert 0 < seconds <= 15.0


def test_a_view_that_cannot_be_shown_is_told_once_and_the_rest_goes_on() -> None:
    events: list[str] = []
    views: list[LiveView] = []

    class Broken:
        def __call__(self, view: LiveView) -> None:
            raise OSError("disk full")

    async def scenario() -> None:
        clock = FakeClock()
        feed = LiveFeed(
            LiveMeter("mine"),
            loop_facts,
            lambda: pool_facts(worker()),
            [Broken(), views.append],
            clock,
            lambda kind, **detail: events.append(f"{kind} {detail['sink']} {detail['cause']}"),
        )
        task = asyncio.ensure_future(feed.run())
        while len(views) < 3:
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(scenario())
    assert events == ["live_failed Broken OSError('disk full')"]
    assert len(views) >= 4  # the last one at the end
