"""Evaluations of a run while it trained, in its curves and its report."""

from __future__ import annotations

import json
from pathlib import Path

from learner.evaluation.evaluation_rows import evaluation_table, read_evaluations
from learner.evaluation.lines import curve_lines, with_evaluations
from learner.evaluation.report import write_report
from learner.evaluation.run_files import RunFiles

ROW = {"judge": "gold", "judge_was_reward": False, "problem": None}
ROWS = [
    {**ROW, "step": 0, "version_min": 0, "version_max": 0, "score": 0.1, "win_rate": None},
    {
        **ROW,
        **{"step": 5, "version_min": 5, "version_max": 6, "score": 0.4, "best": True, "kl": 1.25},
        **{"win_rate": 0.75, "ci_low": 0.6, "ci_high": 0.9, "length": 12.0},
    },
    {**ROW, "step": 10, "best": False, "score": None, "problem": "the <judge> is down"},
]
METRICS = [
    {"step": step, "objective/scores": float(step), "objective/kl": step / 4, "time/step": 1.0}
    for step in range(1, 11)
]
METRICS[6] |= {"evaluation/score": 0.4, "evaluation/step": 5}  # known only two steps later


def lines(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_each_evaluation_stands_at_its_own_step() -> None:
    drawn = dict(curve_lines(with_evaluations(METRICS, ROWS)))
    (score,) = drawn["Judge's mean score on held-out prompts"]
    assert (list(score.x), list(score.y)) == ([0, 5], [0.1, 0.4])
    assert len(drawn["Win rate against the start, on held-out prompts"]) == 3
    assert len(METRICS) == 10


def test_the_table_names_the_best_and_what_failed(tmp_path: Path) -> None:
    lines(tmp_path / "evaluations.jsonl", [ROWS[2], ROWS[1], ROWS[0]])
    table = evaluation_table(read_evaluations(RunFiles(tmp_path)))
    assert [row.step for row in table] == ["0", "5", "10"]
    assert [row.remark for row in table] == ["", "best", "the <judge> is down"]
    assert table[1].win_rate == "75.0% (60% to 90%)"
    assert [row.versions for row in table] == ["0", "5 to 6", ""]


def test_the_report_has_them(tmp_path: Path) -> None:
    lines(tmp_path / "metrics.jsonl", METRICS)
    assert "Evaluation while training" not in write_report(tmp_path).read_text("utf-8")
    lines(tmp_path / "evaluations.jsonl", [*ROWS, {**ROWS[1], "step": 8, "score": 0.5}])
    page = write_report(tmp_path).read_text("utf-8")
    assert "Evaluation while training" in page
    assert "the &lt;judge&gt; is down" in page
    assert "judge&#39;s score" in page or "judge's score" in page  # of the frontier
