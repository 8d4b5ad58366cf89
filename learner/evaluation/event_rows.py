"""The events of a run, for people: which are worth reading, and what they say. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from learner.evaluation.page import plain
from learner.evaluation.run_files import Row, number

# Events of a run in which nothing went wrong; every other kind, known or not, is listed singly.
EVERYDAY = frozenset(
    {
        "alarm",  # listed at the top
        "checkpoint",
        "cluster",
        "learner_ready",
        "loop_started",
        "rows",
        "run_finished",
        "swap",
        "worker_draining",
        "worker_serving",
    }
)


def notable(event: Row) -> bool:
    return str(event.get("kind")) not in EVERYDAY


def event_counts(events: Sequence[Row]) -> list[tuple[str, int]]:
    return Counter(str(event.get("kind", "no kind")) for event in events).most_common()


def described(event: Row, start: float) -> dict[str, Any]:
    """``start`` is the time of the first event: what is shown is how long after it."""
    at = number(event, "time")
    rest = {key: value for key, value in event.items() if key not in ("time", "kind", "detail")}
    detail = event.get("detail", "")
    return {
        "time": event.get("time") if at is None else at - start,
        "kind": str(event.get("kind", "no kind")),
        "detail": ", ".join(plain(part) for part in (detail, rest) if part),
    }
