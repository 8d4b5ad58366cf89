"""What counts as a standstill, what it waits for, and when the run is ended."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from cluster.loop.live import LiveMeter, LoopFacts, PoolFacts
from cluster.loop.watchdog import OwnDeadlines, Watchdog, report, waits_for
from tests.unit.cluster.loop.test_live import look, loop_facts, pool_facts, worker

OWN = OwnDeadlines(
    learner_start_s=180,
    step_s=1800,
    weights_s=120,
    sampling_s=60,
    workers_s=0,
    outage_s=300,
    evaluation_s=1200,
    min_workers=1,
)
RUNNING = loop_facts(waits={"groups": 1.0})


def under_way(*names: str, **changes: Any) -> LoopFacts:
    return replace(RUNNING, under_way=names, **changes)


BUSY = pool_facts(worker(unfinished=2, generated_tokens=5))


@pytest.mark.parametrize(
    ("loop", "pool", "key", "limit_s"),
    [
        (under_way("step"), BUSY, "learner.step_timeout_s", 1800),
        (under_way("step", "broadcast"), BUSY, "learner.step_timeout_s", 1800),
        (under_way("successor"), BUSY, "learner.start_timeout_s", 180),
        (under_way("snapshot"), BUSY, "learner.step_timeout_s", 1800),
        (under_way(step=10), BUSY, "learner.step_timeout_s", 1800),
        (under_way("save"), BUSY, "rollout.stall_timeout_s", 60),
        (under_way(), pool_facts(), "rollout.workers_timeout_s", math.inf),
        (under_way(), pool_facts(worker(scoring=2)), "reward.outage_s", 300),
        (under_way("broadcast"), BUSY, "weights.timeout_s", 120),
        (under_way(), BUSY, "rollout.stall_timeout_s", 60),
    ],
)
def test_a_run_waits_for_one_thing(
    loop: LoopFacts, pool: PoolFacts, key: str, limit_s: float
) -> None:
    wait = waits_for(loop, pool, OWN)
    assert (wait.key, wait.limit_s) == (key, limit_s)


def said(*looks: tuple[float, LoopFacts, PoolFacts]) -> list[str]:
    dog = Watchdog(600, OWN)
    return [dog.look(*one) for one in looks]


def test_it_tells_once_and_ends_the_run_once_at_twice_the_time() -> None:
    times = (0, 599, 600, 900, 1199, 1200, 5000)
    assert said(*((t, RUNNING, BUSY) for t in times)) == [
        *("", "", "stalled", "", "", "stop", ""),
    ]


def test_the_deadlines_of_what_it_waits_for_come_first() -> None:
    step, groups = under_way("step"), RUNNING
    # 1800 s for the step and 60 s for tokens, then the watchdog's own 600 s.
    looks = [(0, step, BUSY), (700, step, BUSY), (1900, groups, BUSY), (2459, groups, BUSY)]
    assert said(*looks, (2460, groups, BUSY)) == ["", "stalled", "", "", "stop"]
    endless = [(t, RUNNING, pool_facts()) for t in (0, 600, 1_000_000)]
    assert said(*endless) == ["", "stalled", ""]


@pytest.mark.parametrize(
    ("loop", "pool"),
    [
        (RUNNING, pool_facts(worker(unfinished=2, generated_tokens=6))),
        (RUNNING, pool_facts(worker(unfinished=2, generated_tokens=5, unfinished_tokens=1))),
        (RUNNING, pool_facts(replace(worker(generated_tokens=5), finished=1))),
        (replace(RUNNING, step=4), BUSY),
        (replace(RUNNING, held=4), BUSY),
        (replace(RUNNING, published=4), BUSY),
        (replace(RUNNING, saved=3), BUSY),
        (replace(RUNNING, ready=2), BUSY),
    ],
)
def test_any_movement_begins_the_count_anew(loop: LoopFacts, pool: PoolFacts) -> None:
    looks = [(0, RUNNING, BUSY), (600, RUNNING, BUSY), (700, loop, pool)]
    assert said(*looks, (1299, loop, pool), (1300, loop, pool)) == [
        *("", "stalled", "", "", "stalled"),
    ]


def test_a_pause_and_the_start_are_no_standstill() -> None:
    paused, starting = replace(RUNNING, paused=True), replace(RUNNING, waits={})
    no_workers = replace(BUSY, wanted=0)
    for facts, pool in ((paused, BUSY), (starting, BUSY), (RUNNING, no_workers)):
        assert said((0, facts, pool), (9999, facts, pool), (10_500, RUNNING, BUSY)) == [""] * 3


def test_workers_that_are_lost_again_and_again_are_a_standstill() -> None:
    def incarnation(number: int) -> PoolFacts:
        return pool_facts(replace(worker(unfinished=2), incarnation=number, version=number % 2))

    looks = [(0.0, RUNNING, BUSY), *((60.0 * n, RUNNING, incarnation(n)) for n in range(1, 40))]
    assert [answer for answer in said(*looks) if answer] == ["stalled", "stop"]


def test_the_report_says_who_waits_for_what() -> None:
    loop = under_way("broadcast", learner="training")
    pool = pool_facts(worker("worker-7", age=44.0, unfinished=2), unplaced=3)
    view = look(LiveMeter("mine"), 650.0, loop, pool, heard=640.0)
    text = report(view, loop, waits_for(loop, pool, OWN), 612.3)
    for words in (
        "Nothing has moved for 612 s",
        "waits for workers to take the weights of version 3",
        "weights.timeout_s, 120 s",
        "under way in the loop: broadcast",
        "learner: training for 650 s, last answered 10 s ago",
        "worker-7: serving, version 3, 2 groups",
        "last answered 44 s ago",
        "3 wait for a worker",
    ):
        assert words in text
