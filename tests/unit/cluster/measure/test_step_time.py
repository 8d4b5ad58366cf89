"""The step-time model against event simulations of the bounded pipeline."""

from __future__ import annotations

import pytest

from cluster.measure.step_time import (
    StepTimes,
    ideal_step,
    learner_share,
    needed_bound,
    predict,
    sample_latency,
    workers_for,
)


def balanced(slots_over_samples: float, unit: float = 1.0, **more: float) -> StepTimes:
    """Generation and training equally long, S / B slots a sample of a step."""
    slots = round(64 * slots_over_samples)
    sample_s = sample_latency(unit, slots, 64)
    return StepTimes(generate_s=unit, learn_s=unit, sample_s=sample_s, **more)


# Utilisation of generation, simulated with lognormal lengths of coefficient of variation 1.
SIMULATED = [
    (1.0, 1, 0.71, 0.06),
    (1.0, 2, 0.99, 0.02),
    (1.0, 3, 1.0, 0.01),
    (4.0, 1, 0.31, 0.02),
    (4.0, 2, 0.50, 0.01),
    (4.0, 3, 0.70, 0.01),
    (4.0, 4, 0.90, 0.01),
    (4.0, 5, 0.995, 0.01),
    (4.0, 8, 1.0, 0.01),
    (0.25, 1, 0.90, 0.11),  # at the knee: the model is up to 20 % too fast there
    (0.25, 2, 1.0, 0.01),
]


@pytest.mark.parametrize(("ratio", "bound", "busy", "tolerance"), SIMULATED)
def test_utilisation_is_that_of_the_simulation(
    ratio: float, bound: int, busy: float, tolerance: float
) -> None:
    found = predict(balanced(ratio), bound)
    assert found.generation_busy == pytest.approx(busy, abs=tolerance)
    assert found.learner_busy == pytest.approx(busy, abs=tolerance)


@pytest.mark.parametrize(("bound", "simulated"), [(1, 0.809), (2, 0.500), (3, 0.357), (4, 0.277)])
def test_step_time_that_the_bound_limits(bound: int, simulated: float) -> None:
    found = predict(balanced(4.0, unit=0.25), bound)
    assert found.step_s == pytest.approx(simulated, rel=0.035)
    assert found.bottleneck == "staleness"


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0, 2.0, 4.0])
def test_the_needed_bound_costs_nothing_and_a_smaller_one_may(ratio: float) -> None:
    times = balanced(ratio)
    bound = needed_bound(round(64 * ratio), 64)
    assert predict(times, bound).step_s == pytest.approx(ideal_step(times), rel=0.01)
    if ratio >= 2:
        assert predict(times, bound - 2).step_s > 1.1 * ideal_step(times)


def test_needed_bound_rounds_up() -> None:
    assert [needed_bound(s, 64) for s in (16, 64, 65, 256)] == [2, 2, 3, 5]


def test_bound_zero_is_the_sum_with_its_tail() -> None:
    times = StepTimes(
        generate_s=2.0, learn_s=3.0, sample_s=1.0, publish_s=0.25, score_s=0.5, tail=1.5
    )
    found = predict(times, 0)
    assert found.step_s == pytest.approx(1.5 * 2.0 + 0.5 + 3.0 + 0.25)
    assert found.bottleneck == "staleness"
    assert found.learner_busy == pytest.approx(3.0 / 6.75)


@pytest.mark.parametrize(
    ("times", "bottleneck", "step_s"),
    [
        (StepTimes(generate_s=4, learn_s=1, sample_s=1, generation_stall_s=0.5), "generation", 4.5),
        (StepTimes(generate_s=1, learn_s=4, sample_s=1, learner_stall_s=0.5), "learner", 4.5),
        (StepTimes(generate_s=1, learn_s=1, sample_s=1, scoring_s=6), "scoring", 6),
        (StepTimes(generate_s=1, learn_s=1, sample_s=1, score_s=8), "staleness", 4),
        (StepTimes(generate_s=3, learn_s=3, sample_s=1, shared_s=3.5), "cores", 3.5),
    ],
)
def test_the_slowest_limit_is_named(times: StepTimes, bottleneck: str, step_s: float) -> None:
    found = predict(times, 2)
    assert (found.bottleneck, found.step_s) == (bottleneck, pytest.approx(step_s))


def test_workers_that_saturate_the_learner() -> None:
    assert workers_for(4.0, 1.0) == 4
    assert workers_for(4.1, 1.0) == 5
    assert workers_for(0.3, 1.0) == 1
    assert learner_share(3.0, 1.0) == pytest.approx(0.25)


@pytest.mark.parametrize("wrong", [{"generate_s": 0.0}, {"learn_s": float("nan")}, {"tail": 0.5}])
def test_impossible_times_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"negative|over 0"):
        StepTimes(**({"generate_s": 1.0, "learn_s": 1.0, "sample_s": 1.0} | wrong))
    with pytest.raises(ValueError, match="bound"):
        predict(balanced(1.0), -1)
