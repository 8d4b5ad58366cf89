"""What the numbers of `accord bench overlap` mean: pure arithmetic.

T is the seconds of a step: T_async and T_sync of the whole loop, T_g of generation alone, T_t of
the learner alone, on the same recorded rollouts. Little's law and the derivation of the ceiling are
in docs/measure.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Window:
    """Seconds [start, end) on the monotonic clock, over ``steps`` whole learner steps."""

    start: float
    end: float
    steps: int

    @property
    def seconds(self) -> float:
        return self.end - self.start

    @property
    def step_s(self) -> float:
        return self.seconds / self.steps


def window_of(step_ends: Sequence[float], first: int, steps: int) -> Window:
    """From the end of step ``first - 1`` to the end of step ``first + steps - 1``.

    step_ends: when each learner step ended, in order. Raises ValueError when there are too few.
    """
    if first < 1 or steps < 1 or first + steps > len(step_ends):
        raise ValueError(
            f"{len(step_ends)} steps have no window of {steps} after the first {first}"
        )
    return Window(step_ends[first - 1], step_ends[first + steps - 1], steps)


def overlap_efficiency(alone: Sequence[float], step_s: float) -> float:
    """max of the standalone times / the measured step: 1 when the slower side never waits."""
    return max(alone) / step_s


def cpu_bound_step(worker_s: float, learner_s: float, anywhere_s: float) -> float:
    """Seconds a step would take on two cores if nobody ever waited.

    worker_s, learner_s: CPU-seconds a step of what keeps to the one core and to the other;
    anywhere_s: of what runs on either.
    """
    return max(worker_s, learner_s, (worker_s + learner_s + anywhere_s) / 2)


def ceiling(generate_s: float, learn_s: float) -> float:
    """Largest speed-up overlap alone can give over doing one after the other."""
    return (generate_s + learn_s) / max(generate_s, learn_s)


def realised(sync_s: float, async_s: float, alone: Sequence[float]) -> float:
    """Part of the time overlap could save that it does save; nan where there is nothing to save."""
    possible = sync_s - max(alone)
    return (sync_s - async_s) / possible if possible > 0 else math.nan


def bubble(busy_s: float, units: int, seconds: float) -> float:
    """Share of ``units`` x ``seconds`` without work."""
    return 1.0 - busy_s / (units * seconds)


def waste(trained: float, generated: float) -> float:
    """Share of the generated tokens that were never trained on."""
    return 1.0 - trained / generated


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank: the smallest value with at least ``share`` of all at or below it."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def within(spans: Sequence[tuple[float, float]], window: Window) -> float:
    """Seconds of the window that the spans (start, end; not overlapping) cover."""
    return sum(max(0.0, min(end, window.end) - max(start, window.start)) for start, end in spans)


def at(samples: Sequence[tuple[float, float]], moment: float) -> float:
    """A counter at ``moment``, between its samples (time, value; in order) on a straight line.

    Before the first sample it is the first's, after the last the last's.
    """
    if moment <= samples[0][0]:
        return samples[0][1]
    for (t0, v0), (t1, v1) in pairwise(samples):
        if moment <= t1:
            return v0 + (v1 - v0) * (moment - t0) / (t1 - t0)
    return samples[-1][1]


def grown(samples: Sequence[tuple[float, float]], window: Window) -> float:
    """How much a counter grew in the window."""
    return at(samples, window.end) - at(samples, window.start) if samples else 0.0


def split(seconds: Mapping[str, float], cores: int, window: Window) -> dict[str, float]:
    """CPU-seconds by role as shares of all cores' time in the window; ``idle`` is what is left."""
    shares = {role: used / (cores * window.seconds) for role, used in seconds.items()}
    return {**shares, "idle": 1.0 - sum(shares.values())}
