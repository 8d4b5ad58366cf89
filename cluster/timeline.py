"""Who was busy with what, and when: a Chrome trace (chrome://tracing, Perfetto) of a run."""

from __future__ import annotations

import json
from pathlib import Path

from cluster.runs import write_text

MOST_SPANS = 200_000


class Timeline:
    """Collects spans in seconds of one monotonic clock; ``write`` gives microseconds."""

    def __init__(self) -> None:
        self._rows: dict[str, int] = {}
        self._events: list[dict[str, object]] = []
        self.left_out = 0

    def span(self, row: str, name: str, start: float, end: float) -> None:
        if len(self._events) >= MOST_SPANS:
            self.left_out += 1
            return
        tid = self._rows.setdefault(row, len(self._rows))
        self._events.append(
            {
                "name": name,
                "cat": row,
                "ph": "X",
                "pid": 0,
                "tid": tid,
                "ts": round(start * 1e6),
                "dur": round((end - start) * 1e6),
            }
        )

    def write(self, path: Path) -> None:
        names = [
            {"name": "thread_name", "ph": "M", "pid": 0, "tid": tid, "args": {"name": row}}
            for row, tid in self._rows.items()
        ]
        trace = {
            "traceEvents": names + self._events,
            "otherData": {"spans_left_out": self.left_out},
        }
        write_text(path, json.dumps(trace))
