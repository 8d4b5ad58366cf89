"""`accord ui`: all runs of a folder, one run live, its completions, events and files, and runs
compared. Every page only reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Query
from fastapi.responses import Response

from cluster.contracts.errors import UserError
from cluster.pages import run_parts
from cluster.pages.app import new_app, page
from cluster.pages.chart import line_chart
from cluster.pages.library import Library, Shelf
from cluster.pages.run_files import download, listed
from cluster.pages.run_samples import ORDERS, Samples, pair_page, shown, step_page
from cluster.runs.overview import ago
from learner.evaluation.comparison import (
    MOST_RUNS,
    ComparedRun,
    differing_settings,
    metric_rows,
    read_runs,
)
from learner.evaluation.lines import STEP, Line
from learner.evaluation.run_files import RunFiles, number

LONGEST_SEARCH = 200
PER_PAGE = 100  # runs
# A report is a page of its own, with its styles inside; it may do nothing else.
REPORT_POLICY = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:"

Part = Callable[[Library, Shelf], dict[str, Any]]
PARTS: dict[str, Part] = {
    "facts": run_parts.facts,
    "curves": run_parts.curves,
    "workers": run_parts.workers,
    "events": run_parts.events,
}

Find = Annotated[str, Query(max_length=LONGEST_SEARCH)]
PageNumber = Annotated[int, Query(ge=1, le=1_000_000, alias="page")]


def ui_app(library: Library) -> FastAPI:
    app = new_app()
    _add_runs(app, library)
    _add_samples(app, library)
    _add_files(app, library)
    return app


def _add_runs(app: FastAPI, library: Library) -> None:
    @app.get("/")
    def runs(find: Find = "", number_of: PageNumber = 1) -> Response:
        return page("runs.html.j2", **_runs(library, find, number_of))

    @app.get("/part/runs")
    def runs_part(find: Find = "", number_of: PageNumber = 1) -> Response:
        return page("part_runs.html.j2", **_runs(library, find, number_of))

    @app.get("/run/{key:path}")
    def run(key: str) -> Response:
        shelf = _shelf(library, key)
        context = {name: part(library, shelf) for name, part in PARTS.items()}
        return page("run.html.j2", **_around(library, shelf), parts=context)

    @app.get("/part/{name}/{key:path}")
    def part(name: str, key: str) -> Response:
        if name not in PARTS:
            raise HTTPException(404, "A page has no such part.")
        shelf = _shelf(library, key)
        return page(f"part_{name}.html.j2", shelf=shelf, part=PARTS[name](library, shelf))

    @app.get("/events/{key:path}")
    def events(key: str, find: Find = "", faults: bool = False) -> Response:
        shelf = _shelf(library, key)
        part = run_parts.events(library, shelf, 500, find, faults)
        around = _around(library, shelf)
        return page("events.html.j2", **around, part=part, find=find, faults=faults)

    @app.get("/compare")
    def compare(run: Annotated[list[str], Query(max_length=100)] = []) -> Response:  # noqa: B006
        return page("compare.html.j2", **_comparison(library, run))


def _add_samples(app: FastAPI, library: Library) -> None:
    samples = Samples()

    @app.get("/samples/{key:path}")
    def of_run(
        key: str,
        step: Annotated[int | None, Query(ge=1, le=10**9)] = None,
        order: str = "best",
        find: Find = "",
        number_of: PageNumber = 1,
    ) -> Response:
        shelf = _shelf(library, key)
        order = order if order in ORDERS else "best"
        asked = {"order": order, "orders": ORDERS, "find": find, **_around(library, shelf)}
        try:
            if run_parts.sampled_steps(shelf.path):
                found = step_page(samples, shelf.path, step, order, find, number_of)
                return page("samples.html.j2", **asked, **found)
            if (shelf.path / "samples.jsonl").is_file():
                found = pair_page(samples, shelf.path, order, find, number_of)
                return page("pairs.html.j2", **asked, **found)
        except UserError as problem:
            return page("no_samples.html.j2", **asked, why=str(problem))
        why = "This run has no completions on disk (logging.save_rollouts)."
        return page("no_samples.html.j2", **asked, why=why)

    @app.get("/sample/{step}/{at}/{key:path}")
    def one(key: str, step: int, at: int) -> Response:
        shelf = _shelf(library, key)
        try:
            found = samples.of_step(shelf.path, step)
        except UserError as problem:
            raise HTTPException(404, str(problem)) from None
        if not 0 <= at < len(found):
            raise HTTPException(404, f"Step {step} has {len(found)} completions.")
        item = shown(found[at], at)
        return page("sample.html.j2", **_around(library, shelf), step=step, item=item)


def _add_files(app: FastAPI, library: Library) -> None:
    @app.get("/files/{key:path}")
    def files(key: str) -> Response:
        shelf = _shelf(library, key)
        rows, more = listed(shelf.path)
        return page("files.html.j2", **_around(library, shelf), files=rows, more=more)

    @app.get("/download/{key:path}")
    def one_file(key: str, file: str) -> Response:
        found = download(_shelf(library, key).path, file)
        if found is None:
            raise HTTPException(404, "The run has no such file.")
        return found

    @app.get("/report/{key:path}")
    def report(key: str) -> Response:
        path = _shelf(library, key).path / "report.html"
        if path.is_symlink() or not path.is_file():
            raise HTTPException(404, "The run has no report yet; `accord report` writes it.")
        policy = {"content-security-policy": REPORT_POLICY}
        return Response(path.read_bytes(), media_type="text/html; charset=utf-8", headers=policy)


def _shelf(library: Library, key: str) -> Shelf:
    shelf = library.shelf(key)
    if shelf is None:
        raise HTTPException(404, f"There is no run {key[:200]} in this folder.")
    return shelf


def _around(library: Library, shelf: Shelf) -> dict[str, Any]:
    """What every page of a run shows beside its content."""
    return {
        "shelf": shelf,
        "has_samples": run_parts.has_samples(shelf.path),
        "has_report": (shelf.path / "report.html").is_file(),
        "stages": [one for one in library.shelves() if one.key.startswith(f"{shelf.key}/")],
    }


def _runs(library: Library, find: str, number_of: int) -> dict[str, Any]:
    fitting = [one for one in library.shelves() if find.casefold() in one.key.casefold()]
    pages = max(1, -(-len(fitting) // PER_PAGE))
    at = min(number_of, pages)
    rows = []
    for shelf in fitting[(at - 1) * PER_PAGE : at * PER_PAGE]:
        run = library.overview(shelf)
        rows.append(
            {"shelf": shelf, "run": run, "begun": ago(run.created), "sign": ago(run.updated)}
        )
    return {
        "folder": str(library.folder),
        "rows": rows,
        "total": len(fitting),
        "find": find,
        "page": at,
        "pages": pages,
    }


def _comparison(library: Library, keys: list[str]) -> dict[str, Any]:
    shelves = [_shelf(library, key) for key in dict.fromkeys(keys)]
    if not 2 <= len(shelves) <= MOST_RUNS:
        raise HTTPException(400, f"Choose 2 to {MOST_RUNS} runs on the first page.")
    runs = read_runs([shelf.path for shelf in shelves], library.rows)
    rows = metric_rows(runs)
    charts = [
        chart
        for at, row in enumerate(rows)
        if (chart := line_chart(f"curve{at}", row.title, _lines(runs, row.metric), STEP))
    ]
    judged = [_win_rate(run.path) for run in runs]
    return {
        "runs": list(zip(runs, shelves, judged, strict=True)),
        "judged": any(judged),
        "settings": differing_settings(runs),
        "metrics": rows,
        "charts": charts,
    }


def _lines(runs: list[ComparedRun], metric: str) -> list[Line]:
    return [Line(run.letter, *run.series[metric]) for run in runs if metric in run.series]


def _win_rate(path: Path) -> dict[str, float | None]:
    """Empty where the run was not evaluated."""
    if not (path / "evaluation.json").is_file():
        return {}
    found = RunFiles(path).json_object("evaluation.json") or {}
    keys = ("win_rate", "ci_low", "ci_high", "mean_score_policy", "mean_score_baseline", "pairs")
    figures = {key: number(found, key) for key in keys}
    return figures if figures["win_rate"] is not None else {}
