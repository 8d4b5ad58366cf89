"""How much reward was bought with how much distance from the reference policy.

Distance is d = sqrt(KL) as in Gao, Schulman, Hilton 2022, "Scaling laws for reward model
overoptimization": against it, the score of a judge that training never sees rises, peaks and
falls. Their laws, with R(0) = 0: d (alpha - beta d) for best-of-n, d (alpha - beta ln d) for
reinforcement learning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from learner.evaluation.run_files import number

PROXY = "objective/scores"
KL = "objective/kl"
Method = Literal["best-of-n", "rl"]


@dataclass(frozen=True, slots=True)
class Point:
    """One learner step: ``distance`` = sqrt(KL), KL in nats an answer."""

    step: int
    distance: float
    score: float


@dataclass(frozen=True, slots=True)
class Fit:
    """score = start + d (alpha - beta d) for best-of-n, start + d (alpha - beta ln d) for rl.

    rmse: in the score's units. r_squared: share of the scores' variance that the law explains.
    """

    method: Method
    start: float
    alpha: float
    beta: float
    rmse: float
    r_squared: float

    @property
    def peak(self) -> float | None:
        """The distance of the highest score, alpha / (2 beta) or exp(alpha / beta - 1); None when
        it never falls."""
        if self.beta <= 0 or self.alpha / self.beta > 50:
            return None
        ratio = self.alpha / self.beta
        return ratio / 2 if self.method == "best-of-n" else math.exp(ratio - 1)

    def score(self, distance: float) -> float:
        """What the law says at a distance of 0 or more."""
        slowing = _slowing(np.array([distance]), self.method)[0]
        return float(self.start + self.alpha * distance - self.beta * slowing)


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


def fit(found: Sequence[Point], method: Method = "rl", *, start: float | None = None) -> Fit | None:
    """Least squares for ``Fit``. start: known, such as 0 of centred scores; None: fitted as well.
    None with fewer than 4 different distances: nothing to learn."""
    distance = np.array([p.distance for p in found])
    if len(np.unique(distance)) < 4:
        return None
    score = np.array([p.score for p in found])
    law = np.stack([distance, -_slowing(distance, method)], axis=1)
    known = 0.0 if start is None else start
    design = law if start is not None else np.column_stack([np.ones_like(distance), law])
    solution, *_ = np.linalg.lstsq(design, score - known, rcond=None)
    squares = float(np.sum((design @ solution + known - score) ** 2))
    spread = float(np.sum((score - score.mean()) ** 2))
    return Fit(
        method,
        start=known if start is not None else float(solution[0]),
        alpha=float(solution[-2]),
        beta=float(solution[-1]),
        rmse=math.sqrt(squares / len(score)),
        r_squared=1 - squares / spread if spread > 0 else 0.0,
    )


def _slowing(distance: NDArray[np.float64], method: Method) -> NDArray[np.float64]:
    """What beta multiplies: d² or d ln d, which is 0 at 0."""
    if method == "best-of-n":
        return distance**2
    return distance * np.log(np.where(distance > 0, distance, 1.0))
