"""The autoscaling policy: a table of decisions, and whole simulated runs without thrashing."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from cluster.loop.autoscale import Autoscaler, Change, Window
from cluster.loop.controller import Controller
from cluster.loop.pool import WorkerPool
from cluster.loop.settings import LoopSettings, PoolSettings
from cluster.loop.timeline import Timeline
from cluster.measure.simulation.loop import VirtualClock, VirtualLoop
from cluster.measure.simulation.record import Record
from cluster.measure.simulation.roles import (
    SimulatedLearner,
    SimulatedPrompts,
    SimulatedWorker,
    Trail,
)
from cluster.measure.simulation.scenario import Lengths, Scenario


def decide(waited: float, idle: float | None, workers: int = 4, windows: int = 3) -> Any:
    scaler = Autoscaler(least=1, most=16)
    change = None
    for number in range(windows):
        window = Window(now=10.0 * number, workers=workers, waited=waited, idle=idle)
        change = scaler.decide(window, workers)
    return change and change.workers


@pytest.mark.parametrize(
    ("waited", "idle", "wanted"),
    [
        (0.0, 0.0, None),  # both busy
        (0.05, 0.15, None),  # both nearly so
        (0.5, 0.0, 8),  # at most twice as many at once
        (0.3, 0.0, 7),
        (0.12, 0.0, 6),
        (0.0, 0.5, 3),
        (0.0, 0.8, 2),
        (0.0, 1.0, 1),
        (0.0, 0.2, None),  # three of four would be busy all the time
        (0.5, 0.5, 5),  # synchronous: each waits for the other
        (0.5, 0.6, None),
        (0.0, None, None),  # workers that do not tell are not taken away
        (0.5, None, 8),
    ],
)
def test_the_table_of_decisions(waited: float, idle: float | None, wanted: int | None) -> None:
    assert decide(waited, idle) == wanted


def test_one_window_decides_nothing_and_a_contradiction_begins_anew() -> None:
    assert decide(0.5, 0.0, windows=2) is None
    scaler = Autoscaler(least=1, most=16)
    for number, waited in enumerate((0.5, 0.5, 0.0, 0.5, 0.5)):
        window = Window(now=10.0 * number, workers=4, waited=waited, idle=0.0)
        assert scaler.decide(window, 4) is None


def test_nothing_is_decided_while_workers_start_or_have_just_come() -> None:
    scaler = Autoscaler(least=1, most=16, cool_down_s=100.0, patience=1)
    window = Window(now=0.0, workers=4, waited=0.5, idle=0.0)
    assert scaler.decide(window, 4) == Change(
        8, "the learner waited for completions 50% of the time"
    )
    for now, serving in ((10.0, 5), (50.0, 8), (99.0, 8)):
        later = Window(now=now, workers=serving, waited=0.5, idle=0.0)
        assert scaler.decide(later, 8) is None
    assert scaler.decide(Window(now=101.0, workers=8, waited=0.5, idle=0.0), 8) is not None


def test_the_bounds_hold_at_once() -> None:
    scaler = Autoscaler(least=2, most=3)
    calm = Window(now=0.0, workers=9, waited=0.0, idle=0.0)
    assert scaler.decide(calm, 9) == Change(3, "within 2 and 3")
    assert scaler.decide(calm, 0) == Change(2, "within 2 and 3")


def simulated(workers: int, learner_share: float, slots: int, steps: int = 100) -> list[int]:
    """The numbers of workers that a whole run asked for, one after the other."""
    scenario = Scenario(
        workers=workers,
        slots=slots,
        length_mean=300.0,
        max_tokens=600,
        length_cv=0.2,
        prompts_per_step=32,
        samples_per_prompt=4,
        bound=2,
        fetch_s=0.5,
        publish_s=0.1,
        score_s=0.1,
        churn_per_hour=0.0,
        stragglers=0.0,
        seconds=1e6,
    )
    # Of a learner that keeps so many times the workers busy that there are.
    learn_s = scenario.generate_s() * learner_share
    scenario = Scenario(**{**_fields(scenario), "learn_step_s": learn_s})
    loop = VirtualLoop()

    async def run() -> list[int]:
        record = Record(scenario.seconds, scenario.bound)
        trail, clock = Trail(), VirtualClock(loop)
        lengths = Lengths(scenario)
        pool = WorkerPool(
            lambda i, n: SimulatedWorker(i, n, scenario, lengths, record),
            PoolSettings(
                start_timeout_s=600,
                stall_timeout_s=600,
                weights_timeout_s=600,
                max_restarts=3,
            ),
            clock,
            trail.event,
        )
        settings = LoopSettings(
            steps=steps,
            prompts_per_step=scenario.prompts_per_step,
            samples_per_prompt=scenario.samples_per_prompt,
            staleness_bound=scenario.bound,
            workers=workers,
            checkpoint_every=10_000,
            keep_checkpoints=1,
            autoscale=(1, 32),
        )
        learner, prompts = SimulatedLearner(scenario, record), SimulatedPrompts()
        await Controller(settings, prompts, learner, pool, trail, [trail], clock, Timeline()).run()
        await pool.stop()
        return [detail["workers"] for _, kind, detail in trail.rows if kind == "autoscaled"]

    return loop.run(run())


def _fields(scenario: Scenario) -> dict[str, Any]:
    return {name: getattr(scenario, name) for name in type(scenario).__dataclass_fields__}


@pytest.mark.parametrize(
    ("workers", "slots", "learner_share", "least", "most"),
    [
        (2, 8, 0.2, 10, 14),  # ten workers are right: it grows, and stops there
        (2, 8, 1.0, 2, 4),
        (16, 8, 8.0, 2, 6),  # two are right: it shrinks
        (8, 64, 0.2, 8, 16),  # a single completion is what takes long: many more do not help
    ],
)
def test_a_run_finds_its_number_of_workers_and_keeps_it(
    workers: int, slots: int, learner_share: float, least: int, most: int
) -> None:
    wanted = simulated(workers, learner_share, slots)
    assert len(wanted) <= 5, wanted
    steps = [b - a for a, b in itertools.pairwise([workers, *wanted])]
    turns = sum(a * b < 0 for a, b in itertools.pairwise(steps))
    assert turns <= 1, wanted  # at most one correction of an overshoot, no thrashing
    assert least <= (wanted or [workers])[-1] <= most, wanted
