"""Rows that judge one completion: prompt + completion + label. Every mistake is a BadRow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cluster.contracts.rows.columns import present, unknown_shape
from cluster.contracts.rows.files import BadRow, Columns
from cluster.contracts.rows.messages import Messages
from cluster.contracts.rows.shapes import COMPARISON_SHAPES, completion_text, prompt_messages

JUDGEMENT = ("prompt", "completion", "label")


@dataclass(frozen=True, slots=True)
class JudgementShape:
    """One completion, and whether it is a good one."""

    messages: Messages
    completion: str
    good: bool


def is_judgement(columns: Columns) -> bool:
    """Whether the row judges a single completion. A row that holds a pair as well is a pair."""
    there = present(columns)
    return {"completion", "label"} <= there and not {"chosen", "rejected"} <= there


def judgement_shape(columns: Columns) -> JudgementShape:
    if not set(JUDGEMENT) <= present(columns):
        raise unknown_shape(columns, (JUDGEMENT, *COMPARISON_SHAPES))
    return JudgementShape(
        prompt_messages(columns["prompt"]),
        completion_text(columns["completion"], "completion"),
        truth(columns["label"], "label", "a good completion"),
    )


def truth(value: Any, column: str, meaning: str) -> bool:
    """true and false, as JSON, Parquet and tables write them. meaning: of true, for the message."""
    word = str(value).strip().lower()
    if word in ("true", "1", "1.0"):
        return True
    if word in ("false", "0", "0.0"):
        return False
    raise BadRow(f"column {column!r} holds {value!r}", f"write true ({meaning}) or false")
