"""Alarms as tables of metrics: what is said, when, once, and what is left unsaid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from cluster.contracts.config.alarms import AlarmsConfig
from cluster.runs.alarms import AlarmChange, Watch

# Metrics of a healthy step; a table row changes what it is about.
HEALTHY = {
    "objective/scores": 0.5,
    "objective/kl": 2.0,
    "policy/entropy": 0.2,
    "rewards/std": 0.5,
    "rewards/min": -1.0,
    "rewards/max": 2.0,
    "rewards/zero_std_frac": 0.1,
    "completions/clipped_ratio": 0.0,
    "completions/mean_length": 30.0,
}


def watched(steps: Sequence[dict[str, float]], **config: Any) -> list[AlarmChange]:
    watch = Watch(AlarmsConfig(**config))
    return [
        change
        for step, numbers in enumerate(steps, start=1)
        for change in watch.check(step, {**HEALTHY, **numbers})
    ]


def changes(steps: Sequence[dict[str, float]], **config: Any) -> list[tuple[str, str, int]]:
    return [(c.alarm, c.change, c.step) for c in watched(steps, **config)]


def only(name: str, *values: float) -> list[dict[str, float]]:
    return [{name: value} for value in values]


ENTROPY, KL, SCORE = "policy/entropy", "objective/kl", "objective/scores"
EQUAL, CUT = "rewards/zero_std_frac", "completions/clipped_ratio"


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([{}] * 50, []),
        # Two steps are not enough, three in a row are.
        (only(EQUAL, 0.98, 0.98, 0.1, 0.98, 0.98, 0.1), []),
        (only(EQUAL, *[0.98] * 6), [("no-learning-signal", "start", 3)]),
        # 0.8 is neither outside (0.9) nor well inside (under 0.72): one episode.
        (only(EQUAL, *[0.98] * 3, *[0.8] * 9, *[0.98] * 9), [("no-learning-signal", "start", 3)]),
        (
            only(EQUAL, *[0.98] * 3, *[0.1] * 3, *[0.98] * 3),
            [
                ("no-learning-signal", "start", 3),
                ("no-learning-signal", "end", 6),
                ("no-learning-signal", "start", 9),
            ],
        ),
        (only(EQUAL, *[1.0] * 4), [("no-learning-signal", "start", 3)]),
        (only(ENTROPY, *[0.2] * 5, 0.1, 0.05, *[0.03] * 3), [("entropy-collapse", "start", 10)]),
        (only(ENTROPY, *[0.2] * 5, *[0.06] * 20), []),
        (only(KL, *[19.0] * 9), []),
        (only(KL, *[21.0] * 9), [("kl-budget", "start", 3)]),
        ([{KL: 21.0, "completions/mean_length": 1000.0}] * 9, []),  # 0.2 nats a token
        ([{KL: 201.0, "completions/mean_length": 1000.0}] * 3, [("kl-budget", "start", 3)]),
        (only(SCORE, *[0.5] * 9, 2.1), [("reward-jump", "start", 10)]),
        (only(SCORE, *[0.5] * 9, -1.1), [("reward-jump", "start", 10)]),
        (only(SCORE, *[0.5] * 9, 1.9), []),
        (only(SCORE, *[i / 10 for i in range(60)]), []),  # steady learning
        (
            only(SCORE, *[0.5] * 9, *[3.0] * 20),
            [("reward-jump", "start", 10), ("reward-jump", "end", 18)],
        ),
        # The first success of a sparse reward is no jump.
        (
            [{SCORE: 0.0, "rewards/std": 0.0, "rewards/max": 0.1, "rewards/min": 0.0}] * 5
            + [{SCORE: 0.02, "rewards/std": 0.14, "rewards/max": 1.0, "rewards/min": 0.0}],
            [],
        ),
        # A constant reward is said once, not also as groups without a signal.
        (
            [{"rewards/min": 1, "rewards/max": 1, "rewards/std": 0, EQUAL: 1, SCORE: 1}] * 9,
            [("constant-reward", "start", 4)],  # equal to the step before, from the second step
        ),
        (only(CUT, *[0.5] * 9), []),
        (only(CUT, *[0.6] * 9), [("clipped-completions", "start", 3)]),
    ],
)  # fmt: skip
def test_what_is_said(steps: list[dict[str, float]], expected: list[tuple[str, str, int]]) -> None:
    assert changes(steps) == expected


def test_steps_of_a_single_completion_are_neither_constant_nor_without_signal() -> None:
    watch = Watch(AlarmsConfig(), samples_per_prompt=1)
    for step in range(9):
        score = 0.1 * step
        one = {SCORE: score, "rewards/min": score, "rewards/max": score, "rewards/std": 0.0}
        found = watch.check(step, {**HEALTHY, **one, EQUAL: 1.0})
        assert [change for change in found if change.alarm != "reward-jump"] == []


def test_the_run_that_ended_at_kl_521_with_entropy_0_009_is_not_silent() -> None:
    """KL grows by half at each step from 0.5, entropy falls by a quarter from 0.22."""
    steps = [{KL: min(521.0, 0.5 * 1.5**i), ENTROPY: max(0.009, 0.22 * 0.75**i)} for i in range(40)]
    found = watched(steps)
    assert [(c.alarm, c.change) for c in found] == [
        ("entropy-collapse", "start"),
        ("kl-budget", "start"),
    ]
    assert all(c.step < 20 for c in found)
    assert "nats per token" in found[0].text
    assert "over the budget of 20" in found[1].text


@pytest.mark.parametrize(
    ("key", "steps"),
    [
        ("zero_std_frac", only(EQUAL, *[1.0] * 9)),
        ("entropy_share", only(ENTROPY, *[0.2] * 5, *[0.001] * 9)),
        ("kl_budget", only(KL, *[900.0] * 9)),
        ("reward_jump", only(SCORE, *[0.5] * 9, 99.0)),
        ("clipped_ratio", only(CUT, *[1.0] * 9)),
    ],
)
def test_zero_switches_one_alarm_off(key: str, steps: list[dict[str, float]]) -> None:
    assert changes(steps)
    assert changes(steps, **{key: 0}) == []


def test_all_can_be_switched_off() -> None:
    assert changes(only(KL, *[900.0] * 9), enabled=False) == []


def test_patience_is_a_setting() -> None:
    assert changes(only(KL, *[900.0] * 9), patience=5) == [("kl-budget", "start", 5)]


def test_a_step_without_the_metric_neither_begins_nor_ends_anything() -> None:
    watch = Watch(AlarmsConfig())
    found = [watch.check(step, {"time/step": 1.0}) for step in range(9)]
    assert found == [[]] * 9


def test_a_healthy_run_of_the_quickstart_raises_none() -> None:
    """The metrics of a real run (every fourth step of 60): score, deviation, entropy, KL."""
    rows = [
        (0.028, 0.902, 0.220, 0.000), (0.058, 0.949, 0.217, -0.015), (0.625, 0.877, 0.187, 0.383),
        (0.758, 0.734, 0.161, 1.115), (1.151, 0.601, 0.156, 2.750), (1.268, 0.383, 0.140, 2.489),
        (1.227, 0.516, 0.129, 2.542), (1.274, 0.541, 0.131, 2.712), (1.307, 0.367, 0.116, 2.845),
        (1.351, 0.414, 0.114, 2.809), (1.372, 0.337, 0.123, 8.440), (1.394, 0.370, 0.125, 2.838),
        (1.345, 0.547, 0.116, 3.685), (1.372, 0.379, 0.111, 3.080), (1.380, 0.411, 0.120, 3.417),
    ]  # fmt: skip
    steps = [{SCORE: s, "rewards/std": d, ENTROPY: e, KL: kl} for s, d, e, kl in rows]
    assert changes(steps) == []
