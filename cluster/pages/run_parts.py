"""What the page of one run shows, made from its files: facts, curves, workers, events. Pure but
for the library, which reads."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.contracts.samples import sampled_steps
from cluster.pages.chart import line_chart
from cluster.pages.library import Library, Shelf
from cluster.runs.control import read_wishes
from cluster.runs.evaluations import EVALUATIONS
from cluster.runs.history import History, WorkerSpan
from cluster.runs.overview import RunOverview, ago, fresh_live, span
from cluster.runs.rows import Row, tail_rows
from learner.evaluation.event_rows import described, notable
from learner.evaluation.lines import STEP, curve_lines, window, with_evaluations
from learner.evaluation.run_files import RunFiles, number

MOST_WORKERS = 40
MOST_EVENTS = 30
MEANINGS = {
    "running": "Its process is alive.",
    "finished": "It has done all its steps.",
    "stopped": "`accord stop` ended it after a step.",
    "interrupted": "Ctrl-C or SIGTERM stopped it.",
    "waiting": "Its judge (people, an endpoint) has not judged all; the same command goes on.",
    "failed": "An error stopped it.",
    "dead": "Its process ended without recording why.",
    "silent": "Its process is on another host and has written nothing for minutes.",
    "damaged": "Its manifest.json cannot be read.",
}


def facts(library: Library, shelf: Shelf) -> dict[str, Any]:
    """The head of the page: where the run stands, what it waits for, what is wrong."""
    run = library.overview(shelf)
    live = fresh_live(shelf.path) if run.status in ("running", "silent") else None
    history = library.history(shelf.path)
    return {
        "run": run,
        "meaning": MEANINGS.get(run.status, ""),
        "latest": run.latest_text(),
        "left": None if run.seconds_left is None else span(run.seconds_left),
        "begun": ago(run.created),
        "sign": ago(run.updated),
        "share": _share(run),
        "live": live,
        "paused": run.status == "running" and _paused(shelf.path),
        "alarms": history.alarms,
        "cause": _cause(run, history),
        "evaluation": _evaluation(shelf.path),
        "dashboard": web_address(history.cluster.get("dashboard"))
        if run.status == "running"
        else None,
    }


def _paused(path: Path) -> bool:
    try:
        return read_wishes(path).paused
    except ValueError:  # the run itself ignores the file, and says so in its events
        return False


def _share(run: RunOverview) -> float | None:
    return min(1.0, run.step / run.steps) if run.steps else None


def _cause(run: RunOverview, history: History) -> str:
    """The first line of what ended the run, where an error did."""
    if run.status != "failed":
        return ""
    failed = [e for e in history.recent if e.get("kind") == "run_failed"]
    return str(failed[-1].get("cause", "")).strip().split("\n")[0] if failed else ""


def _evaluation(path: Path) -> Row | None:
    if not (path / "evaluation.json").is_file():
        return None
    found = RunFiles(path).json_object("evaluation.json") or {}
    keys = ("win_rate", "ci_low", "ci_high", "mean_score_policy", "mean_score_baseline")
    figures: Row = {key: number(found, key) for key in keys}
    return figures if figures["win_rate"] is not None else None


def web_address(value: Any) -> str | None:
    """A link that a file of the run names, where it is one to a web page."""
    if not isinstance(value, str) or not value:
        return None
    if value.startswith(("http://", "https://")):
        return value
    return None if "://" in value or value.lower().startswith("javascript") else f"http://{value}"


# -- curves ---------------------------------------------------------------------------------------


def curves(library: Library, shelf: Shelf) -> dict[str, Any]:
    rows, evaluations = library.rows(shelf.path), tail_rows(shelf.path / EVALUATIONS)
    charts = [
        chart
        for at, (title, lines) in enumerate(curve_lines(with_evaluations(rows, evaluations)))
        if (chart := line_chart(f"curve{at}", title, lines, STEP)) is not None
    ]
    return {"charts": charts, "smoothed": window(len(rows)), "thinned": _thinned(rows)}


def _thinned(rows: Sequence[Row]) -> bool:
    """Whether steps between the first and the last are missing, as the file is long."""
    return bool(rows) and len(rows) < rows[-1]["step"] - rows[0]["step"] + 1


# -- workers --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bar:
    """A time in which a worker served. ``left`` and ``width``: percent of the time shown."""

    left: float
    width: float
    end: str
    text: str


@dataclass(frozen=True, slots=True)
class WorkerRow:
    name: str
    bars: tuple[Bar, ...]


def workers(library: Library, shelf: Shelf) -> dict[str, Any]:
    run = library.overview(shelf)
    running = run.status == "running"
    live = fresh_live(shelf.path) if running else None
    spans = list(library.history(shelf.path).spans)
    now = time.time() if running else run.updated
    rows = worker_rows(spans, now)
    return {
        "live": live,
        "rows": rows[:MOST_WORKERS],
        "left_out": max(0, len(rows) - MOST_WORKERS),
        "from_time": clock(min((s.since for s in spans), default=now)),
        "to_time": "now" if running else clock(now),
    }


def worker_rows(spans: Sequence[WorkerSpan], now: float) -> list[WorkerRow]:
    """A row per worker, in the order in which they joined; times from the first to ``now``."""
    if not spans:
        return []
    first = min(one.since for one in spans)
    length = max(now - first, 1.0)
    rows: dict[str, list[Bar]] = {}
    for one in spans:
        until = now if one.until is None else one.until
        left = 100 * min(1.0, max(0.0, (one.since - first) / length))
        width = 100 * min(1.0, max(0.0, (until - one.since) / length))
        text = f"{one.worker} served {span(until - one.since)} from {clock(one.since)}"
        how = {"": "", "ended": ""}.get(one.end, f"; {one.end}")
        cause = f" ({one.cause.splitlines()[0][:200]})" if one.cause.strip() else ""
        width = min(max(width, 0.4), 100 - left)
        rows.setdefault(one.worker, []).append(Bar(left, width, one.end, text + how + cause))
    return [WorkerRow(name, tuple(bars)) for name, bars in rows.items()]


def clock(moment: float) -> str:
    """Local time of the server; the date too where it is not today's."""
    try:
        then = time.localtime(moment)
    except (OverflowError, ValueError, OSError):
        return "?"
    today = time.localtime()[:3] == then[:3]
    return time.strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M", then)


# -- events ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EventRow:
    when: str
    kind: str
    detail: str
    notable: bool


def events(
    library: Library, shelf: Shelf, most: int = MOST_EVENTS, find: str = "", faults: bool = False
) -> dict[str, Any]:
    """The last ones that fit ``find`` (in any part, large and small letters alike), newest first.
    ``faults``: without the everyday ones."""
    history = library.history(shelf.path)
    fitting = [e for e in reversed(history.recent) if not faults or notable(e)]
    rows = [row for row in map(event_row, fitting) if _has(row, find)]
    return {
        "events": rows[:most],
        "more": max(0, len(rows) - most),
        "counts": history.counts.most_common(),
        "only_recent": history.counts.total() > len(history.recent) or history.began_late,
        "kept": len(history.recent),
    }


def event_row(event: Mapping[str, Any]) -> EventRow:
    told = described(dict(event), 0.0)
    moment = number(event, "time")
    when = "?" if moment is None else clock(moment)
    return EventRow(when, told["kind"], told["detail"], notable(dict(event)))


def _has(row: EventRow, find: str) -> bool:
    return find.casefold() in f"{row.kind} {row.detail}".casefold()


def has_samples(path: Path) -> bool:
    return (path / "samples.jsonl").is_file() or bool(sampled_steps(path))
