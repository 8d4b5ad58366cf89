"""How far annotators agree, whether position sways them, and splits that share no prompt. Pure."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations

from reward_service.preferences.records import Judgement


def ratings(labels: Iterable[Judgement]) -> dict[str, dict[str, str]]:
    """item -> annotator -> choice, from judgements in force; skips and flags do not count."""
    table: dict[str, dict[str, str]] = {}
    for label in labels:
        if not label.is_label:
            continue
        table.setdefault(label.item_id, {})[label.annotator_id] = label.choice
    return table


def percent_agreement(units: Iterable[Sequence[str]]) -> float | None:
    """Share, in [0, 1], of pairs of labels on one item that are equal; None without such a pair."""
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


def krippendorff_alpha(units: Iterable[Sequence[str]]) -> float | None:
    """Nominal alpha = 1 - D_o / D_e for any number of annotators and missing labels.

    ``units``: the labels of each item. Coincidences after Krippendorff (2011), "Computing
    Krippendorff's Alpha-Reliability": a unit of m labels gives each ordered pair weight
    1 / (m - 1); units with one label are left out. None when nothing can be paired or only one
    value occurs.
    """
    coincidences: Counter[tuple[str, str]] = Counter()
    for labels in units:
        if len(labels) < 2:
            continue
        for pair in permutations(labels, 2):
            coincidences[pair] += 1 / (len(labels) - 1)  # type: ignore[assignment]
    totals: Counter[str] = Counter()
    for (value, _), weight in coincidences.items():
        totals[value] += weight
    n = sum(totals.values())
    expected = sum(totals[a] * totals[b] for a, b in permutations(totals, 2))
    if expected == 0:
        return None
    observed = sum(weight for (a, b), weight in coincidences.items() if a != b)
    return 1 - (n - 1) * observed / expected


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionBias:
    """Of ``decided`` labels, ``first`` chose the answer shown first. Without bias ``share`` is near
    0.5; ``low`` and ``high`` are its 95 % Wilson interval. All None/0 without decided labels."""

    decided: int
    first: int
    share: float | None
    low: float | None
    high: float | None

    @property
    def significant(self) -> bool:
        return self.low is not None and self.high is not None and not self.low <= 0.5 <= self.high


def position_bias(labels: Iterable[Judgement]) -> PositionBias:
    """How often the answer shown first won; ties and "both bad" do not count."""
    decided = [label for label in labels if label.choice in ("a", "b") and label.shown_order]
    first = sum(label.choice == label.shown_order[0] for label in decided)
    if not decided:
        return PositionBias(decided=0, first=0, share=None, low=None, high=None)
    low, high = wilson(first, len(decided))
    return PositionBias(
        decided=len(decided), first=first, share=first / len(decided), low=low, high=high
    )


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share; z = 1.96: 95 %."""
    share = successes / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def held_out(prompt_hash: str, fraction: float, salt: str = "") -> bool:
    """Whether a prompt belongs to the held-out part: always the same answer for the same prompt, so
    that no two parts ever share one. ``fraction`` in [0, 1] of prompts, on average."""
    digest = hashlib.sha256(f"{salt}\0{prompt_hash}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < fraction


def agreement(labels: Sequence[Judgement]) -> Mapping[str, float | int | None]:
    """The numbers a report shows; kappa only where exactly two annotators share items."""
    table = ratings(labels)
    units = [list(answers.values()) for answers in table.values()]
    shared = [answers for answers in table.values() if len(answers) > 1]
    people = sorted({name for answers in shared for name in answers})
    kappa = None
    if len(people) == 2:
        columns = [[answers[name] for answers in shared] for name in people]
        kappa = cohen_kappa(*columns)
    return {
        "items_with_several_labels": len(shared),
        "percent_agreement": percent_agreement(units),
        "cohen_kappa": kappa,
        "krippendorff_alpha": krippendorff_alpha(units),
    }
