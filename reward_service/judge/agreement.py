"""How far a judge agrees with people about the same completions. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from reward_service.preferences.agreement import cohen_kappa, votes
from reward_service.preferences.records import Judgement

PEOPLE = ("person", "import")
RESAMPLES = 1000

Pairs = list[tuple[str, str]]  # (a person's choice, the judge's choice)


@dataclass(frozen=True, slots=True, kw_only=True)
class WithPeople:
    """``votes``: comparisons that a person and the judge both made, of ``items``. ``share`` and
    ``kappa`` (Cohen 1960) count a tie as a choice of its own; ``share_decided`` is the share among
    the ``decided`` votes in which neither said tie. Intervals: 95 %, by bootstrap over items."""

    items: int
    votes: int
    share: float | None = None
    share_interval: tuple[float, float] | None = None
    kappa: float | None = None
    kappa_interval: tuple[float, float] | None = None
    decided: int = 0
    share_decided: float | None = None

    def __str__(self) -> str:
        if self.share is None:
            return "no person has judged these items"
        kappa = (
            "" if self.kappa is None else f", kappa {self.kappa:.2f}{_range(self.kappa_interval)}"
        )
        return (
            f"agrees with people in {self.share:.1%} of {self.votes} comparisons"
            f"{kappa} (of {self.decided} without ties: {self.share_decided or 0:.1%})"
        )


def agreement_with_people(
    judgements: Iterable[Judgement], annotator_id: str, items: set[str], seed: int = 0
) -> WithPeople:
    """Of the judge that is called ``annotator_id``, over ``items``; judgements in force. Where
    several people judged an item, each of them counts."""
    entries = [
        entry for entry in judgements if entry.item_id in items and entry.answer == "ranking"
    ]
    own = [entry for entry in entries if entry.annotator_id == annotator_id]
    said = {(vote.item_id, vote.pair): vote.choice for vote in votes(own)}
    by_item: dict[str, Pairs] = {}
    for vote in votes(entry for entry in entries if entry.source in PEOPLE):
        choice = said.get((vote.item_id, vote.pair))
        if choice is not None:
            by_item.setdefault(vote.item_id, []).append((vote.choice, choice))
    pairs = [pair for found in by_item.values() for pair in found]
    if not pairs:
        return WithPeople(items=0, votes=0)
    decided = [pair for pair in pairs if "tie" not in pair]
    share_interval, kappa_interval = _intervals(list(by_item.values()), seed)
    return WithPeople(
        items=len(by_item),
        votes=len(pairs),
        share=_share(pairs),
        share_interval=share_interval,
        kappa=_kappa(pairs),
        kappa_interval=kappa_interval,
        decided=len(decided),
        share_decided=_share(decided) if decided else None,
    )


def _share(pairs: Pairs) -> float:
    return sum(one == other for one, other in pairs) / len(pairs)


def _kappa(pairs: Pairs) -> float | None:
    return cohen_kappa([one for one, _ in pairs], [other for _, other in pairs])


def _intervals(by_item: Sequence[Pairs], seed: int) -> list[Any]:
    """Of share and kappa; None for fewer than two items, or where kappa is never defined."""
    if len(by_item) < 2:
        return [None, None]
    rng = np.random.default_rng(seed)
    drawn: list[list[float]] = [[], []]
    for _ in range(RESAMPLES):
        places = rng.integers(len(by_item), size=len(by_item))
        pairs = [pair for place in places for pair in by_item[place]]
        for found, value in zip(drawn, (_share(pairs), _kappa(pairs)), strict=True):
            if value is not None:
                found.append(value)
    return [
        tuple(float(x) for x in np.percentile(found, [2.5, 97.5])) if found else None
        for found in drawn
    ]


def _range(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f" ({interval[0]:.2f} to {interval[1]:.2f})"
