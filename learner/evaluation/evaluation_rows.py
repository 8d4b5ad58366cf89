"""The evaluations of a run while it trained, as a report shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from learner.evaluation.run_files import Row, RunFiles, number

FILE = "evaluations.jsonl"


@dataclass(frozen=True, slots=True)
class EvaluationRow:
    """Texts of one line of the table; empty where the row does not say."""

    step: str
    judge: str
    judge_was_reward: bool
    score: str
    win_rate: str
    kl: str
    length: str
    versions: str
    remark: str


def read_evaluations(files: RunFiles) -> list[Row]:
    """By step; of a step that was evaluated anew, the last row counts. A run need not have any."""
    if not (files.directory / FILE).exists():
        return []
    by_step = {
        int(step): row
        for row in files.json_lines(FILE) or []
        if (step := number(row, "step")) is not None
    }
    return [by_step[step] for step in sorted(by_step)]


def evaluation_table(rows: Sequence[Row]) -> list[EvaluationRow]:
    best = max((at for at, row in enumerate(rows) if row.get("best") is True), default=None)
    return [_shown(row, is_best=at == best) for at, row in enumerate(rows)]


def _shown(row: Row, *, is_best: bool) -> EvaluationRow:
    versions = dict.fromkeys(_text(row, key, "{:.0f}") for key in ("version_min", "version_max"))
    remarks = ["best"] * is_best + [str(row["problem"])] * bool(row.get("problem"))
    return EvaluationRow(
        step=_text(row, "step", "{:.0f}"),
        judge=str(row.get("judge", "")),
        judge_was_reward=row.get("judge_was_reward") is True,
        score=_text(row, "score", "{:.4g}"),
        win_rate=_rate(row),
        kl=_text(row, "kl", "{:.3g}"),
        length=_text(row, "length", "{:.1f}"),
        versions=" to ".join(filter(None, versions)),
        remark="; ".join(remarks),
    )


def _rate(row: Row) -> str:
    rate, low, high = (number(row, key) for key in ("win_rate", "ci_low", "ci_high"))
    if rate is None:
        return ""
    interval = "" if low is None or high is None else f" ({low:.0%} to {high:.0%})"
    return f"{rate:.1%}{interval}"


def _text(row: Row, key: str, style: str) -> str:
    value = number(row, key)
    return "" if value is None else style.format(value)
