"""Does a probability of 0.8 come true four times in five? Reliability bins and their sum (ECE)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

Numbers = Sequence[float] | np.ndarray


@dataclass(frozen=True, slots=True)
class Bin:
    """Predictions in [low, high) (the last bin includes 1): their mean, and how often true."""

    low: float
    high: float
    count: int
    mean_probability: float
    frequency: float

    def as_record(self) -> dict[str, float | int]:
        """As it stands in ``reward_model.json`` under ``reliability``."""
        return asdict(self)


def confidences(margins: Numbers) -> tuple[np.ndarray, np.ndarray]:
    """(probability, label), both [N] float64, of a pairwise model's margins chosen - rejected [N].

    The model's belief in its own favourite is sigmoid(|margin|), in [0.5, 1); the label is 1 when
    the favourite is the chosen answer, 0.5 when the model has none. Taking sigmoid(margin) with the
    label 1 throughout would measure the mean loss and not calibration, as the order chosen/rejected
    is known to whoever made the pairs.
    """
    margin = np.asarray(margins, dtype=np.float64)
    probability = 1 / (1 + np.exp(-np.abs(margin)))
    return probability, (np.sign(margin) + 1) / 2


def reliability(probabilities: Numbers, labels: Numbers, bins: int = 10) -> list[Bin]:
    """Equal-width bins over [0, 1], empty ones left out. ``labels`` [N] in [0, 1] (0.5: undecided).

    Raises ValueError for unequal lengths, no data, or values outside [0, 1].
    """
    p, y = np.asarray(probabilities, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if p.ndim != 1 or p.shape != y.shape or p.size == 0:
        raise ValueError(f"{p.shape} probabilities and {y.shape} labels")
    if bins < 1:
        raise ValueError(f"bins is {bins}; at least 1 is needed")
    for name, values in (("probability", p), ("label", y)):
        if not ((values >= 0) & (values <= 1)).all():
            raise ValueError(f"a {name} is outside [0, 1]")
    edges = np.arange(bins + 1) / bins
    where = np.clip(np.searchsorted(edges, p, side="right") - 1, 0, bins - 1)
    count = np.bincount(where, minlength=bins)
    total_p = np.bincount(where, weights=p, minlength=bins)
    total_y = np.bincount(where, weights=y, minlength=bins)
    return [
        Bin(
            float(edges[i]),
            float(edges[i + 1]),
            int(count[i]),
            float(total_p[i] / count[i]),
            float(total_y[i] / count[i]),
        )
        for i in np.flatnonzero(count)
    ]


def ece(probabilities: Numbers, labels: Numbers, bins: int = 10) -> float:
    """Expected calibration error: mean |probability - frequency| over bins, weighted by count.

    Naeini et al. 2015 and Guo et al. 2017. 0 is perfect.
    """
    found = reliability(probabilities, labels, bins)
    total = sum(b.count for b in found)
    return sum(b.count * abs(b.mean_probability - b.frequency) for b in found) / total
