"""How many rollout workers a run should have, from what learner and workers waited for. Pure.

Let u be the share of their time in which w workers had work, and f the share of its time in which
the learner waited for a batch. While the learner waits, the workers are the limit, and w / (1 - f)
of them would keep it busy; otherwise it is the limit, and u * w of them are enough. The number that
is asked for keeps the workers busy for ``BUSY`` of their time, and one that has been reached stays:
more are asked for only beyond ``STARVED``, and fewer only where the fewer would be busy for at most
``SPARE`` of their time. Between the two lies the hysteresis.

More workers do not help where a single long completion is what the learner waits for. So a growth
after which a step takes hardly less time is taken back, and not tried again for a while.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

BUSY = 0.85
SPARE = 0.75
STARVED = 0.1
HELPED = 0.2  # of what the learner waited in each step, a growth has to save at least
FORGOTTEN_AFTER = 30  # cool-downs, until a growth that did not help is tried again
SEVERAL = 2  # times the patience: windows that a step's time is the mean of
MOST_GROWTH = 2.0  # at once: what was measured with few workers says little of very many


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """What was measured from one learner step to the next. ``now``: its end, in seconds.

    ``waited``: share of the window in which the learner waited for a batch. ``idle``: share of
    their time in which the serving ``workers`` had no work; None where they do not report it.
    """

    now: float
    workers: int
    waited: float
    idle: float | None


@dataclass(frozen=True, slots=True)
class Change:
    workers: int
    why: str


class Autoscaler:
    """Bounded, and slow on purpose: a change needs ``patience`` windows in a row that ask for the
    same direction, and after it ``cool_down_s`` seconds pass, in which workers start or drain."""

    def __init__(
        self, *, least: int, most: int, cool_down_s: float = 60.0, patience: int = 3
    ) -> None:
        self._least, self._most = max(1, least), most
        self._cool_down_s = cool_down_s
        self._patience = patience
        self._direction = 0
        self._streak = 0
        self._settled = 0  # windows since the workers of a growth serve
        self._quiet_until = -math.inf
        self._growth: tuple[int, float, float] | None = None  # workers, step_s and waited before it
        self._ends: deque[float] = deque(maxlen=SEVERAL * patience + 1)  # of the last windows
        self._ceiling = (most, -math.inf)  # more than so many did not help; until when it holds

    def decide(self, window: Window, wanted: int) -> Change | None:
        """``wanted``: workers asked for so far. None: it stays so."""
        self._ends.append(window.now)
        inside = min(self._most, max(self._least, wanted))
        if inside != wanted:
            return self._changed(window, inside, f"within {self._least} and {self._most}")
        # Some start or drain: what is measured meanwhile is not what they will make of it.
        if window.workers != wanted or window.now < self._quiet_until:
            self._streak = 0
            return None
        if (back := self._taken_back(window)) is not None:
            return back
        target, why = _target(window)
        most = self._ceiling[0] if window.now < self._ceiling[1] else self._most
        target = min(max(most, wanted), max(self._least, target))
        direction = (target > wanted) - (target < wanted)
        self._streak = self._streak + 1 if direction == self._direction else 1
        self._direction = direction
        if direction == 0 or self._streak < self._patience:
            return None
        self._growth = (wanted, self._step_s(), window.waited) if target > wanted else None
        return self._changed(window, target, why)

    def _taken_back(self, window: Window) -> Change | None:
        """Once after a growth, when its workers have served for some windows."""
        if self._growth is None:
            return None
        self._settled += 1
        if self._settled <= SEVERAL * self._patience:
            return None
        (before, step_s, waited), self._growth, self._settled = self._growth, None, 0
        if self._step_s() <= step_s * (1.0 - HELPED * waited):
            return None
        self._ceiling = (before, window.now + FORGOTTEN_AFTER * self._cool_down_s)
        why = f"more workers did not help: a step took {step_s:.3g} s, now {self._step_s():.3g} s"
        return self._changed(window, before, why)

    def _step_s(self) -> float:
        """Over several windows: completions that are begun together end together, so that one step
        is waited for and the next ones are not."""
        return (self._ends[-1] - self._ends[0]) / max(1, len(self._ends) - 1)

    def _changed(self, window: Window, workers: int, why: str) -> Change:
        self._streak, self._direction = 0, 0
        self._quiet_until = window.now + self._cool_down_s
        return Change(workers, why)


def _target(window: Window) -> tuple[int, str]:
    workers = window.workers
    if window.waited > STARVED:
        # Both wait in a synchronous run: more workers then shorten generation, not the learner's.
        load = workers / (1.0 - min(window.waited, 0.99))
        load *= 1.0 - (window.idle or 0.0)
        wanted = min(math.ceil(load / BUSY - 1e-9), math.ceil(workers * MOST_GROWTH))
        why = f"the learner waited for completions {window.waited:.0%} of the time"
        return max(workers, wanted), why
    if window.idle is not None:
        fewer = math.ceil(workers * (1.0 - window.idle) / SPARE - 1e-9)
        return min(workers, fewer), f"the workers had no work {window.idle:.0%} of the time"
    return workers, ""
