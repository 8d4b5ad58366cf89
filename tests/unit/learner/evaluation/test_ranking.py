"""A ranking from paired comparisons with ties."""

from __future__ import annotations

import math

import numpy as np
import pytest

from learner.evaluation.ranking import ELO, Outcome, log_strengths, ranking


def games(left: int, right: int, wins: int, losses: int, ties: int) -> list[Outcome]:
    results = [1.0] * wins + [0.0] * losses + [0.5] * ties
    return [Outcome(left, right, result, at) for at, result in enumerate(results)]


def test_two_policies_have_the_ratio_of_wins_and_losses_as_odds() -> None:
    """Davidson's maximum for two: p1 / p2 = wins / losses, v = ties / sqrt(wins * losses)."""
    counts = np.zeros((1, 2, 2, 3))
    counts[0, 0, 1] = [600, 150, 250]
    strengths, tie = log_strengths(counts)
    assert strengths[0, 0] - strengths[0, 1] == pytest.approx(math.log(600 / 150), abs=2e-3)
    assert tie[0] == pytest.approx(math.log(250 / math.sqrt(600 * 150)), abs=2e-3)
    first, second = ranking(games(0, 1, 600, 150, 250), 2)
    assert first.rating - second.rating == pytest.approx(ELO * math.log(4), abs=1)
    assert (first.wins, first.ties, first.losses, first.win_rate) == (600, 250, 150, 0.725)
    assert (second.wins, second.losses) == (150, 600)
    # ln(w / l) of a multinomial has the standard error sqrt(1 / w + 1 / l), of both policies half.
    half = 1.96 * ELO * math.sqrt(1 / 600 + 1 / 150) / 2
    assert first.ci_high - first.ci_low == pytest.approx(2 * half, rel=0.15)


def test_the_side_on_which_a_policy_stands_does_not_matter() -> None:
    one = ranking(games(0, 1, 7, 2, 1), 2, resamples=50)
    other = ranking(games(1, 0, 2, 7, 1), 2, resamples=50)
    assert [(r.policy, round(r.rating, 6)) for r in one] == [
        (r.policy, round(r.rating, 6)) for r in other
    ]


def test_strengths_that_made_the_results_are_found_again() -> None:
    rng = np.random.default_rng(0)
    true = np.array([1.0, 0.3, -0.4, -0.9])
    played = []
    for at in range(8000):
        i, j = rng.choice(4, 2, replace=False)
        p = np.exp([true[i], true[j], -0.5 + (true[i] + true[j]) / 2])
        played.append(Outcome(int(i), int(j), rng.choice([1.0, 0.0, 0.5], p=p / p.sum()), at))
    found = ranking(played, 4, resamples=100)
    assert [one.policy for one in found] == [0, 1, 2, 3]
    assert [one.rating / ELO for one in found] == pytest.approx(list(true), abs=0.12)
    for one in found:
        width = one.ci_high - one.ci_low
        assert abs(one.rating - ELO * true[one.policy]) < width < 30


def test_a_policy_that_wins_everything_has_a_finite_rating() -> None:
    first, second = ranking(games(0, 1, 5, 0, 0), 2, resamples=50)
    assert first.policy == 0
    assert 100 < first.rating - second.rating < 2000
    assert first.ci_low <= first.rating <= first.ci_high


def test_prompts_are_resampled_and_not_comparisons() -> None:
    """Ten equal comparisons of one prompt say as much as one."""
    few = [Outcome(0, 1, float(at % 3 > 0), at) for at in range(30)]
    many = [one for one in few for _ in range(10)]
    widths = [(r := ranking(found, 2)[0]).ci_high - r.ci_low for found in (few, many)]
    assert widths[1] == pytest.approx(widths[0], rel=0.15)


@pytest.mark.parametrize(
    ("played", "words"),
    [
        ([Outcome(0, 1, 1.0, 0)], "compared with no other"),
        ([Outcome(0, 1, 0.7, 0)], "expected 0, 0.5 or 1"),
    ],
)
def test_what_cannot_be_ranked(played: list[Outcome], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ranking(played, 3)
