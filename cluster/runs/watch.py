"""`accord status RUN --watch`: the state of a run in a terminal, kept fresh until the run ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cluster.runs.console import plain_text, shown
from cluster.runs.history import FollowedHistory, History
from cluster.runs.overview import overview
from cluster.runs.run import Run
from cluster.runs.status import (
    address_lines,
    headline,
    live_lines,
    number_text,
    read_status,
)

EVERY_S = 1.0
LAST_EVENTS = 6
COLUMNS = ("worker", "status", "tokens/s", "busy", "decoding", "waiting", "version", "heard of")


def watch(run: Run, console: Console, sleep: Callable[[float], None] = time.sleep) -> None:
    """Until the run is no longer running, or Ctrl-C."""
    followed = FollowedHistory(run.path)
    with Live(console=console, auto_refresh=False, transient=False) as screen:
        while True:
            history = followed.read()
            status = read_status(run, history)
            screen.update(view(run, status, history), refresh=True)
            if status["status"] != "running":
                return
            sleep(EVERY_S)


def view(run: Run, status: dict[str, Any], history: History) -> RenderableType:
    facts = overview(run.path, sized=False)
    parts: list[RenderableType] = [_line(headline(facts), "bold")]
    if facts.steps:
        parts.append(ProgressBar(total=facts.steps, completed=facts.step, width=60))
    if numbers := shown(facts.metrics):
        parts.append(_line(f"  {numbers}"))
    live = status["live"]
    parts += [_line(line) for line in live_lines(live, status["heartbeat_age_s"])]
    parts += [_line(f"  alarm: {text}", "bold red") for text in status["alarms"]]
    if live and live["workers"]:
        parts.append(_workers(live["workers"]))
    parts += [_line(line, "dim") for line in address_lines(status)]
    recent = list(history.recent)[-LAST_EVENTS:]
    parts += [_line(_event_text(event), "dim") for event in recent]
    return Group(*parts)


def _workers(workers: Any) -> Table:
    table = Table(*COLUMNS, box=None, pad_edge=True)
    for worker in workers[:30]:
        age = worker["heartbeat_age_s"]
        table.add_row(
            *(
                Text(plain_text(str(cell)))
                for cell in (
                    worker["name"],
                    f"{worker['status']}{', silent' if worker['silent'] else ''}",
                    number_text(worker["tokens_per_s"]),
                    number_text(worker["busy"]),
                    number_text(worker["running"]),
                    number_text(worker["waiting"]),
                    number_text(worker["version"]),
                    "starting" if age is None else f"{number_text(age)} s ago",
                )
            ),
            style="red" if worker["silent"] else None,
        )
    return table


def _event_text(event: dict[str, Any]) -> str:
    moment = event.get("time")
    try:
        when = time.strftime("%H:%M:%S", time.localtime(moment))
    except (TypeError, ValueError, OverflowError, OSError):
        when = "?"
    rest = ", ".join(f"{k} {v}" for k, v in event.items() if k not in ("time", "kind"))
    return f"  {when} {event.get('kind', '?')}: {rest}"[:400]


def _line(text: str, style: str = "") -> Text:
    """Control characters of a file cannot reach the terminal."""
    return Text(plain_text(text).replace("\n", " "), style=style, overflow="ellipsis", no_wrap=True)
