"""Whether judgements are fit to learn from: control items, position and length bias, speed, groups
of annotators and topics, drift over time. Pure."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from reward_service.preferences.agreement import Vote, agreement, units_of, votes
from reward_service.preferences.annotator_model import dawid_skene
from reward_service.preferences.records import Item, Judgement, choice_of

Judged = tuple[Item, Judgement]
FAST_S = 2.0  # nobody reads two completions in less


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """``hits`` of ``n``, with its 95 % interval (Wilson). ``p``: probability, by the exact binomial
    test, of a share at least as far from one half. All None/0 without cases."""

    hits: int
    n: int
    share: float | None
    low: float | None
    high: float | None
    p: float | None

    @property
    def significant(self) -> bool:
        return self.p is not None and self.p < 0.05


def share_of(hits: int, n: int) -> Share:
    if n == 0:
        return Share(hits=0, n=0, share=None, low=None, high=None, p=None)
    low, high = wilson(hits, n)
    return Share(hits=hits, n=n, share=hits / n, low=low, high=high, p=binomial_p(hits, n))


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share; z = 1.96: 95 %."""
    share = successes / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def binomial_p(hits: int, n: int) -> float:
    """Two-sided exact test against one half."""
    tail = min(hits, n - hits)
    logs = [
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2)
        for k in range(tail + 1)
    ]
    return min(1.0, 2 * math.fsum(math.exp(value) for value in logs))


def difference_p(hits: int, n: int, other_hits: int, other_n: int) -> float | None:
    """Two-sided z test that two shares are equal, with the pooled variance; None where a side is
    empty or both are all or nothing."""
    if not n or not other_n:
        return None
    pooled = (hits + other_hits) / (n + other_n)
    variance = pooled * (1 - pooled) * (1 / n + 1 / other_n)
    if variance == 0:
        return None
    z = (hits / n - other_hits / other_n) / math.sqrt(variance)
    return math.erfc(abs(z) / math.sqrt(2))


# -- single properties -----------------------------------------------------------------------------


def position_bias(judgements: Iterable[Judgement]) -> Share:
    """Share of decided comparisons that prefer the completion shown first. Those whose order is not
    known do not count."""
    known = [j for j in judgements if j.choice in ("a", "b") and j.shown_order]
    return share_of(sum(j.choice == j.shown_order[0] for j in known), len(known))


def length_bias(judged: Iterable[Judged]) -> Share:
    """Share of decided comparisons that prefer the longer completion (in characters)."""
    longer = total = 0
    for item, judgement in judged:
        if judgement.choice not in ("a", "b"):
            continue
        a, b = (len(completion.text) for completion in item.completions)
        if a != b:
            total += 1
            longer += (judgement.choice == "a") == (a > b)
    return share_of(longer, total)


def gold_accuracy(judged: Iterable[Judged]) -> Share:
    """Share of answers to control items that order the completions as is known to be right."""
    cases = [(i.gold, j) for i, j in judged if i.gold is not None and j.is_label]
    right = sum(
        bool(j.ranks) and gold is not None and choice_of(j.ranks) == choice_of(gold.ranks)
        for gold, j in cases
    )
    return share_of(right, len(cases))


Others = Mapping[tuple[str, str], tuple[int, int]]


def with_others(cast: Iterable[Vote]) -> dict[tuple[str, str], tuple[int, int]]:
    """(item, annotator) -> (votes equal to the majority of the others on the same completions,
    votes with such a majority)."""
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for (item, _), unit in units_of(cast).items():
        if len(unit) == 1:
            continue
        for name, vote in unit.items():
            others = Counter(v.choice for who, v in unit.items() if who != name).most_common(2)
            if not others or (len(others) == 2 and others[0][1] == others[1][1]):
                continue
            same, total = found.get((item, name), (0, 0))
            found[item, name] = (same + (vote.choice == others[0][0]), total + 1)
    return found


def speed(judgements: Iterable[Judgement]) -> Mapping[str, float | int | None]:
    """Seconds per label: median, 5th and 95th percentile, and how many took less than two."""
    taken = sorted(j.duration_s for j in judgements if j.is_label and j.duration_s is not None)
    if not taken:
        return {"known": 0, "median_s": None, "p5_s": None, "p95_s": None, "under_2s": 0}
    return {
        "known": len(taken),
        "median_s": statistics.median(taken),
        "p5_s": taken[int(0.05 * (len(taken) - 1))],
        "p95_s": taken[int(0.95 * (len(taken) - 1))],
        "under_2s": sum(value < FAST_S for value in taken),
    }


# -- by group, and over time -----------------------------------------------------------------------


def _others_in(judged: Iterable[Judged]) -> Others:
    return with_others(votes(j for item, j in judged if item.gold is None))


