"""What the files of a run directory say in a few facts, for `accord runs` and `accord status`.

Nothing here raises for a missing or damaged file, so that one bad run does not hide the others.
"""

from __future__ import annotations

import itertools
import stat
import statistics
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from cluster.contracts.live import LIVE, LiveView, read_live
from cluster.runs.driver import driver_of
from cluster.runs.rows import Row, parse_object, tail_rows

RATE_STEPS = 20  # the time left follows from the median duration of this many last steps

FRESH_S = 15.0  # an older live.json says what was, not what is
SILENT_AFTER_S = 120.0  # without any file written, where the driver's process cannot be seen
LATEST = {  # metric -> its name for people; the first that a run has is shown
    "objective/scores": "reward",
    "rm/accuracy": "accuracy",
    "rewards/accuracies": "accuracy",
    "eval/accuracy": "accuracy",
    "eval/loss": "loss",
    "train/loss": "loss",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOverview:
    """``status``: running, dead (its process ended without a word), silent (on another host, and
    without a sign of life), finished, failed, interrupted or damaged (its manifest cannot be read).
    ``steps``: asked for, where the config says so. ``created`` and ``updated``: seconds since the
    epoch; ``seconds_left`` of a running run only. ``size_bytes``: None where nobody asked."""

    name: str
    path: Path
    command: str
    status: str
    step: int
    steps: int | None
    created: float | None
    updated: float
    seconds_left: float | None
    metrics: Mapping[str, Any]
    size_bytes: int | None

    def latest(self) -> tuple[str, float] | None:
        """("reward", 0.25): the number that says how the run does."""
        for metric, name in LATEST.items():
            if _is_number(self.metrics.get(metric)):
                return name, float(self.metrics[metric])
        return None

    def latest_text(self) -> str:
        """reward +0.250; empty when there is no such number."""
        latest = self.latest()
        if latest is None:
            return ""
        name, value = latest
        return f"{name} {value:+.3f}" if name == "reward" else f"{name} {value:.3f}"

    def record(self) -> Row:
        """For --json."""
        latest = self.latest()
        return {
            "name": self.name,
            "path": str(self.path),
            "command": self.command,
            "status": self.status,
            "step": self.step,
            "steps": self.steps,
            "created": self.created,
            "updated": self.updated,
            "seconds_left": self.seconds_left,
            "latest": dict([latest]) if latest else {},
            "size_bytes": self.size_bytes,
        }


def find_runs(directory: Path) -> list[Path]:
    """Run directories in ``directory``, newest last, each before those inside it (the stages of a
    pipeline)."""
    outer = [p.parent for p in directory.glob("*/manifest.json")]
    outer.sort(key=lambda path: (_created(_manifest(path)) or 0.0, path.name))
    return [path for run in outer for path in (run, *_stages(run))]


def _stages(run: Path) -> list[Path]:
    """Runs inside a run: of a pipeline, in the order in which they began."""
    found = [p.parent for place in ("*", "round-*/*") for p in run.glob(f"{place}/manifest.json")]
    return sorted(found, key=lambda path: (_created(_manifest(path)) or 0.0, str(path)))


def overview(path: Path, name: str | None = None, *, sized: bool = True) -> RunOverview:
    """``sized``: also add up the size of all files, which takes long where there are many."""
    manifest = _manifest(path)
    command = str(manifest.get("command", "?"))
    rows = [row for row in tail_rows(path / "metrics.jsonl") if _is_number(row.get("step"))]
    last = rows[-1] if rows else {}
    status = status_of(path, manifest)
    steps = _steps_asked(path) if command == "train" else None
    step = int(last.get("step", 0))
    return RunOverview(
        name=name or str(manifest.get("name", path.name)),
        path=path,
        command=command,
        status=status,
        step=step,
        steps=steps,
        created=_created(manifest),
        updated=_last_written(path),
        seconds_left=_seconds_left(rows, step, steps) if status == "running" else None,
        metrics={name: value for name, value in last.items() if _is_number(value)},
        size_bytes=sum(_stat(p)[1] for p in path.rglob("*")) if sized else None,
    )


def live_status(known: RunOverview) -> RunOverview:
    """``known`` with what changes although its files do not: a process that ended without a word,
    and the last sign of life."""
    status = status_of(known.path, _manifest(known.path))
    left = known.seconds_left if status == "running" else None
    return replace(known, status=status, seconds_left=left, updated=_last_written(known.path))


def status_of(path: Path, manifest: Mapping[str, Any]) -> str:
    """A run whose manifest says running is dead when its process is gone: a killed process cannot
    write that down. A process on another host cannot be looked at from here. It is believed, unless
    it kept ``live.json`` fresh and has stopped doing so: then it is silent."""
    written = str(manifest.get("status", "damaged"))
    driver = driver_of(path) if written == "running" else None
    if driver is None:
        return written
    alive = driver.alive()
    if alive is None and (path / LIVE).exists():
        return "silent" if time.time() - _last_written(path) > SILENT_AFTER_S else "running"
    return "dead" if alive is False else "running"


def heartbeat_age(path: Path) -> float | None:
    """Seconds since the driver last wrote ``live.json``; None where it has not."""
    moment = _stat(path / LIVE)[0]
    return max(0.0, time.time() - moment) if moment else None


def fresh_live(path: Path) -> LiveView | None:
    """None where the driver has not written for a while: old numbers would look like today's."""
    age = heartbeat_age(path)
    return read_live(path) if age is not None and age < FRESH_S else None


def _seconds_left(rows: Sequence[Row], step: int, steps: int | None) -> float | None:
    """The median leaves out the pause before a resume, and the first row the start of the run."""
    moments: list[float] = [row["time"] for row in rows if _is_number(row.get("time"))]
    if steps is None or len(moments) < 2 or step >= steps:
        return None
    durations = (b - a for a, b in itertools.pairwise(moments[-RATE_STEPS - 1 :]))
    return statistics.median(durations) * (steps - step)


def _is_number(value: Any) -> bool:
    """Of a size that arithmetic can go on with: JSON has integers of any length."""
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return known and abs(value) < sys.float_info.max


def _manifest(path: Path) -> Row:
    try:
        return parse_object((path / "manifest.json").read_bytes()) or {}
    except OSError:
        return {}


def _steps_asked(path: Path) -> int | None:
    try:
        tree = tomllib.loads((path / "config.toml").read_text(encoding="utf-8"))
        return int(tree["batch"]["steps"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _created(manifest: Mapping[str, Any]) -> float | None:
    try:
        return datetime.fromisoformat(str(manifest["created"])).timestamp()
    except (KeyError, ValueError, OverflowError):
        return None


def _last_written(path: Path) -> float:
    names = ("manifest.json", "metrics.jsonl", "events.jsonl", LIVE)
    return max(_stat(path / name)[0] for name in names)


def _stat(path: Path) -> tuple[float, int]:
    """(time of the last change, bytes) of a file; zeros when it is gone, as a run also deletes."""
    try:
        found = path.lstat()
    except OSError:
        return 0.0, 0
    return found.st_mtime, found.st_size if stat.S_ISREG(found.st_mode) else 0


def span(seconds: float) -> str:
    """4 s, 12 min, 3.5 h, 2.1 days."""
    if seconds < 90:
        return f"{max(0.0, seconds):.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"


def ago(moment: float | None) -> str:
    return "?" if moment is None else f"{span(time.time() - moment)} ago"


def size(count: int) -> str:
    """812 B, 3.1 MB, 2.4 GB (powers of ten)."""
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 999.5:
            return (
                f"{amount:.0f} {unit}" if unit == "B" or amount >= 99.5 else f"{amount:.1f} {unit}"
            )
        amount /= 1000
    return f"{amount:.1f} TB"
