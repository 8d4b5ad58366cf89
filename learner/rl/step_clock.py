"""Where a learner step's time goes, as its own process sees it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from cluster.contracts.metrics import Metric, last
from cluster.contracts.step_parts import LEARNER_PARTS, LearnerPart
from cluster.contracts.stopwatch import Stopwatch

_SCHEDULING = Path("/proc/thread-self/schedstat")  # ns on a core, ns in wait of one, turns


class StepClock:
    """Runs from when it is made. To be used in the thread that computes the step."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._began = now()
        self._watch = Stopwatch(self._began, "record")
        self._cpu_began = time.process_time()
        self._waited_before = _waited_for_core()

    def enters(self, part: LearnerPart) -> None:
        """From now on the step's time is that part's."""
        self._watch.turn(self._now(), part)

    @property
    def cpu_s(self) -> float:
        """Of all threads of the process, since the step began."""
        return time.process_time() - self._cpu_began

    def metrics(self) -> list[Metric]:
        """``time/*``: seconds of each part, and of the whole. ``perf/learner_no_core_s``: seconds
        in which this thread could run but had no core; nothing where the system does not say."""
        now = self._now()
        spent = self._watch.totals(now)
        found = [last(f"time/{part}", spent.get(part, 0.0)) for part in LEARNER_PARTS]
        found += [last("time/step", now - self._began)]
        waited = _waited_for_core()
        if waited is not None and self._waited_before is not None:
            found.append(last("perf/learner_no_core_s", waited - self._waited_before))
        return found


def _waited_for_core() -> float | None:
    """Seconds that this thread has waited for a core so far; None where that is not known."""
    try:
        return int(_SCHEDULING.read_text(encoding="ascii").split()[1]) / 1e9
    except (OSError, ValueError, IndexError):  # no Linux, or a kernel without it
        return None
