"""Rows that judge several completions of one prompt: each shape becomes prompt, completions and who
ordered them how.

    TRL, HH-RLHF, verl    prompt + chosen + rejected; chosen + rejected that begin alike
    NeMo                  context + completions with a rank each; prompt + chosen_response + ...
    UltraFeedback         instruction + completions with a score each
    Accord's rankings     prompt + completions + ranks
    Argilla, Label Studio what they export (``rows.exports``)

Everything here is pure; every mistake is a BadRow that names the column.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.contracts.chat import is_text
from cluster.contracts.rows.columns import optional_number, present, unknown_shape
from cluster.contracts.rows.exports import Verdict, argilla_row, is_argilla, is_label_studio
from cluster.contracts.rows.exports import label_studio_row as label_studio
from cluster.contracts.rows.files import BadRow, Columns, kind_of
from cluster.contracts.rows.messages import Messages, read_messages
from cluster.contracts.rows.shapes import ComparisonShape, comparison_shape

JUDGED_SHAPES = (
    ("prompt", "chosen", "rejected"),
    ("chosen", "rejected"),
    ("prompt", "completions", "ranks"),
    ("instruction", "completions"),
    ("context", "completions"),
    ("prompt", "chosen_response", "rejected_response"),
)
SCORE_COLUMNS = ("overall_score", "fine-grained_score", "score")
_REPLACED = ("instruction", "context", "completions", "ranks", "annotations", "data", "responses")
PAIR = (1, 2)  # the first of two completions is preferred


@dataclass(frozen=True, slots=True)
class JudgedShape:
    """``writers[i]``: what wrote completion i, None where the row does not say. ``verdicts``: may
    be none, where nobody has judged the row yet."""

    messages: Messages
    completions: tuple[str, ...]
    verdicts: tuple[Verdict, ...]
    writers: tuple[str | None, ...] = ()


def judged_shape(columns: Columns) -> JudgedShape:
    """Raises BadRow for a row of no known shape, or with a mistake."""
    there = present(columns)
    if is_label_studio(columns):
        return _exported(*label_studio(columns))
    if is_argilla(columns):
        return _exported(*argilla_row(columns))
    if {"chosen_response", "rejected_response"} <= there:
        return _nemo_pair(columns)
    if {"chosen", "rejected"} <= there:
        return _pair(comparison_shape(columns))
    if "completions" in there and there & {"prompt", "instruction", "context"}:
        return _several(columns)
    raise unknown_shape(columns, JUDGED_SHAPES)


def pairs_within(columns: Columns) -> list[Columns]:
    """The row itself where it is a pair in the shape of TRL, or judges a single completion. Of a
    row that judges several completions: every two of which one is preferred, in the shape of TRL,
    with the row's other columns; none where all are tied. For ``read_rows(expand=...)``. Raises
    BadRow for a mistake in the row."""
    return orders_within(columns)


def orders_within(columns: Columns, *, rankings: bool = False, ties: bool = False) -> list[Columns]:
    """`pairs_within`, and with ``ties`` also every two that are equally good (with tie = true).
    With ``rankings``, three completions or more without a tie are one row: prompt and ranking, the
    best first. ``rankings.ranking_shape`` reads all of them."""
    if not is_several(columns):
        return [columns]
    row = judged_shape(columns)
    prompt = row.messages[0]["content"] if is_text(row.messages) else list(row.messages)
    others = {name: value for name, value in columns.items() if name not in _REPLACED}
    found: list[Columns] = []
    for verdict in row.verdicts:
        own = {**others, "prompt": prompt, "annotator": verdict.annotator}
        ranks, texts = verdict.ranks, row.completions
        if rankings and len(ranks) > 2 and len(set(ranks)) == len(ranks):
            ordered = sorted(range(len(ranks)), key=lambda i: ranks[i])
            found.append({**own, "ranking": [texts[i] for i in ordered]})
            continue
        for i, j in itertools.permutations(range(len(ranks)), 2):
            if ranks[i] < ranks[j]:
                margin = _margin(verdict, i, j)
                found.append({**own, "chosen": texts[i], "rejected": texts[j], "margin": margin})
            elif ties and i < j and ranks[i] == ranks[j]:
                found.append({**own, "chosen": texts[i], "rejected": texts[j], "tie": True})
    return found


def is_several(columns: Columns) -> bool:
    """Whether a row is of another shape than TRL's: it may hold several pairs."""
    there = present(columns)
    return (
        "completions" in there
        or {"chosen_response", "rejected_response"} <= there
        or is_label_studio(columns)
        or is_argilla(columns)
    )


def _margin(verdict: Verdict, better: int, worse: int) -> float | None:
    if verdict.scores:
        return verdict.scores[better] - verdict.scores[worse]
    return verdict.strength if len(verdict.ranks) == 2 else None


