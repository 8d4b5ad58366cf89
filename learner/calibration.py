"""How far a reward model's stated certainty is from how often it is right."""

from __future__ import annotations

import math
from collections.abc import Sequence


def expected_calibration_error(gaps: Sequence[float], bins: int = 10) -> float:
    """Expected calibration error (Guo et al. 2017) of sigmoid(gap), gap = chosen - rejected.

    Certainty is max(p, 1 - p) in [0.5, 1], cut into equal bins; a pair is right when gap > 0, and a
    tie is half right. Mean over pairs of |share right - mean certainty| of its bin; NaN for none.
    """
    sums = [[0.0, 0.0] for _ in range(bins)]
    for gap in gaps:
        certainty = 1.0 / (1.0 + math.exp(-min(abs(gap), 700.0)))
        right = 0.5 if gap == 0 else float(gap > 0)
        bucket = sums[min(int((certainty - 0.5) * 2 * bins), bins - 1)]
        bucket[0] += right
        bucket[1] += certainty
    if not gaps:
        return math.nan
    return sum(abs(right - certainty) for right, certainty in sums) / len(gaps)
