"""Who was busy with what, and when: a Chrome trace (chrome://tracing, Perfetto) of a run."""

from __future__ import annotations

import json
from pathlib import Path

from cluster.contracts.durable import write_text
from cluster.contracts.records import SwapReport

MOST_SPANS = 200_000
MOST_SWAPS = 100_000  # of them: the learner's spans always have room


class Timeline:
    """Collects spans in seconds of one monotonic clock; ``write`` gives microseconds."""

    def __init__(self) -> None:
        self._rows: dict[str, int] = {}
        self._events: list[dict[str, object]] = []
        self._swaps = 0
        self.left_out = 0

    def __len__(self) -> int:
        return len(self._events)

    def span(self, row: str, name: str, start: float, end: float, **detail: float) -> None:
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
                **({"args": detail} if detail else {}),
            }
        )

    def swap(self, worker: str, report: SwapReport, asked: float, served: float) -> None:
        """One worker's weight update, from when it was asked for until it served the version; the
        seconds its generation stood still are among the details."""
        # Thousands of workers swap at every step: alone they would fill the file within minutes.
        if self._swaps >= MOST_SWAPS:
            self.left_out += 1
            return
        self._swaps += 1
        self.span(
            f"swaps of {worker}",
            f"swap to {report.version}",
            asked,
            served,
            pause_s=report.pause_s,
            fetch_s=report.fetch_s,
            verify_s=report.verify_s,
            stage_s=report.stage_s,
            prove_s=report.prove_s,
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
