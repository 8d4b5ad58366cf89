"""Alarms as tables of metrics: what is said, when, once, and what is left unsaid."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from cluster.contracts.config.monitors import MonitorsConfig
from cluster.runs.monitors import AlarmChange, Watch

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
    watch = Watch(MonitorsConfig(**config))
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
LENGTH, REPEATED = "completions/mean_length", "completions/repeated_frac"
REFUSES, APART = "completions/refusal_rate", "rewards/members/disagreement/mean"
MISMATCH, ESS = "sampling/mismatch_kl", "async/ess"
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
        (only(MISMATCH, *[0.2] * 3), [("engine-mismatch", "start", 3)]),
        (only(MISMATCH, *[-0.2] * 3), [("engine-mismatch", "start", 3)]),
        (only(MISMATCH, *[0.09] * 9), []),
        (only(ESS, *[0.29] * 3), [("effective-samples", "start", 3)]),
        (only(ESS, *[0.31] * 9), []),
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
        (only(LENGTH, *[30.0] * 5, *[59.0] * 9), []),
        (only(LENGTH, *[30.0] * 5, *[61.0] * 9), [("length-drift", "start", 8)]),
        (only(LENGTH, *[30.0] * 5, *[14.0] * 9), [("length-drift", "start", 8)]),
        (only(REPEATED, *[0.29] * 9), []),
        (only(REPEATED, 0.31, 0.31, 0.31), [("repetition", "start", 3)]),
        (only(REFUSES, *[0.05] * 5, *[0.24] * 9), []),
        (only(REFUSES, *[0.05] * 5, *[0.26] * 9), [("refusals", "start", 8)]),
        (only(REFUSES, *[0.5] * 5, *[0.1] * 9), [("refusals", "start", 8)]),
        (only(APART, *[0.2] * 5, *[0.39] * 9), []),
        (only(APART, *[0.2] * 5, *[0.41] * 9), [("ensemble-disagreement", "start", 8)]),
    ],
)  # fmt: skip
def test_what_is_said(steps: list[dict[str, float]], expected: list[tuple[str, str, int]]) -> None:
    assert changes(steps) == expected


def test_steps_of_a_single_completion_are_neither_constant_nor_without_signal() -> None:
    watch = Watch(MonitorsConfig(), samples_per_prompt=1)
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
    watch = Watch(MonitorsConfig())
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


# -- the reward rises, another judge's score falls -----------------------------------------------


def evaluated(count: int, held_out: Any, *, reward_rises: bool = True, seed: int = 0) -> list[Any]:
    """Numbers of five steps per evaluation; ``held_out``: of the number of the evaluation."""
    noise, steps = random.Random(seed), []
    for step in range(5 * count):
        score = (0.01 * step if reward_rises else -0.01 * step) + noise.gauss(0, 0.05)
        steps.append({SCORE: score})
        if step % 5 == 4:
            steps[-1]["evaluation/score"] = held_out(step // 5) + noise.gauss(0, 0.03)
    return steps


def rises_then_falls(evaluation: int) -> float:
    return 0.5 + 0.04 * min(evaluation, 8) - 0.04 * max(0, evaluation - 8)


def gaps(steps: list[Any], **config: Any) -> list[tuple[str, str, int]]:
    return [found for found in changes(steps, **config) if found[0].endswith("gap")]


@pytest.mark.parametrize("seed", range(20))
def test_a_held_out_score_that_falls_while_the_reward_rises_is_said_once(seed: int) -> None:
    (found,) = gaps(evaluated(24, rises_then_falls, seed=seed))
    assert found[:2] == ("held-out-gap", "start")
    assert 45 < found[2] <= 90  # the best was at step 45


def test_a_held_out_score_that_rises_levels_off_or_falls_with_the_reward_is_no_gap() -> None:
    def levels_off(evaluation: int) -> float:
        return min(0.8, 0.5 + 0.04 * evaluation)

    for seed in range(20):
        assert gaps(evaluated(24, levels_off, seed=seed)) == []
        assert gaps(evaluated(24, lambda e: 0.5 + 0.02 * e, seed=seed)) == []
        assert gaps(evaluated(24, rises_then_falls, reward_rises=False, seed=seed)) == []


def test_noise_is_no_gap_in_200_random_runs() -> None:
    """200 runs of 24 evaluations without a trend, while the reward rises all the time."""
    alarmed = [seed for seed in range(200) if gaps(evaluated(24, lambda e: 0.6, seed=seed))]
    assert len(alarmed) <= 4, alarmed


def test_a_second_judge_of_each_step() -> None:
    def run(seed: int, *, falls: bool) -> list[dict[str, float]]:
        noise = random.Random(seed)
        return [
            {
                SCORE: 0.02 * step + noise.gauss(0, 0.05),
                "rewards/gold/mean": (0.02 * (min(step, 30) - max(0, step - 30)) if falls else 0.3)
                + noise.gauss(0, 0.1),
            }
            for step in range(80)
        ]

    for seed in range(10):
        (found,) = gaps(run(seed, falls=True), second_judge="gold")
        assert found[:2] == ("second-judge-gap", "start")
        assert 30 < found[2] <= 70
    assert gaps(run(0, falls=True)) == []  # it is not named
    alarmed = [s for s in range(100) if gaps(run(s, falls=False), second_judge="gold")]
    assert len(alarmed) <= 2, alarmed


def test_random_figures_around_a_level_raise_no_alarm_in_200_runs() -> None:
    def run(seed: int) -> list[dict[str, float]]:
        noise = random.Random(seed)
        return [
            {
                SCORE: noise.gauss(0.5, 0.2),
                KL: noise.gauss(8, 2),
                ENTROPY: noise.gauss(0.2, 0.03),
                LENGTH: noise.gauss(30, 3),
                REPEATED: abs(noise.gauss(0.05, 0.05)),
                REFUSES: abs(noise.gauss(0.1, 0.04)),
                APART: noise.gauss(0.2, 0.03),
            }
            for _ in range(50)
        ]

    assert [seed for seed in range(200) if changes(run(seed))] == []


def test_an_action_comes_again_only_while_the_alarm_goes_on() -> None:
    actions = {"kl_budget": "raise_kl"}
    steps = only(KL, *[21.0] * 12, *[2.0] * 9, *[21.0] * 3)
    found = watched(steps, actions=actions, again_after=5)
    assert [(c.change, c.step, c.action, c.since) for c in found] == [
        ("start", 3, "raise_kl", 0),
        ("again", 8, "raise_kl", 0),
        ("end", 15, "warn", 0),
        ("start", 24, "raise_kl", 21),
    ]


def test_the_start_stays_the_measure_after_a_rollback() -> None:
    watch = Watch(MonitorsConfig())
    for step in range(1, 6):
        watch.check(step, {LENGTH: 30.0})
    watch.begin_anew()
    found = [watch.check(step, {LENGTH: 90.0}) for step in range(6, 9)]
    assert [len(changes) for changes in found] == [0, 0, 1]
