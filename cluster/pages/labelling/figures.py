"""The numbers of the admin page, from the judgements in force. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reward_service.preferences.quality import agreement, position_bias
from reward_service.preferences.records import Gold, Item, Judgement

Judged = Sequence[tuple[Item, Judgement]]
RECENT_FLAGS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class PersonFigures:
    """``gold_right`` of ``gold_seen`` control items were answered as known. ``agreement``: share of
    equal labels with others on the same items. ``first_share``: how often the completion that was
    shown first won. None where there is nothing to count."""

    name: str
    role: str
    team: str
    labels: int
    skips: int
    flags: int
    median_s: float | None
    gold_right: int
    gold_seen: int
    agreement: float | None
    first_share: float | None
    last: str


def person_figures(people: Iterable[Any], judged: Judged) -> list[PersonFigures]:
    """One per annotator of ``people`` (records with id, role and team), in their order."""
    by_item: dict[str, dict[str, str]] = {}
    of: dict[str, list[tuple[Item, Judgement]]] = {}
    for item, judgement in judged:
        of.setdefault(judgement.annotator_id, []).append((item, judgement))
        if judgement.is_label:
            by_item.setdefault(item.id, {})[judgement.annotator_id] = judgement.choice
    return [_figures(person, of.get(person.id, []), by_item) for person in people]


def _figures(person: Any, own: Judged, by_item: Mapping[str, Mapping[str, str]]) -> PersonFigures:
    labels = [(item, judgement) for item, judgement in own if judgement.is_label]
    seconds = [one.duration_s for _, one in labels if one.duration_s is not None]
    gold = [agrees(item.gold, one) for item, one in labels if item.gold is not None]
    same = [
        choice == one.choice
        for item, one in labels
        for other, choice in by_item[item.id].items()
        if other != person.id
    ]
    return PersonFigures(
        name=person.id,
        role=person.role,
        team=person.team,
        labels=len(labels),
        skips=sum(one.answer == "skip" for _, one in own),
        flags=sum(one.answer == "flag" for _, one in own),
        median_s=statistics.median(seconds) if seconds else None,
        gold_right=sum(gold),
        gold_seen=len(gold),
        agreement=sum(same) / len(same) if same else None,
        first_share=position_bias([one for _, one in labels]).share,
        last=max((one.created_at for _, one in own), default=""),
    )


def agrees(gold: Gold, judgement: Judgement) -> bool:
    """Whether a judgement orders the completions as the known answer does."""
    if judgement.answer != "ranking":
        return False
    pairs = [(i, j) for i in range(len(gold.ranks)) for j in range(i)]
    return all(
        _sign(gold.ranks[i] - gold.ranks[j]) == _sign(judgement.ranks[i] - judgement.ranks[j])
        for i, j in pairs
    )


def _sign(number: int) -> int:
    return (number > 0) - (number < 0)


def overall(judged: Judged) -> dict[str, Any]:
    """Agreement between annotators, position bias, and what was flagged last."""
    labels = [judgement for _, judgement in judged if judgement.is_label]
    flagged = [(item, one) for item, one in judged if one.answer == "flag"]
    return {
        "labels": len(labels),
        "agreement": dict(agreement(labels)),
        "bias": position_bias(labels),
        "flags": list(reversed(flagged))[:RECENT_FLAGS],
    }
