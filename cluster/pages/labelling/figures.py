"""The numbers of the admin page: the quality report, and what each annotator has done."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from reward_service.preferences.people import Annotator
from reward_service.preferences.quality import quality_report
from reward_service.preferences.records import Item, Judgement

Judged = Sequence[tuple[Item, Judgement]]
CHEAP_S = 0.2  # a report that is made faster than this is made for every look
REST = 20  # else it stays for this many times the seconds that it took


@dataclass(frozen=True, slots=True, kw_only=True)
class PersonFigures:
    """``quality``: the annotator's row of the quality report; None: no labels yet."""

    annotator: Annotator
    skips: int
    flags: int
    last: str
    quality: dict[str, Any] | None


def person_figures(
    people: Iterable[Annotator], judged: Judged, report: dict[str, Any]
) -> list[PersonFigures]:
    """One per annotator of ``people``, in their order."""
    answers = Counter((one.annotator_id, one.answer) for _, one in judged)
    last: dict[str, str] = {}
    for _, one in judged:
        last[one.annotator_id] = max(one.created_at, last.get(one.annotator_id, ""))
    return [
        PersonFigures(
            annotator=person,
            skips=answers[person.id, "skip"],
            flags=answers[person.id, "flag"],
            last=last.get(person.id, ""),
            quality=report["annotators"].get(person.id),
        )
        for person in people
    ]


class Reports:
    """The quality report of a large store takes a second, in which no page is served. So it is made
    again only after it was of use for a while. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._report: dict[str, Any] = {}
        self._good_until = 0.0

    def of(self, judged: Judged, people: Iterable[Annotator]) -> dict[str, Any]:
        with self._lock:
            began = time.monotonic()
            if began >= self._good_until:
                self._report = quality_report(judged, {one.id: one.team for one in people})
                took = time.monotonic() - began
                self._good_until = began + took * REST if took > CHEAP_S else began
            return self._report
