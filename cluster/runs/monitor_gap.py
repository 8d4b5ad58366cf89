"""Whether one figure of a run falls while its training reward rises: the sign of an
over-optimised reward (Gao et al. 2022, "Scaling laws for reward model overoptimization").

Both are noisy. Means over a few values are compared, and the noise is taken from how far values
that follow each other differ (von Neumann's mean square successive difference), which a slow trend
hardly changes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

EQUAL = 1e-12


@dataclass(slots=True)
class Gap:
    """``at_once``: how many values make a mean. ``judged``: the judge's figures, oldest first;
    ``reward``: the mean training reward of the steps up to each, from the one before; ``steps``:
    at which each came."""

    at_once: int
    judged: list[float] = field(default_factory=list)
    reward: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    _since: list[float] = field(default_factory=list)

    def add(self, step: int, judged: float | None, reward: float | None) -> None:
        if reward is not None:
            self._since.append(reward)
        if judged is not None and self._since:
            self.judged.append(judged)
            self.steps.append(step)
            self.reward.append(statistics.fmean(self._since))
            self._since.clear()


@dataclass(frozen=True, slots=True)
class Fall:
    """From the ``best`` mean to that of ``now``, in standard errors of their difference beyond what
    the best of so many means exceeds the others by chance; 0 where the reward did not rise.
    ``step``: the last one that the best mean is of."""

    best: float
    now: float
    errors: float
    step: int


def falling_while_rising(gap: Gap) -> Fall | None:
    """None while there are too few values to tell a fall from noise."""
    count = gap.at_once
    if len(gap.judged) < 2 * count + 1:
        return None
    judged, reward = _means(gap.judged, count), _means(gap.reward, count)
    # Means that share no value with the newest one.
    place = max(range(len(judged) - count), key=judged.__getitem__)
    steps = [b - a for a, b in zip(gap.judged, gap.judged[1:], strict=False)]
    noise = math.sqrt(statistics.fmean(step * step for step in steps) / 2)
    error = max(noise * math.sqrt(2 / count), EQUAL)
    rose = reward[-1] > reward[place]
    # The largest of m normal numbers lies about sqrt(2 ln m) standard deviations over their mean;
    # `error` is sqrt(2) standard deviations of a mean.
    by_chance = math.sqrt(math.log(max(1, len(judged) - count)))
    errors = (judged[place] - judged[-1]) / error - by_chance if rose else 0.0
    best_step = gap.steps[place + count - 1]
    return Fall(best=judged[place], now=judged[-1], errors=max(0.0, errors), step=best_step)


def _means(values: Sequence[float], count: int) -> list[float]:
    return [statistics.fmean(values[end - count : end]) for end in range(count, len(values) + 1)]
