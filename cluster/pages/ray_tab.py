"""Accord inside Ray's dashboard, with nothing else installed.

The dashboard's Metrics tab is one frame with a page of a Grafana, and its Overview has two frames
with charts of it. It shows them when a Grafana and a Prometheus answer at the addresses that Ray's
head was started with. This app answers the few questions that the head asks, and in place of
Grafana's pages serves Accord's own.

Frames have the token as the first part of their path: Ray hands the address on as it was given.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse
from starlette.requests import Request

from cluster.contracts.live import HISTORY_POINTS, History, LiveView
from cluster.pages.app import new_app, page
from cluster.pages.chart import Chart, line_chart
from cluster.pages.run_parts import EventRow, event_row
from cluster.runs.rows import tail_rows
from learner.evaluation.lines import Line

# What Ray's head asks of a Grafana and a Prometheus before it shows the frames.
GRAFANA_HEALTH = "/api/health"
PROMETHEUS_QUERIES = ("/api/v1/query", "/api/v1/query_range")
OPEN_PATHS = frozenset({GRAFANA_HEALTH, *PROMETHEUS_QUERIES})

LEARNER_PANEL = "24"
"""Of the two panels of Ray's own Grafana page that its Overview shows, the number of nodes. In its
place stands the learner; in place of the other one, 41, the throughput."""
LAST_EVENTS = 12
MOST_LINES = 8  # in one chart: as many colours as the style sheet has
AGO = "seconds, up to now"
ANY_SESSION = ("", "All", ".*", "$__all")


class LiveBoard:
    """The newest view and the workers' throughput of the last minutes. Written by the run's feed,
    read by the pages, each on a thread of its own.

    ``session``: Ray's name for what was started; a dashboard may ask for another one's numbers.
    """

    def __init__(self, run_path: Path, session: str) -> None:
        self.run_path = run_path
        self.session = session
        self._lock = threading.Lock()
        self._view: LiveView | None = None
        self._past: deque[tuple[float, Mapping[str, float]]] = deque(maxlen=HISTORY_POINTS)

    def __call__(self, view: LiveView) -> None:
        with self._lock:
            self._view = view
            self._past.append((view.time, {w.name: w.tokens_per_s for w in view.workers}))

    def view(self) -> LiveView | None:
        with self._lock:
            return self._view

    def throughput(self) -> Chart | None:
        """Of each worker; with many workers, of the first ones and of the others together."""
        with self._lock:
            past = list(self._past)
        names = sorted({name for _, rates in past for name in rates}, key=_number_of)
        own = names if len(names) <= MOST_LINES else names[: MOST_LINES - 1]
        lines = [_line(n, [(at, rates[n]) for at, rates in past if n in rates]) for n in own]
        if len(own) < len(names):
            rest = [
                (at, sum(rate for name, rate in rates.items() if name not in own))
                for at, rates in past
            ]
            lines.append(_line(f"the other {len(names) - len(own)}", rest))
        return line_chart("throughput", "Generated tokens per second, by worker", lines, AGO)

    def learner(self) -> Chart | None:
        past = self._history()
        busy = [(at, 100 * share) for at, share in zip(past.time, past.learner_busy, strict=True)]
        title = "Learner, percent of the last minute in which it trained"
        return line_chart("learner", title, [_line("learner", busy)], AGO)

    def staleness(self) -> Chart | None:
        past = self._history()
        mean = [
            (at, value)
            for at, value in zip(past.time, past.staleness, strict=True)
            if value is not None
        ]
        title = "Staleness, learner steps"
        return line_chart("staleness", title, [_line("mean of a step", mean)], AGO)

    def queue(self) -> Chart | None:
        past = self._history()
        ready = list(zip(past.time, past.ready, strict=True))
        title = "Groups that are ready for the learner"
        return line_chart("queue", title, [_line("ready", ready)], AGO)

    def events(self) -> list[EventRow]:
        """The newest first."""
        rows = tail_rows(self.run_path / "events.jsonl")[-LAST_EVENTS:]
        return [event_row(row) for row in reversed(rows)]

    def _history(self) -> History:
        view = self.view()
        return view.history if view else History()


def ray_tab(board: LiveBoard) -> FastAPI:
    """``OPEN_PATHS`` have to be answered without the token: the head does not have it."""
    app = new_app()

    @app.get(GRAFANA_HEALTH)
    def grafana_health() -> dict[str, str]:
        return {"database": "ok"}

    @app.get("/api/v1/{kind}")
    def prometheus(kind: str) -> dict[str, Any]:
        return {"status": "success", "data": {"resultType": "vector", "result": []}}

    @app.get("/")
    @app.get("/d/{rest:path}")
    def whole(request: Request) -> HTMLResponse:
        return page("ray_tab.html.j2", **_context(board, request, "ray_tab_whole.html.j2"))

    @app.get("/d-solo/{rest:path}")
    def one_chart(request: Request) -> HTMLResponse:
        return page("ray_tab.html.j2", **_context(board, request, "ray_tab_chart.html.j2"))

    @app.get("/parts/{part}")
    def part(request: Request, part: str) -> HTMLResponse:
        body = "ray_tab_chart.html.j2" if part == "chart" else "ray_tab_whole.html.j2"
        return page(body, **_context(board, request, body))

    return app


def _context(board: LiveBoard, request: Request, body: str) -> dict[str, Any]:
    asked = request.query_params
    theme = asked.get("theme", "")
    session = asked.get("var-SessionName", "")
    view = board.view()
    shown: dict[str, Any] = {
        "body": body,
        "root": request.scope.get("root_path", ""),
        "part": "chart" if body == "ray_tab_chart.html.j2" else "whole",
        "query": str(asked),
        "theme": theme if theme in ("light", "dark") else "",
        "foreign": session if session not in (*ANY_SESSION, board.session) else "",
        "view": view,
    }
    if shown["part"] == "chart":
        one = board.learner() if asked.get("panelId") == LEARNER_PANEL else board.throughput()
        return shown | {"chart": one}
    charts: Sequence[Chart | None] = (
        board.throughput(),
        board.learner(),
        board.staleness(),
        board.queue(),
    )
    return shown | {
        "charts": [one for one in charts if one is not None],
        "events": board.events(),
        "age": None if view is None else max(0.0, time.time() - view.time),
    }


def _line(label: str, points: Sequence[tuple[float, float]]) -> Line:
    """``points``: seconds since 1970 and value; drawn by their age."""
    newest = points[-1][0] if points else 0.0
    return Line(label, [at - newest for at, _ in points], [value for _, value in points])


def _number_of(name: str) -> tuple[int, str]:
    number = name.rpartition("-")[2]
    return (int(number) if number.isdecimal() else 0, name)