def by_group(
    judged: Sequence[Judged],
    group_of: Callable[[Item, Judgement], str],
    others: Others | None = None,
) -> dict[str, dict[str, Any]]:
    """What each group does, and whether it differs from all others together: ``p`` of the
    difference, and ``differs`` where p is below 0.05 divided by the number of groups (Bonferroni).
    Judgements of the group "" are left out. ``others``: of all ``judged``, where it is known."""
    groups: dict[str, list[Judged]] = {}
    for item, judgement in judged:
        name = group_of(item, judgement)
        if name and judgement.is_label:
            groups.setdefault(name, []).append((item, judgement))
    others = _others_in(judged) if others is None else others
    measured = {name: _measures(entries, others) for name, entries in sorted(groups.items())}
    hits, cases = Counter[str](), Counter[str]()
    for measures in measured.values():
        for key, measure in measures.items():
            hits[key] += measure.hits
            cases[key] += measure.n
    table = {}
    for name, own in measured.items():
        tests = {
            key: difference_p(m.hits, m.n, hits[key] - m.hits, cases[key] - m.n)
            for key, m in own.items()
        }
        known = [p for p in tests.values() if p is not None]
        table[name] = {
            "labels": len(groups[name]),
            **{key: measure.share for key, measure in own.items()},
            "median_s": speed(j for _, j in groups[name])["median_s"],
            "p": tests,
            "differs": bool(known) and min(known) < 0.05 / (len(measured) * len(known)),
        }
    return table


def _measures(entries: Sequence[Judged], others: Others) -> dict[str, Share]:
    usual = [(item, judgement) for item, judgement in entries if item.gold is None]
    judgements = [judgement for _, judgement in usual]
    agreed = [others.get((j.item_id, j.annotator_id), (0, 0)) for j in judgements]
    ties = sum(judgement.choice in ("tie", "both_bad") for judgement in judgements)
    return {
        "prefers_first": position_bias(judgements),
        "prefers_longer": length_bias(usual),
        "undecided": share_of(ties, len(judgements)),
        "gold": gold_accuracy(entries),
        "agrees_with_others": share_of(sum(a for a, _ in agreed), sum(n for _, n in agreed)),
    }


def drift(judged: Sequence[Judged], others: Others | None = None) -> dict[str, Any]:
    """The earlier half of the labels against the later one, by ``created_at``."""
    labels = sorted((e for e in judged if e[1].is_label), key=lambda e: e[1].created_at)
    half = len(labels) // 2
    others = _others_in(judged) if others is None else others
    early, late = _measures(labels[:half], others), _measures(labels[half:], others)
    tests = {
        key: difference_p(early[key].hits, early[key].n, late[key].hits, late[key].n)
        for key in early
    }
    known = [p for p in tests.values() if p is not None]
    return {
        "early": _period(labels[:half], early),
        "late": _period(labels[half:], late),
        "p": tests,
        "drifts": bool(known) and min(known) < 0.05 / len(known),
    }


def _period(entries: Sequence[Judged], measures: Mapping[str, Share]) -> dict[str, Any]:
    return {
        **{key: measure.share for key, measure in measures.items()},
        "median_s": speed(judgement for _, judgement in entries)["median_s"],
    }


# -- the whole report ------------------------------------------------------------------------------


def quality_report(
    judged: Sequence[Judged], team_of: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Everything above as one dict for JSON. ``team_of``: annotator -> group. Control items count
    for ``gold`` only."""
    usual = [(item, j) for item, j in judged if item.gold is None]
    judgements = [judgement for _, judgement in usual]
    cast = votes(judgements)
    others = with_others(cast)
    teams = team_of or {}
    return {
        "agreement": dict(agreement(judgements, cast)),
        "gold": asdict(gold_accuracy(judged)),
        "position_bias": asdict(position_bias(judgements)),
        "length_bias": asdict(length_bias(usual)),
        "speed": dict(speed(judgements)),
        "annotators": _annotators(judged, cast, others),
        "teams": by_group(judged, lambda _, j: teams.get(j.annotator_id, ""), others),
        "topics": by_group(judged, lambda item, _: item.topic, others),
        "drift": drift(judged, others),
    }


def _annotators(
    judged: Sequence[Judged], cast: Sequence[Vote], others: Others
) -> dict[str, dict[str, Any]]:
    """Per annotator; ``reliability`` is that of the annotator model."""
    table = by_group(judged, lambda _, j: j.annotator_id, others)
    labels = {
        f"{item}/{pair}": {name: vote.choice for name, vote in unit.items()}
        for (item, pair), unit in units_of(cast).items()
        if len(unit) > 1
    }
    model = dawid_skene(labels)
    for name, row in table.items():
        row["reliability"] = None if model is None else model.accuracy.get(name)
    return table


def numbered(report: Mapping[str, Any]) -> dict[str, Any]:
    """A ``quality_report`` for files that outlive the store: annotators by number, the one with the
    most labels first, without their pseudonyms."""
    rows = sorted(report["annotators"].values(), key=lambda row: -row["labels"])
    return {**report, "annotators": {str(n): row for n, row in enumerate(rows, start=1)}}
