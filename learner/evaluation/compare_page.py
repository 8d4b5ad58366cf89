"""The comparison of runs as a page: tables and one chart per metric, a line per run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from learner.evaluation import charts
from learner.evaluation.comparison import ComparedRun, differing_settings, metric_rows
from learner.evaluation.lines import Line
from learner.evaluation.page import render
from learner.evaluation.run_files import write_atomic


def write_comparison(runs: Sequence[ComparedRun], path: Path) -> Path:
    """Write the page to ``path``. Raises OSError where that cannot be written."""
    rows = metric_rows(runs)
    context = {
        "runs": runs,
        "judged": any(run.win_rate is not None for run in runs),
        "settings": differing_settings(runs),
        "metrics": rows,
        "charts": [_chart(at, row.metric, row.title, runs) for at, row in enumerate(rows)],
    }
    write_atomic(path, render("compare.html.j2", context))
    return path


def _chart(at: int, metric: str, title: str, runs: Sequence[ComparedRun]) -> Any:
    lines = [Line(run.letter, *run.series[metric]) for run in runs if metric in run.series]
    alt = "; ".join(
        f"{line.label}: {len(line.y)} points from {line.y[0]:.4g} to {line.y[-1]:.4g}"
        for line in lines
    )
    return charts.line_chart(f"curve{at}", title, lines, "learner step", alt)