def _pair(shape: ComparisonShape) -> JudgedShape:
    verdict = Verdict(ranks=PAIR, strength=shape.margin)
    return JudgedShape(shape.messages, (shape.chosen, shape.rejected), (verdict,))


def _exported(
    prompt: Any, completions: Sequence[Any], verdicts: tuple[Verdict, ...]
) -> JudgedShape:
    texts = tuple(completion_text(value, f"completion {n}") for n, value in completions)
    return JudgedShape(read_messages(prompt, "prompt"), texts, verdicts)


def _nemo_pair(columns: Columns) -> JudgedShape:
    row = _pair(
        comparison_shape(
            {
                "prompt": columns.get("prompt"),
                "chosen": columns["chosen_response"],
                "rejected": columns["rejected_response"],
            }
        )
    )
    scores = [optional_number(columns, f"{side}_reward") for side in ("chosen", "rejected")]
    if None in scores:
        return row
    verdict = Verdict(ranks=PAIR, scores=tuple(s for s in scores if s is not None))
    return JudgedShape(row.messages, row.completions, (verdict,))


def _several(columns: Columns) -> JudgedShape:
    """UltraFeedback, NeMo's ranks, and Accord's rankings."""
    source = next(c for c in ("prompt", "instruction", "context") if columns.get(c) is not None)
    messages = read_messages(columns[source], source)
    if messages[-1]["role"] == "assistant":
        raise BadRow(f"column {source!r} ends with the assistant's turn", "end it with the user's")
    entries = columns["completions"]
    if not isinstance(entries, list | tuple) or len(entries) < 2:
        found = f"a list of {len(entries)}" if isinstance(entries, list) else kind_of(entries)
        raise BadRow(f"column 'completions' holds {found}", "give a list of two or more")
    texts = tuple(
        completion_text(_text_of(entry, n), f"completions, entry {n}")
        for n, entry in enumerate(entries, start=1)
    )
    ranks, scores = _order_of(columns, entries)
    verdict = Verdict(
        ranks=ranks,
        scores=scores,
        strength=optional_number(columns, "strength"),
        annotator=columns.get("annotator") or "",
    )
    writers = tuple(
        str(entry["model"]) if isinstance(entry, dict) and entry.get("model") else None
        for entry in entries
    )
    return JudgedShape(messages, texts, (verdict,), writers)


def _text_of(entry: Any, number: int) -> Any:
    if not isinstance(entry, dict) or "role" in entry:
        return entry
    for key in ("response", "completion", "text"):
        if entry.get(key) is not None:
            return entry[key]
    raise BadRow(
        f"column 'completions', entry {number} has no response or completion", "give it one"
    )


def completion_text(value: Any, where: str) -> str:
    """Text, or one message of the assistant. Raises BadRow."""
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], dict):
        value = value[0].get("content", value[0].get("value"))
    if not isinstance(value, str):
        raise BadRow(
            f"{where} holds {kind_of(value)}", "give text, or a list of one assistant message"
        )
    return value


def _order_of(
    columns: Columns, entries: Sequence[Any]
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """(ranks from 1, scores or nothing), from ranks beside the list, or a rank or score in each
    entry. A lower rank is better, as is a higher score."""
    fields = [entry if isinstance(entry, dict) else {} for entry in entries]
    if columns.get("ranks") is not None:
        return dense_ranks(_numbers(columns["ranks"], len(entries), "ranks")), ()
    if all("rank" in entry for entry in fields):
        ranks = _numbers([entry["rank"] for entry in fields], len(entries), "completions.rank")
        return dense_ranks(ranks), ()
    for name in SCORE_COLUMNS:
        if any(entry.get(name) is not None for entry in fields):
            given = [entry.get(name) for entry in fields]
            scores = _numbers(given, len(entries), f"completions.{name}")
            return dense_ranks([-score for score in scores]), tuple(scores)
    raise BadRow(
        "column 'completions' orders nothing: its entries have neither rank nor score",
        f"give each entry a rank (1 is best) or one of: {', '.join(SCORE_COLUMNS)}",
    )


def _numbers(values: Any, wanted: int, column: str) -> list[float]:
    if not isinstance(values, list | tuple) or len(values) != wanted:
        count = len(values) if isinstance(values, list | tuple) else kind_of(values)
        raise BadRow(f"column {column!r} holds {count} entries for {wanted} completions")
    numbers = []
    for number, value in enumerate(values, start=1):
        found = optional_number({f"{column}, entry {number}": value}, f"{column}, entry {number}")
        if found is None:
            raise BadRow(f"column {column!r}, entry {number} is empty", "give every entry a number")
        numbers.append(found)
    return numbers


def dense_ranks(values: Sequence[float]) -> tuple[int, ...]:
    """1 for the lowest value, 2 for the next, equal values alike."""
    places = {value: place for place, value in enumerate(sorted(set(values)), start=1)}
    return tuple(places[value] for value in values)
