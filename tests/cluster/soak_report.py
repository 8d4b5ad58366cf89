"""What a soak tells at its end: books, faults, speed, memory, and what was left behind."""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.runs.checkpoints import Checkpoints, verify_checkpoint

MIB = 1 << 20
SAMPLE_EVERY_S = 5.0
SETTLED_S = 60.0  # what a process takes until then are its libraries and caches
COUNTED = (  # events
    *("worker_lost", "worker_not_joined", "worker_serving", "worker_left", "stale_result_refused"),
    *("learner_lost", "learner_replaced", "rolled_back", "group_retried", "step_retried"),
    *("reward_service_lost", "reward_service_restarted", "sink_failed", "checkpoint_failed"),
)


@dataclass(slots=True)
class Memory:
    """Private memory of the processes of each role: (seconds, MiB), by role and process."""

    taken: dict[tuple[str, int], list[tuple[float, float]]] = field(
        default_factory=lambda: defaultdict(list)
    )

    def sample(self, pids: Mapping[str, Sequence[int]]) -> None:
        now = time.monotonic()
        for role, of_role in pids.items():
            for pid in of_role:
                with suppress(OSError, ValueError):
                    self.taken[role, pid].append((now, private_bytes(pid) / MIB))

    def report(self) -> dict[str, Any]:
        """Of each role, the process that lived longest: how its memory grew once it had settled."""
        found: dict[str, Any] = {}
        for role in sorted({role for role, _ in self.taken}):
            samples = max((s for (r, _), s in self.taken.items() if r == role), key=_span)
            began = samples[0][0]
            settled = [(t, mib) for t, mib in samples if t - began >= SETTLED_S]
            if len(settled) < 3:
                found[role] = {"seconds": round(_span(samples)), "MiB": round(samples[-1][1])}
                continue
            slope, _ = statistics.linear_regression(*zip(*settled, strict=True))
            found[role] = {
                "seconds": round(_span(samples)),
                "MiB after a minute": round(settled[0][1], 1),
                "MiB at the end": round(settled[-1][1], 1),
                "MiB per minute": round(slope * 60, 2),
            }
        return found


def _span(samples: Sequence[tuple[float, float]]) -> float:
    return samples[-1][0] - samples[0][0]


def private_bytes(pid: int) -> int:
    """Anonymous memory: without the object store and the libraries, which others share."""
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) << 10


@contextmanager
def watched(pids: Callable[[], Mapping[str, Sequence[int]]]) -> Iterator[Memory]:
    """Sample the memory of ``pids()`` (role -> processes) beside what is done within."""
    memory, ended = Memory(), threading.Event()

    def look() -> None:
        while not ended.wait(SAMPLE_EVERY_S):
            memory.sample(pids())

    thread = threading.Thread(target=look, name="memory")
    thread.start()
    try:
        yield memory
    finally:
        ended.set()
        thread.join()


def run_totals(run: Path, audit: Mapping[str, Any]) -> dict[str, Any]:
    """From the files of a run that has ended and the answer of `accord audit --json`."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = rows[-1]["time"] - rows[0]["time"]
    events: Counter[str] = Counter()
    for line in (run / "events.jsonl").read_text().splitlines():
        events[json.loads(line)["kind"]] += 1
    kept = Checkpoints(run / "checkpoints", lambda *_, **__: None).complete()
    return {
        "steps": audit["steps"],
        "groups": {name: audit[name] for name in ("issued", "trained", "dropped", "in_flight")},
        "completions": audit["samples"],
        "tokens per second": round(audit["tokens"] / seconds, 1),
        "resumes": audit["sessions"] - 1,
        "steps done again": audit["redone"],
        "results refused": audit["refused"],
        "steps whose versions were checked by token": audit["files"],
        "violations": audit["violations"],
        "events": {name: events[name] for name in COUNTED if events[name]},
        "checkpoints": {
            "written": events["checkpoint"],
            "kept": len(kept),
            "damaged": [p.name for p in kept if verify_checkpoint(p) is not None],
        },
    }


def unfinished_files(run: Path) -> list[str]:
    """What a process that was killed had begun to write: such names begin with a dot."""
    return sorted(str(path.relative_to(run)) for path in run.rglob(".*"))
