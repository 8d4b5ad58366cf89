"""What the events of a run add up to: its workers over time, its alarms, how often what happened.

Events are fed one by one, so that a page that follows a run pays for new events only.
"""

from __future__ import annotations

import copy
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cluster.runs.rows import Follower, Row

MOST_RECENT = 500  # events that are kept whole
MOST_SPANS = 2000
BEGINS = "worker_serving"
ENDS = {"worker_lost": "lost", "worker_left": "left"}


@dataclass(slots=True)
class WorkerSpan:
    """A time in which a worker served, in seconds since 1970. ``until`` None: it still does.
    ``end``: "", "lost", "left", or "ended" where the loop was started again without it."""

    worker: str
    since: float
    until: float | None = None
    end: str = ""
    cause: str = ""


class History:
    """``began_late``: so many events that the first ones are not in it."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.recent: deque[Row] = deque(maxlen=MOST_RECENT)
        self.spans: deque[WorkerSpan] = deque(maxlen=MOST_SPANS)
        self.cluster: Row = {}
        self.cores: Row = {}  # who runs on which core, as it was decided last
        self.began_late = False
        self._open: dict[str, WorkerSpan] = {}
        self._alarms: dict[str, str] = {}

    @property
    def serving(self) -> list[str]:
        """Workers that joined and have not left since the loop was started last."""
        return list(self._open)

    @property
    def alarms(self) -> list[str]:
        """What the alarms say that have begun and not ended."""
        return list(self._alarms.values())

    def snapshot(self) -> History:
        """A copy that later events do not change."""
        copied = copy.copy(self)
        copied.counts = self.counts.copy()
        copied.recent = self.recent.copy()
        copied.spans = deque((copy.copy(span) for span in self.spans), MOST_SPANS)
        copied._open, copied._alarms = dict(self._open), dict(self._alarms)
        return copied

    def add(self, event: Row) -> None:
        kind = str(event.get("kind", "?"))
        self.counts[kind] += 1
        self.recent.append(event)
        if kind == "cluster":
            self.cluster, self.cores = event, {}
            for worker in self.serving:
                self._end(worker, event, "ended")
        elif kind == "cores_dealt_out":
            self.cores = event
        elif kind == BEGINS:
            self._begin(event)
        elif kind in ENDS:
            self._end(str(event.get("worker", "?")), event, ENDS[kind])
        elif kind == "alarm":
            self._alarm(event)

    def _begin(self, event: Row) -> None:
        worker = str(event.get("worker", "?"))
        self._end(worker, event, "ended")
        span = WorkerSpan(worker, _moment(event))
        self._open[worker] = span
        self.spans.append(span)

    def _end(self, worker: str, event: Row, how: str) -> None:
        span = self._open.pop(worker, None)
        if span is not None:
            span.until, span.end = _moment(event), how
            span.cause = str(event.get("cause", "")) if how != "ended" else ""

    def _alarm(self, event: Row) -> None:
        name = str(event.get("alarm", "?"))
        self._alarms.pop(name, None)
        if event.get("change") in ("start", "again"):
            self._alarms[name] = str(event.get("text", name))


class FollowedHistory:
    """The history of a run directory, kept up to date by ``read``."""

    def __init__(self, run_dir: Path) -> None:
        self._follower = Follower(run_dir / "events.jsonl")
        self._history = History()

    def read(self) -> History:
        rows = self._follower.new_rows()
        if self._follower.restarted:
            self._history = History()
        for row in rows:
            self._history.add(row)
        self._history.began_late = self._follower.began_late
        return self._history


def history_of(events: Iterable[Row]) -> History:
    history = History()
    for event in events:
        history.add(event)
    return history


def _moment(event: Row) -> float:
    moment = event.get("time")
    known = isinstance(moment, int | float) and not isinstance(moment, bool) and abs(moment) < 1e12
    return float(moment) if known and moment is not None else 0.0
