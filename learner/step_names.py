"""The learner's numbers where Ray's dashboard lists tasks: in the name of a step's task.

A name is given when a task is asked for, so it tells of the step before. Ray keeps counters of each
name for as long as a process lives. So of quick steps only one every half minute has a name of its
own.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from cluster.contracts.metrics import values
from cluster.contracts.records import StepResult

EVERY_S = 30.0


class StepNames:
    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._ended = now()  # the step before
        self._named: float | None = None
        self._told = ""

    def of(self, step: int) -> str:
        """Of the task of ``step``, counted from 0 (people see the first step as step 1); "" for the
        name that all have."""
        now = self._now()
        if not self._told or (self._named is not None and now - self._named < EVERY_S):
            return ""
        self._named = now
        return f"step {step + 1}, after {self._told}"

    def done(self, result: StepResult) -> None:
        now = self._now()
        rate = result.trained_tokens / max(now - self._ended, 1e-9)
        self._ended = now
        staleness = values(result.metrics).get("async/staleness_mean")
        self._told = f"step {result.step + 1}: {_short(rate)} tok/s" + (
            "" if staleness is None else f", staleness {staleness:.2g}"
        )


def _short(rate: float) -> str:
    return f"{rate / 1000:.1f}k" if rate >= 1000 else f"{rate:.0f}"
