"""How much reward was bought with how much distance from the reference policy.

Distance is d = sqrt(KL) as in Gao, Schulman, Hilton 2022, "Scaling laws for reward model
overoptimization": against it, the score of a judge that training never sees rises, peaks and
falls.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from learner.evaluation.run_files import number

PROXY = "objective/scores"
KL = "objective/kl"


@dataclass(frozen=True, slots=True)
class Point:
    """One learner step: ``distance`` = sqrt(KL), KL in nats an answer."""

    step: int
    distance: float
    score: float


@dataclass(frozen=True, slots=True)
class Fit:
    """score = start + d * (alpha - beta * ln d), least squares; ``rmse`` in the score's units."""

    start: float
    alpha: float
    beta: float
    rmse: float

    @property
    def peak(self) -> float | None:
        """The distance of the highest score, exp(alpha / beta - 1); None when it never falls."""
        if self.beta <= 0 or self.alpha / self.beta > 50:
            return None
        return math.exp(self.alpha / self.beta - 1)


def points(
    rows: Sequence[Mapping[str, Any]], score: str = PROXY, kl: str = KL, window: int = 1
) -> list[Point]:
    """Points of the rows of ``metrics.jsonl`` that have both numbers, in the order of the rows.

    Score and KL are averaged over the last ``window`` such rows, since single steps are noisy. A
    sampled KL can come out below 0 near the reference; its distance is then 0.
    """
    both = [row for row in rows if None not in (number(row, score), number(row, kl))]
    found = []
    for i, row in enumerate(both):
        near = both[max(0, i - window + 1) : i + 1]
        mean_kl = sum(float(r[kl]) for r in near) / len(near)
        mean_score = sum(float(r[score]) for r in near) / len(near)
        found.append(Point(int(row["step"]), math.sqrt(max(0.0, mean_kl)), mean_score))
    return found


def frontier(found: Sequence[Point]) -> list[Point]:
    """The points no other beats (as near and higher, or nearer and as high), nearest first."""
    best: list[Point] = []
    for point in sorted(found, key=lambda p: (p.distance, -p.score, p.step)):
        if not best or point.score > best[-1].score:
            best.append(point)
    return best


def best_point(found: Sequence[Point]) -> Point | None:
    """The highest score; of equals the nearest. None without points."""
    return min(found, key=lambda p: (-p.score, p.distance, p.step), default=None)


def fit(found: Sequence[Point]) -> Fit | None:
    """Least squares for ``Fit``. None with fewer than 4 different distances: nothing to learn."""
    distance = np.array([p.distance for p in found])
    if len(np.unique(distance)) < 4:
        return None
    score = np.array([p.score for p in found])
    log = np.log(np.where(distance > 0, distance, 1.0))  # d ln d -> 0 as d -> 0
    design = np.stack([np.ones_like(distance), distance, -distance * log], axis=1)
    solution, *_ = np.linalg.lstsq(design, score, rcond=None)
    rmse = float(np.sqrt(np.mean((design @ solution - score) ** 2)))
    return Fit(float(solution[0]), float(solution[1]), float(solution[2]), rmse)
