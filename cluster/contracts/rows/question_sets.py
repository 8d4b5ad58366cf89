"""Rows of the standard evaluation sets, recognised by their columns.

    turns                          MT-Bench (list of texts), Arena-Hard 0.1 (list of {"content"})
    uid + prompt                   Arena-Hard 2.0
    prompt + instruction_id_list   IFEval
    instruction                    AlpacaEval; with ``input``, the data that Alpaca was trained on
    question + best_answer         TruthfulQA; in its CSV file Question + Best Answer

Their questions are for an assistant: they become a user's message, not plain text to continue.
Everything here is pure; every mistake is a BadRow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.contracts.rows.columns import present
from cluster.contracts.rows.files import BadRow, Columns, kind_of

CATEGORY = "category"
REFERENCE = "reference"
LATER_TURNS = "later_turns"
LATER_REFERENCES = "later_references"


@dataclass(frozen=True, slots=True)
class Question:
    """``turns``: the user's messages, at least one. ``references``: of each turn, "" where the set
    has none. ``used``: the columns that are in here."""

    turns: tuple[str, ...]
    references: tuple[str, ...]
    category: str
    used: frozenset[str]

    def metadata(self) -> dict[str, Any]:
        """As columns of the row: what a judge may read, and what is asked after the first turn."""
        found: dict[str, Any] = {CATEGORY: self.category} if self.category else {}
        if any(self.references):
            found[REFERENCE] = self.references[0]
        if len(self.turns) > 1:
            found[LATER_TURNS] = list(self.turns[1:])
            if any(self.references[1:]):
                found[LATER_REFERENCES] = list(self.references[1:])
        return found


def question_of(columns: Columns) -> Question | None:
    """None for a row of another shape."""
    there = present(columns)
    if "turns" in there:
        return _turns(columns)
    if "prompt" in there and there & {"instruction_id_list", "uid"}:
        if not isinstance(columns["prompt"], str):
            return None
        return _single(columns, "prompt")
    if "instruction" in there and "prompt" not in there and "messages" not in there:
        return _instruction(columns)
    for question, best in (("question", "best_answer"), ("Question", "Best Answer")):
        if {question, best} <= there and "prompt" not in there:
            return _single(columns, question, best)
    return None


def _turns(columns: Columns) -> Question:
    given = columns["turns"]
    if not isinstance(given, list | tuple) or not given:
        raise BadRow(f"column 'turns' holds {kind_of(given)}", "give a list of questions")
    turns = tuple(_turn(turn, place) for place, turn in enumerate(given, start=1))
    reference = columns.get(REFERENCE)
    listed = [reference] if isinstance(reference, str) else reference or []
    if not isinstance(listed, list | tuple) or not all(isinstance(one, str) for one in listed):
        raise BadRow(
            f"column 'reference' holds {kind_of(reference)}", "give one text per turn, in a list"
        )
    texts = [*listed, *[""] * len(turns)][: len(turns)]
    return Question(turns, tuple(texts), _category(columns), frozenset({"turns", REFERENCE}))


def _turn(turn: Any, place: int) -> str:
    text = turn.get("content") if isinstance(turn, Mapping) else turn
    return _asked(text, f"column 'turns', turn {place},")


def _instruction(columns: Columns) -> Question:
    text = _asked(columns["instruction"], "column 'instruction'")
    more = columns.get("input")
    if isinstance(more, str) and more.strip():
        text = f"{text}\n\n{more}"
    used = frozenset({"instruction", "input"})
    return Question((text,), ("",), _category(columns, "dataset"), used)


def _single(columns: Columns, column: str, best: str = "") -> Question:
    reference = columns.get(best or REFERENCE)
    used = {column, best or REFERENCE}
    text = reference if isinstance(reference, str) else ""
    asked = _asked(columns[column], f"column {column!r}")
    return Question((asked,), (text,), _category(columns), frozenset(used))


def _asked(text: Any, where: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise BadRow(f"{where} holds {kind_of(text)} where a question is expected", "give a text")
    return text


def _category(columns: Columns, *others: str) -> str:
    names: Sequence[str] = (CATEGORY, "Category", *others)
    return next((columns[n] for n in names if isinstance(columns.get(n), str)), "")
