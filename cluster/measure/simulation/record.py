"""What a simulation sees of the workers and the learner, and what it says at the end."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

_FLUSH = 200_000


@dataclass(frozen=True, slots=True)
class TrainedStep:
    began: float
    ended: float
    samples: int
    tokens: float
    token_lag: float  # learner steps behind, summed over tokens
    lags: Counter[int]  # of each sample's first token -> samples


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Measured over whole steps after the warm-up. Busy shares are of the time; goodput in trained
    answer tokens a second; staleness in learner steps, by a sample's oldest token."""

    steps: int
    samples: int
    step_s: float
    generation_busy: float
    learner_busy: float
    goodput: float
    samples_per_s: float
    waste: float
    staleness_mean: float
    staleness_p95: int
    staleness_max: int
    token_staleness: float
    violations: int


class Occupation:
    """How many slots were in use, as a step function kept by bins of ``width`` seconds."""

    def __init__(self, seconds: float) -> None:
        self._width = seconds / 20_000
        self._bins = 20_001
        self._count = np.zeros(self._bins)
        self._times = np.zeros(self._bins)
        self._starts: list[float] = []
        self._ends: list[float] = []

    def add(self, starts: Iterable[float], ends: Iterable[float]) -> None:
        self._starts += starts
        self._ends += ends
        if len(self._starts) > _FLUSH:
            self._flush()

    def cut(self, start: float, end: float, now: float) -> None:
        """A slot in use from ``start`` to ``end`` is not, from ``now`` on."""
        self.add((max(start, end),), (max(start, now),))

    def slot_seconds(self, begin: float, end: float) -> float:
        """Seconds of use of all slots together between two moments, to the width of a bin."""
        self._flush()
        return self._until(end) - self._until(begin)

    def _until(self, moment: float) -> float:
        last = min(self._bins, round(moment / self._width))
        moment = last * self._width
        return float(self._count[:last].sum() * moment - self._times[:last].sum())

    def _flush(self) -> None:
        for times, sign in ((self._starts, 1.0), (self._ends, -1.0)):
            moments = np.asarray(times)
            places = np.minimum((moments / self._width).astype(np.int64), self._bins - 1)
            self._count += sign * np.bincount(places, minlength=self._bins)
            self._times += sign * np.bincount(places, weights=moments, minlength=self._bins)
        self._starts, self._ends = [], []


class Record:
    def __init__(self, seconds: float, bound: int) -> None:
        self.occupation = Occupation(seconds)
        self.steps: list[TrainedStep] = []
        self.lost_tokens = 0.0
        self.samples_generated = 0
        self.losses = 0
        self._bound = bound

    def figures(self, slots: int, warm_up_s: float) -> Figures:
        """``slots``: of all workers that were wanted, whether they were alive or not.

        Raises ValueError when too few steps were done for a figure to mean anything.
        """
        ends = [step.ended for step in self.steps]
        first = next((i for i, ended in enumerate(ends) if ended >= warm_up_s), len(ends))
        first = max(first, self._bound + 1)
        counted = self.steps[first + 1 :]
        if len(counted) < 3:
            raise ValueError(
                f"only {len(ends)} learner steps were done, {max(0, len(counted))} of them after "
                "the warm-up: simulate longer or with smaller steps"
            )
        begin, end = ends[first], ends[-1]
        wall = end - begin
        tokens = sum(step.tokens for step in counted)
        samples = sum(step.samples for step in counted)
        lags: Counter[int] = Counter()
        for step in counted:
            lags.update(step.lags)
        in_order = sorted(lags.elements())
        all_tokens = sum(step.tokens for step in self.steps)
        return Figures(
            steps=len(counted),
            samples=samples,
            step_s=wall / len(counted),
            generation_busy=self.occupation.slot_seconds(begin, end) / (slots * wall),
            learner_busy=sum(step.ended - step.began for step in counted) / wall,
            goodput=tokens / wall,
            samples_per_s=samples / wall,
            waste=self.lost_tokens / (self.lost_tokens + all_tokens),
            staleness_mean=sum(in_order) / samples,
            staleness_p95=in_order[math.ceil(0.95 * samples) - 1],
            staleness_max=in_order[-1],
            token_staleness=sum(step.token_lag for step in counted) / tokens,
            violations=sum(
                n
                for step in self.steps
                for lag, n in step.lags.items()
                if lag > self._bound or lag < 0
            ),
        )
