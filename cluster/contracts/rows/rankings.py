"""What a reward model learns from a row: a pair, a tie, or a ranking.

    prompt + chosen + rejected       as `shapes` reads them; with tie = true neither is better
    prompt + ranking                 completions, the best first, as `judged.orders_within` makes it

Every mistake is a BadRow.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.contracts.rows.columns import optional_number, present
from cluster.contracts.rows.files import BadRow, Columns, kind_of
from cluster.contracts.rows.judgements import truth
from cluster.contracts.rows.messages import Messages
from cluster.contracts.rows.shapes import comparison_shape, completion_text, prompt_messages


@dataclass(frozen=True, slots=True)
class RankingShape:
    """ranked: two completions or more, the best first. margin: how much better the first of a pair
    is, None where the row does not say. tie: the two of a pair are equally good. weight, annotator:
    1 and "" where the row does not say."""

    messages: Messages
    ranked: tuple[str, ...]
    margin: float | None
    tie: bool
    weight: float
    annotator: str


def ranking_shape(columns: Columns) -> RankingShape:
    there = present(columns)
    tie = "tie" in there and truth(columns["tie"], "tie", "equally good")
    if "ranking" in there:
        messages, ranked, margin = *_ranking(columns), None
        if tie:
            raise BadRow("a ranking cannot be a tie", "give chosen and rejected instead")
    else:
        pair = comparison_shape(columns)
        messages, ranked, margin = pair.messages, (pair.chosen, pair.rejected), pair.margin
    weight = optional_number(columns, "weight")
    if weight is not None and weight <= 0:
        raise BadRow(f"column 'weight' holds {weight}", "give it a number over 0")
    annotator = str(columns["annotator"]) if "annotator" in there else ""
    return RankingShape(messages, ranked, margin, tie, 1.0 if weight is None else weight, annotator)


def _ranking(columns: Columns) -> tuple[Messages, tuple[str, ...]]:
    if columns.get("prompt") is None:
        raise BadRow("a ranking without a prompt", "give the row a column prompt")
    ranking = columns["ranking"]
    if not isinstance(ranking, list) or len(ranking) < 2:
        raise BadRow(
            f"column 'ranking' holds {kind_of(ranking)}",
            "give it a list of two completions or more, the best first",
        )
    messages = prompt_messages(columns["prompt"])
    return messages, tuple(completion_text(one, "ranking") for one in ranking)
