"""When groups are admitted: hand-worked times, and the real loop on virtual time."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from cluster.loop.pacing import Pacer
from cluster.measure.simulation.scenario import Scenario
from cluster.measure.simulation.simulate import simulate


def measured(latency_s: float, step_s: float) -> Pacer:
    """After five steps of ``step_s`` whose groups took ``latency_s``; the learner began the sixth,
    number 5, at 100 s."""
    pacer = Pacer()
    at = 100.0 - 5 * step_s
    for step in range(5):
        pacer.admitted(step, at - latency_s)
        pacer.complete(step, at)
        pacer.step_began(at)
        at += step_s
        pacer.step_ended(at)
    pacer.step_began(100.0)
    return pacer


def test_nothing_is_held_back_until_times_are_known() -> None:
    pacer = Pacer()
    assert pacer.due(7, 1.0) == 1.0
    assert pacer.lead_s == 0.0


def test_groups_are_admitted_a_lead_before_their_step() -> None:
    pacer = measured(latency_s=4.0, step_s=10.0)
    # The lead is 4 s and a margin of 0.15 steps; step 6 begins at 110 s, step 7 at 120 s.
    assert pacer.lead_s == pytest.approx(5.5)
    assert pacer.due(6, 101.0) == pytest.approx(104.5)
    assert pacer.due(7, 101.0) == pytest.approx(114.5)
    # A step that takes longer than usual is expected to end now: 115 s, and then 125 s.
    assert pacer.due(6, 115.0) == pytest.approx(109.5)
    assert pacer.due(7, 115.0) == pytest.approx(119.5)


def test_steps_that_were_admitted_together_at_the_start_are_not_measured() -> None:
    pacer = Pacer()
    for step in range(3):
        pacer.admitted(step, 0.0)
    at = 30.0  # all three wait for each other and for the engine's first work
    for step in range(3):
        pacer.complete(step, at)
    for step in range(3, 6):
        pacer.step_began(at)
        pacer.admitted(step, at)
        pacer.complete(step, at + 4.0)
        assert pacer.lead_s == 0.0
        at += 10.0
        pacer.step_ended(at)
    assert pacer.lead_s == pytest.approx(4.0 + 1.5)


def test_a_step_that_is_admitted_beside_those_of_the_start_is_not_measured() -> None:
    pacer = Pacer()
    for step in range(3):
        pacer.admitted(step, 0.0)
    pacer.complete(0, 10.0)
    pacer.step_began(10.0)
    pacer.step_ended(20.0)
    pacer.admitted(3, 20.0)  # beside 1 and 2, which go on until 25 s
    pacer.complete(1, 25.0)
    pacer.complete(2, 25.0)
    pacer.complete(3, 32.0)
    for step in (4, 5):  # alone
        at = 10.0 * step - 15.0
        pacer.step_began(at)
        pacer.step_ended(at + 10.0)
        pacer.admitted(step, at + 10.0)
        assert pacer.lead_s == 0.0
        pacer.complete(step, at + 14.0)
    assert pacer.lead_s == pytest.approx(4.0 + 1.5)


def test_a_learner_that_waits_is_expected_to_begin_now() -> None:
    pacer = measured(latency_s=4.0, step_s=10.0)
    pacer.step_ended(110.0)
    assert pacer.due(6, 112.0) == 112.0
    assert pacer.due(7, 112.0) == pytest.approx(112.0 + 10.0 - 5.5)


def test_slow_workers_are_never_held_back() -> None:
    pacer = measured(latency_s=25.0, step_s=10.0)
    assert pacer.due(7, 100.0) <= 100.0  # 120 - 26.5


def test_one_slow_step_in_ten_counts_and_is_forgotten_later() -> None:
    pacer = measured(latency_s=4.0, step_s=10.0)
    pacer.admitted(6, 100.0)
    pacer.complete(6, 130.0)
    assert pacer.lead_s == pytest.approx(30.0 + 1.5)
    for step in range(7, 17):
        pacer.admitted(step, 200.0)
        pacer.complete(step, 204.0)
    assert pacer.lead_s == pytest.approx(5.5)


def test_the_margin_grows_by_what_the_learner_waited_and_shrinks_again() -> None:
    pacer = measured(latency_s=4.0, step_s=10.0)
    assert pacer.due(6, 100.0) > 100.0  # held back
    pacer.step_ended(110.0)
    pacer.step_began(113.0)  # 3 s too late: 0.3 steps
    assert pacer.lead_s == pytest.approx(4.0 + 10.0 * (0.15 + 0.3))
    for step in range(100):
        pacer.step_ended(123.0 + 10 * step)
        pacer.step_began(123.0 + 10 * step)
    assert pacer.lead_s == pytest.approx(5.5)


def test_a_wait_for_groups_that_were_not_held_back_changes_nothing() -> None:
    pacer = measured(latency_s=4.0, step_s=10.0)
    pacer.step_ended(110.0)
    pacer.step_began(113.0)
    assert pacer.lead_s == pytest.approx(5.5)


def test_the_time_of_a_step_that_failed_does_not_count() -> None:
    pacer = measured(latency_s=4.0, step_s=10.0)
    pacer.step_failed()
    pacer.step_began(500.0)
    pacer.step_ended(510.0)
    assert pacer.lead_s == pytest.approx(5.5)


def test_a_fixed_lead_counts_steps() -> None:
    pacer = Pacer(fixed=1, next_step=3)
    assert pacer.due(4, 9.0) == 9.0
    assert pacer.due(5, 9.0) == math.inf
    pacer.step_began(9.0)
    pacer.step_ended(10.0)
    assert pacer.due(5, 10.0) == 10.0


@pytest.mark.parametrize("length_cv", [0.3, 1.0])
@pytest.mark.parametrize("share", [0.6, 1.4, 2.5])
def test_pacing_costs_no_speed_and_makes_completions_fresher(
    share: float, length_cv: float
) -> None:
    """``share``: the learner's time over the workers'. Some workers are slow, some are lost."""
    scenario = Scenario(
        workers=4, slots=64, tokens_per_s=100, length_mean=200, max_tokens=512, length_cv=length_cv,
        prompts_per_step=32, samples_per_prompt=4, bound=4, publish_s=0.05, fetch_s=0.2,
        pause_s=0.01, score_s=0.1, seconds=300.0, stragglers=0.1, churn_per_hour=4, restart_s=10,
    ).with_learner_share(share)  # fmt: skip
    unpaced = simulate(replace(scenario, lead=scenario.bound)).figures
    paced = simulate(scenario).figures
    assert paced.violations == 0
    assert paced.samples_per_s > 0.97 * unpaced.samples_per_s
    assert paced.token_staleness <= unpaced.token_staleness + 0.02
    if share == 2.5:
        assert paced.token_staleness < 0.75 * unpaced.token_staleness
