"""How far annotators agree, beyond chance, with intervals. Pure.

What is compared are votes: two completions of one item, and whether an annotator prefers a, b,
neither ("tie") or finds both bad. A ranking of four completions holds six votes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np

from reward_service.preferences.records import Judgement, choice_of

Level = Literal["nominal", "ordinal"]
RESAMPLES = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote:
    """``signed``: above 0 for a, below 0 for b, by the strength where it is known (else 1); 0 for a
    tie; None for "both bad", which stands on no such scale."""

    item_id: str
    pair: tuple[int, int]
    annotator_id: str
    choice: str
    signed: float | None


def votes(judgements: Iterable[Judgement]) -> list[Vote]:
    """Of judgements in force; skips, flags and demonstrations hold none."""
    found: list[Vote] = []
    bad: list[Judgement] = []
    pairs: dict[str, set[tuple[int, int]]] = {}
    for entry in judgements:
        if entry.answer == "all_bad":
            bad.append(entry)
        for pair in combinations(range(len(entry.ranks)), 2):
            ranks = tuple(entry.ranks[place] for place in pair)
            sign = (ranks[0] < ranks[1]) - (ranks[0] > ranks[1])
            found.append(_vote(entry, pair, choice_of(ranks), sign * (entry.strength or 1.0)))
            pairs.setdefault(entry.item_id, set()).add(pair)
    for entry in bad:
        for pair in sorted(pairs.get(entry.item_id, {(0, 1)})):
            found.append(_vote(entry, pair, "both_bad", None))
    return found


def _vote(entry: Judgement, pair: tuple[int, int], choice: str, signed: float | None) -> Vote:
    return Vote(
        item_id=entry.item_id,
        pair=pair,
        annotator_id=entry.annotator_id,
        choice=choice,
        signed=signed,
    )


def units_of(cast: Iterable[Vote]) -> dict[tuple[str, tuple[int, int]], dict[str, Vote]]:
    """(item, pair) -> annotator -> vote."""
    table: dict[tuple[str, tuple[int, int]], dict[str, Vote]] = {}
    for vote in cast:
        table.setdefault((vote.item_id, vote.pair), {})[vote.annotator_id] = vote
    return table


def percent_agreement(units: Iterable[Sequence[Any]]) -> float | None:
    """Share, in [0, 1], of pairs of labels on one unit that are equal; None without such a pair."""
    same = total = 0
    for labels in units:
        for first, second in combinations(labels, 2):
            total += 1
            same += first == second
    return same / total if total else None


def cohen_kappa(first: Sequence[str], second: Sequence[str]) -> float | None:
    """Agreement of two annotators on the same items beyond chance (Cohen 1960):
    (p_o - p_e) / (1 - p_e). None for no items, or when chance alone explains everything (p_e = 1).

    Raises ValueError when the two lists differ in length.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} labels: both must label the same items")
    if not first:
        return None
    n = len(first)
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / n
    counts, others = Counter(first), Counter(second)
    expected = sum(counts[value] * others[value] for value in counts) / n**2
    return None if expected == 1 else (observed - expected) / (1 - expected)


def krippendorff_alpha(units: Iterable[Sequence[Any]], level: Level = "nominal") -> float | None:
    """alpha = 1 - D_o / D_e for any number of annotators and missing labels.

    ``units``: the labels of each unit; for the ordinal level, values that can be sorted. After
    Krippendorff (2011), "Computing Krippendorff's Alpha-Reliability": a unit of m labels gives each
    ordered pair weight 1 / (m - 1); units with one label are left out. The squared difference is
    1 for unequal nominal values, and (sum of n_g from c to k - (n_c + n_k) / 2)^2 for ordinal ones.
    None when nothing can be paired or only one value occurs.
    """
    matrices = _coincidences(list(units))
    alpha = _alpha(matrices.sum(axis=0)[None], level)[0] if len(matrices) else np.nan
    return None if np.isnan(alpha) else float(alpha)


