"""The curves of a report, drawn."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from learner.evaluation import charts
from learner.evaluation.lines import STEP, curve_lines, describe
from learner.evaluation.run_files import Row


def curves(rows: Sequence[Row]) -> list[Markup]:
    """The charts of a run."""
    return [
        charts.line_chart(f"curve{at}", title, lines, STEP, describe(lines))
        for at, (title, lines) in enumerate(curve_lines(rows))
    ]
