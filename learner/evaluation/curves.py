"""The curves of a report, drawn."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from learner.evaluation import charts
from learner.evaluation.lines import STEP, curve_lines, describe
from learner.evaluation.run_files import Row


def curves(rows: Sequence[Row], marks: Sequence[float] = ()) -> list[Markup]:
    """The charts of a run. ``marks``: the steps of ``alarm_steps``."""
    return [
        charts.line_chart(f"curve{at}", title, lines, STEP, describe(lines), marks)
        for at, (title, lines) in enumerate(curve_lines(rows))
    ]