def alpha_interval(
    clusters: Sequence[Sequence[Sequence[Any]]], level: Level = "nominal", seed: int = 0
) -> tuple[float, float] | None:
    """95 % interval of alpha by bootstrap (percentiles). ``clusters``: the units of each item;
    items are drawn with replacement, so that votes of one ranking stay together. None where alpha
    is None, or for fewer than two items with several labels."""
    matrices = _coincidences([unit for cluster in clusters for unit in cluster])
    owner = [n for n, cluster in enumerate(clusters) for _ in cluster]
    items = np.zeros((len(clusters), *matrices.shape[1:]))
    np.add.at(items, owner, matrices)
    items = items[items.sum(axis=(1, 2)) > 0]
    if len(items) < 2:
        return None
    # Items with the same matrix are one kind. How often each kind comes up among n draws is
    # multinomial, too, and there are few kinds.
    kinds, counts = np.unique(items.reshape(len(items), -1), axis=0, return_counts=True)
    rng, n = np.random.default_rng(seed), len(items)
    found = np.concatenate(
        [
            _alpha((draws @ kinds).reshape(-1, *items.shape[1:]), level)
            for draws in (rng.multinomial(n, counts / n, 50) for _ in range(RESAMPLES // 50))
        ]
    )
    found = found[~np.isnan(found)]
    if not len(found):
        return None
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def _coincidences(units: Sequence[Sequence[Any]]) -> np.ndarray:
    """[units, values, values]: the coincidence matrix of each unit, values in sorted order."""
    values = sorted({value for unit in units for value in unit})
    place = {value: n for n, value in enumerate(values)}
    found = np.zeros((len(units), len(values), len(values)))
    several = [number for number, unit in enumerate(units) if len(unit) > 1]
    counts = np.zeros((len(several), len(values)))
    for row, number in enumerate(several):
        for value in units[number]:
            counts[row, place[value]] += 1
    pairs = counts[:, :, None] * counts[:, None, :] - counts[:, :, None] * np.eye(len(values))
    found[several] = pairs / (counts.sum(axis=1) - 1)[:, None, None]
    return found


def _alpha(coincidences: np.ndarray, level: Level) -> np.ndarray:
    """[n] alphas of [n, values, values] summed coincidences; nan where there is none."""
    totals = coincidences.sum(axis=2)
    n = totals.sum(axis=1)
    size = totals.shape[1]
    if level == "nominal":
        distance = np.broadcast_to(1 - np.eye(size), coincidences.shape)
    else:
        # Sum from c to k less half of both ends = difference of the middles of the two values.
        middle = np.cumsum(totals, axis=1) - totals / 2
        distance = (middle[:, :, None] - middle[:, None, :]) ** 2
    observed = (coincidences * distance).sum(axis=(1, 2))
    expected = (totals[:, :, None] * totals[:, None, :] * distance).sum(axis=(1, 2))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(expected > 0, 1 - (n - 1) * observed / expected, np.nan)


def agreement(
    judgements: Sequence[Judgement], cast: Sequence[Vote] | None = None
) -> Mapping[str, Any]:
    """The numbers a report shows; kappa only where exactly two annotators share items. The ordinal
    alpha leaves "both bad" out, and takes a > tie > b by strength. ``cast``: the judgements' votes,
    where they are known."""
    table = units_of(votes(judgements) if cast is None else cast)
    units = [[vote.choice for vote in unit.values()] for unit in table.values()]
    shared = [unit for unit in table.values() if len(unit) > 1]
    people = sorted({name for unit in shared for name in unit})
    kappa = None
    if len(people) == 2:
        both = [unit for unit in shared if len(unit) == 2]
        kappa = cohen_kappa(*[[unit[name].choice for unit in both] for name in people])
    scaled = {
        key: [vote.signed for vote in unit.values() if vote.signed is not None]
        for key, unit in table.items()
    }
    return {
        "items_with_several_labels": len(
            {item for (item, _), unit in table.items() if len(unit) > 1}
        ),
        "percent_agreement": percent_agreement(units),
        "cohen_kappa": kappa,
        "krippendorff_alpha": krippendorff_alpha(units),
        "krippendorff_alpha_interval": alpha_interval(_by_item(table, units)),
        "krippendorff_alpha_ordinal": krippendorff_alpha(scaled.values(), "ordinal"),
        "krippendorff_alpha_ordinal_interval": alpha_interval(
            _by_item(table, list(scaled.values())), "ordinal"
        ),
    }


def _by_item(
    table: Mapping[tuple[str, tuple[int, int]], Any], units: Sequence[Sequence[Any]]
) -> list[list[Sequence[Any]]]:
    items: dict[str, list[Sequence[Any]]] = {}
    for (item, _), unit in zip(table, units, strict=True):
        items.setdefault(item, []).append(unit)
    return list(items.values())
