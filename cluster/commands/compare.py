"""`accord compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.commands.options import RUN, Json
from cluster.contracts.errors import UserError

if TYPE_CHECKING:
    from learner.evaluation.comparison import ComparedRun


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Two to four run directories.", **RUN),
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Also write a page with the curves.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare runs: settings, metrics, curves.

    The command prints the settings that differ, the last and the best value of each metric, and
    small curves of the main ones. --out also writes a page with larger curves of all metrics.

    Example: `accord compare runs/first runs/second --out compare.html`
    """
    import json

    from cluster.runs.console import result
    from cluster.runs.run import Run
    from learner.evaluation.comparison import MOST_RUNS, read_runs

    if not 2 <= len(runs) <= MOST_RUNS:
        raise UserError(
            f"cannot compare {len(runs)} run{'s' * (len(runs) > 1)}",
            where="accord compare",
            fix=f"give 2 to {MOST_RUNS} run directories: accord compare runs/first runs/second",
        )
    found = read_runs([Run.open(str(run)).path for run in runs])
    if out is not None:
        _write(found, out)
    result(json.dumps(_record(found)) if as_json else "\n".join(_lines(found, out)))


def _write(runs: list[ComparedRun], out: Path) -> None:
    from learner.evaluation.compare_page import write_comparison

    try:
        write_comparison(runs, out)
    except OSError as problem:
        raise UserError(
            f"cannot be written: {problem.strerror}",
            where=str(out),
            fix="give a file in a folder that exists and that you may write to",
        ) from None


def _lines(runs: list[ComparedRun], out: Path | None) -> list[str]:
    from cluster.runs.text_table import text_table
    from learner.evaluation.comparison import HEADLINES, differing_settings, metric_rows

    letters = [run.letter for run in runs]
    rows = metric_rows(runs)
    settings = text_table(
        ("settings that differ", *letters),
        [(key, *map(_cut, values)) for key, values in differing_settings(runs)],
    )
    numbers = text_table(
        ("metrics", *(f"{x} last" for x in letters), *(f"{x} best (step)" for x in letters)),
        [(row.title, *map(_number, row.last), *map(_best, row.best)) for row in rows],
        right="l" + "r" * 2 * len(runs),
    )
    page = f"page with all curves: {out}" if out else "for a page with all curves: --out FILE.html"
    return [
        *(f"{run.letter}: {run.path} ({run.command}, {run.status})" for run in runs),
        "",
        *(settings if len(settings) > 1 else ["all settings are the same"]),
        "",
        *(numbers if rows else ["none of the runs has metrics"]),
        "",
        *_curves(runs, [(row.metric, row.title) for row in rows if row.metric in HEADLINES]),
        page,
    ]


def _curves(runs: list[ComparedRun], metrics: list[tuple[str, str]]) -> list[str]:
    """A block per metric: a line of bars per run, with the lowest and highest value beside it."""
    from learner.evaluation.comparison import sparklines

    lines = []
    for metric, title in metrics:
        lines.append(title)
        for run, bars in zip(runs, sparklines(runs, metric), strict=True):
            values = run.series.get(metric, ([], []))[1]
            if values:
                lines.append(f"  {run.letter} {bars}  {min(values):.4g} to {max(values):.4g}")
    return [*lines, ""] if lines else []


def _record(runs: list[ComparedRun]) -> dict[str, Any]:
    from dataclasses import asdict

    from learner.evaluation.comparison import differing_settings, metric_rows

    return {
        "runs": {run.letter: str(run.path) for run in runs},
        "settings": dict(differing_settings(runs)),
        "metrics": {row.metric: asdict(row) for row in metric_rows(runs)},
    }


def _cut(text: str) -> str:
    """The end of a long value, such as a path, says more than its beginning."""
    return text if len(text) <= 32 else "…" + text[-31:]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _best(found: tuple[float, int] | None) -> str:
    return "-" if found is None else f"{found[0]:.4g} ({found[1]})"
