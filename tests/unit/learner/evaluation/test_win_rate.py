from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from learner.evaluation.win_rate import length_controlled, outcomes, win_rate


def scored(wins: int, ties: int, losses: int) -> list[tuple[float, float]]:
    return [(1.0, 0.0)] * wins + [(0.5, 0.5)] * ties + [(0.0, 1.0)] * losses


def test_ties_count_half_and_the_margin_decides_what_a_tie_is() -> None:
    pairs = [(1.0, 0.0), (0.3, 0.2), (0.2, 0.3), (0.0, 1.0), (0.0, 0.0)]
    assert outcomes(pairs).tolist() == [1, 1, 0, 0, 0.5]
    assert outcomes(pairs, tie_margin=0.25).tolist() == [1, 0.5, 0.5, 0, 0.5]
    result = win_rate(scored(6, 2, 2))
    assert (result.wins, result.ties, result.losses, result.pairs) == (6, 2, 2, 10)
    assert result.rate == pytest.approx(0.7)


def test_without_ties_the_interval_is_wilsons() -> None:
    result = win_rate(scored(70, 0, 30))
    # Worked by hand with z = 1.959964: centre (0.7 + z²/200) / (1 + z²/100), half width
    # z / (1 + z²/100) * sqrt(0.21/100 + z²/40000).
    assert (result.ci_low, result.ci_high) == pytest.approx((0.60415, 0.78105), abs=1e-5)
    expected = stats.binomtest(70, 100).proportion_ci(0.95, method="wilson")
    assert (result.ci_low, result.ci_high) == pytest.approx((expected.low, expected.high))
    assert result.method == "wilson"


def test_ties_are_bootstrapped_over_prompts_as_scipy_does() -> None:
    pairs = scored(50, 20, 30)
    result = win_rate(pairs, seed=5, resamples=2000)
    expected = stats.bootstrap(
        (outcomes(pairs),), np.mean, n_resamples=20_000, rng=np.random.default_rng(1)
    ).confidence_interval
    assert result.method == "bootstrap"
    assert (result.ci_low, result.ci_high) == pytest.approx(
        (expected.low, expected.high), abs=0.015
    )
    assert result == win_rate(pairs, seed=5, resamples=2000)
    assert result != win_rate(pairs, seed=6, resamples=2000)


def test_copies_of_a_prompts_answers_add_no_certainty() -> None:
    rng = np.random.default_rng(0)
    once = [(float(w), 0.5) for w in rng.integers(0, 2, 60)]
    single = win_rate(once)
    eight = win_rate(once * 8, list(range(60)) * 8)
    naive = win_rate(once * 8)
    assert (eight.prompts, eight.pairs, eight.rate) == (60, 480, single.rate)
    width = eight.ci_high - eight.ci_low
    assert width == pytest.approx(single.ci_high - single.ci_low, rel=0.1)
    assert width > 2 * (naive.ci_high - naive.ci_low)


def test_prompts_with_more_pairs_weigh_more() -> None:
    result = win_rate(scored(3, 0, 1), ["a", "a", "a", "b"])
    assert result.rate == 0.75
    assert result.prompts == 2


def test_a_unanimous_result_is_not_claimed_to_be_certain() -> None:
    tied = win_rate(scored(0, 20, 0))
    assert tied.method == "wilson-bound"
    assert (tied.rate, tied.ci_low) == (0.5, pytest.approx(0.299, abs=1e-3))
    won = win_rate(scored(40, 0, 0), [i // 2 for i in range(40)])
    expected = stats.binomtest(20, 20).proportion_ci(0.95, method="wilson")
    assert (won.ci_low, won.ci_high) == pytest.approx((expected.low, 1.0))


@pytest.mark.parametrize("ties", [0.0, 0.3])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(ties: float) -> None:
    rng = np.random.default_rng(11)
    win = 0.6 * (1 - ties)
    truth = win + ties / 2
    covered = 0
    for run in range(200):
        drawn = rng.choice([0, 1, 2], size=80, p=[1 - win - ties, ties, win])
        result = win_rate([(float(x), 1.0) for x in drawn], seed=run, resamples=500)
        covered += result.ci_low <= truth <= result.ci_high
    assert 0.90 <= covered / 200 <= 0.99  # 0.95 with a standard error of 0.015


def test_unusable_scores_are_named() -> None:
    with pytest.raises(ValueError, match="pair 1 has a score"):
        win_rate([(0.0, 1.0), (math.nan, 1.0)])
    with pytest.raises(ValueError, match="no pairs"):
        win_rate([])
    with pytest.raises(ValueError, match="2 pairs but 1 prompts"):
        win_rate([(0.0, 1.0), (1.0, 1.0)], ["a"])


def test_length_control_removes_a_pure_length_preference() -> None:
    rng = np.random.default_rng(3)
    difference = rng.normal(20, 20, 3000)
    x = np.tanh(difference / difference.std())
    wins = (rng.random(3000) < 1 / (1 + np.exp(-2 * x))).astype(float)
    assert wins.mean() > 0.6
    found = length_controlled(wins, difference)
    assert found is not None
    assert found.rate == pytest.approx(0.5, abs=0.03)
    assert found.length_effect == pytest.approx(2, abs=0.25)


def test_length_control_keeps_what_length_does_not_explain() -> None:
    rng = np.random.default_rng(4)
    wins = (rng.random(3000) < 0.7).astype(float)
    found = length_controlled(wins, rng.normal(0, 5, 3000))
    assert found is not None
    assert found.rate == pytest.approx(0.7, abs=0.03)
    same = length_controlled([1, 0.5, 0, 1], [0, 0, 0, 0])
    assert same is not None
    assert same.rate == 0.625
    assert length_controlled([1, 0, 1], [5, 5, 5]) is None


def test_length_control_is_finite_where_length_explains_everything() -> None:
    found = length_controlled([1] * 50 + [0] * 50, [10.0] * 50 + [-10.0] * 50)
    assert found is not None
    assert found.rate == pytest.approx(0.5, abs=0.01)
    assert 1 < found.length_effect < 10
    every = length_controlled([1] * 50, np.linspace(-5, 5, 50))
    assert every is not None
    assert every.rate > 0.99
