"""When the groups of a step are admitted: pure accounting of times, no clock, no asyncio, no Ray.

The staleness bound says how early a group may be admitted. Where the learner is the slower side,
that is earlier than needed: completions are made by old weights and then wait. The pacer holds the
groups of a step back until they are needed:

    admission = expected start of the step - lead

``lead`` is how long the groups of a step took lately, from admission until the last of them was
there (95th percentile of the last 20 steps), and a margin. Where the workers are the slower side,
the lead is longer than what is left until the step, so nothing is held back.

If the learner waits for groups that were held back, the margin grows by as much as it waited. With
every step that finds its groups there, it shrinks a little. Until some steps were measured, and
whenever the expected start is past, nothing is held back. The steps that the bound allows at the
start are not measured: they are admitted together and wait for each other, and for engines that do
their first work. Nor are those that are admitted while these are still generated. The pacer only
ever delays what the bound allows, so it cannot break the bound.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median

# So many have to be known before anything is held back.
LEAST_LATENCIES = 2
LEAST_DURATIONS = 3  # the learner's first step takes longer than the others
LATENCIES = 20  # steps that the 95th percentile is taken of: one slow step in them does not count
DURATIONS = 8  # steps that the learner's median is taken of
LEAST_MARGIN = 0.15  # in learner steps
SHRINK = 0.9


@dataclass(slots=True)
class Pacer:
    """``fixed``: admit the groups of a step when at most so many steps stand before it; None: as
    measured. All times are seconds of one clock."""

    fixed: int | None = None
    next_step: int = 0  # the one that the learner does or waits for
    _began: float | None = None  # when the learner began ``next_step``; None: it has not
    _idle_since: float | None = None
    _margin: float = LEAST_MARGIN  # in learner steps
    _admitted: dict[int, float] = field(default_factory=dict)  # step -> when, until it is complete
    _at_start: set[int] = field(default_factory=set)  # of the open ones: admitted at the start
    _crowded: set[int] = field(default_factory=set)  # these, and those admitted beside them
    _held_back: set[int] = field(default_factory=set)  # admitted later than the bound allowed
    _latencies: deque[float] = field(default_factory=lambda: deque(maxlen=LATENCIES))
    _durations: deque[float] = field(default_factory=lambda: deque(maxlen=DURATIONS))

    @property
    def open_steps(self) -> tuple[int, ...]:
        """Admitted and not complete."""
        return tuple(self._admitted)

    @property
    def lead_s(self) -> float:
        """How long before its expected start a step is admitted; 0 as long as it is not known."""
        return self._latency() + self._margin * median(self._durations) if self._measured else 0.0

    def due(self, step: int, now: float) -> float:
        """When the groups of ``step`` are to be admitted: ``now`` at the latest means at once."""
        if self.fixed is not None:
            return now if step <= self.next_step + self.fixed else float("inf")
        if not self._measured or step <= self.next_step:
            return now
        due = self._expected_start(step, now) - self.lead_s
        if due > now:
            self._held_back.add(step)
        return due

    def admitted(self, step: int, now: float) -> None:
        if self._began is None and not self._durations:
            self._at_start.add(step)
        if self._at_start:
            self._crowded.add(step)
        self._admitted[step] = now

    def complete(self, step: int, now: float) -> None:
        """All groups of ``step`` are there."""
        took = now - self._admitted.pop(step)
        self._at_start.discard(step)
        if step in self._crowded:
            self._crowded.remove(step)
        else:
            self._latencies.append(took)

    def step_began(self, now: float) -> None:
        """The learner begins ``next_step``, which it may have waited for."""
        waited = now - self._idle_since if self._idle_since is not None else 0.0
        if self._measured:
            typical = median(self._durations)
            if self.next_step in self._held_back and waited > 0.01 * typical:
                self._margin += min(1.0, waited / typical)
            else:
                self._margin = max(LEAST_MARGIN, self._margin * SHRINK)
        self._held_back.discard(self.next_step)
        self._began, self._idle_since = now, None

    def step_ended(self, now: float) -> None:
        if self._began is not None:
            self._durations.append(now - self._began)
        self.next_step += 1
        self._began, self._idle_since = None, now

    def step_failed(self) -> None:
        """``next_step`` has to be done again, so its time says nothing."""
        self._began, self._idle_since = None, None

    @property
    def _measured(self) -> bool:
        return len(self._latencies) >= LEAST_LATENCIES and len(self._durations) >= LEAST_DURATIONS

    def _latency(self) -> float:
        ordered = sorted(self._latencies)
        return ordered[round(0.95 * (len(ordered) - 1))]

    def _expected_start(self, step: int, now: float) -> float:
        typical = median(self._durations)
        if self._began is None:  # ``next_step`` has to begin first: at once, at best
            return now + (step - self.next_step) * typical
        ends = max(now, self._began + typical)
        return ends + (step - self.next_step - 1) * typical
