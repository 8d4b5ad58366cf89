"""The unbiased estimator of best-of-n's score."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from learner.evaluation.best_of_n import best_of_n_scores


def test_a_pool_of_three_by_hand() -> None:
    choosing, judged = np.array([[0.2, 0.9, 0.5]]), np.array([[10.0, 1.0, 4.0]])
    # Of the subsets of two, {a, c} gives c and the others b.
    assert best_of_n_scores(choosing, judged, [1, 2, 3])[0].tolist() == pytest.approx(
        [15 / 3, (1 + 1 + 4) / 3, 1.0]
    )


def test_it_is_the_mean_over_all_subsets() -> None:
    rng = np.random.default_rng(0)
    choosing, judged = rng.normal(size=(2, 7)), rng.normal(size=(2, 7))
    found = best_of_n_scores(choosing, judged, range(1, 8))
    for row in range(2):
        for n in range(1, 8):
            best = [
                judged[row, max(chosen, key=lambda i: choosing[row, i])]
                for chosen in combinations(range(7), n)
            ]
            assert found[row, n - 1] == pytest.approx(np.mean(best))


def test_equal_scores_are_as_likely_to_be_chosen() -> None:
    choosing, judged = np.array([[1.0, 1.0, 0.0]]), np.array([[6.0, 2.0, 0.0]])
    assert best_of_n_scores(choosing, judged, [2, 3])[0] == pytest.approx([4.0, 4.0])
    swapped = best_of_n_scores(choosing[:, [1, 0, 2]], judged[:, [1, 0, 2]], [2, 3])
    assert swapped[0] == pytest.approx([4.0, 4.0])


def test_large_pools_neither_overflow_nor_lose_chances() -> None:
    ones = np.ones((1, 4096))
    found = best_of_n_scores(np.arange(4096.0)[None], ones, [1, 7, 1000, 4096])
    assert found[0] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("shape", "sizes"), [((2, 3), [4]), ((2, 3), [0]), ((2, 3), []), ((6,), [1])]
)
def test_what_cannot_be_is_refused(shape: tuple[int, ...], sizes: list[int]) -> None:
    with pytest.raises(ValueError, match=r"sizes|shapes"):
        best_of_n_scores(np.zeros(shape), np.zeros(shape), sizes)
