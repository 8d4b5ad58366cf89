"""What a report shows of an evaluation beyond two policies' win rate: the ranking, each pair,
results by category and turn, and how the judge did. Pure: what is not in the record is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from learner.evaluation import charts
from learner.evaluation.page import plain
from learner.evaluation.run_files import Row, number


@dataclass(frozen=True, slots=True)
class RateRow:
    """A win rate with its interval. ``of``: what it is the win rate of, in one or two cells."""

    of: tuple[str, ...]
    rate: float
    low: float | None
    high: float | None
    length_controlled: float | None
    wins: int
    ties: int
    losses: int


@dataclass(frozen=True, slots=True)
class RatingRow:
    policy: str
    rating: float
    low: float
    high: float
    rate: RateRow


def ranking_rows(evaluation: Row | None) -> list[RatingRow]:
    found = []
    for entry in _list(evaluation, "ranking"):
        rating, low, high = (number(entry, key) for key in ("rating", "ci_low", "ci_high"))
        rate = _rate((plain(entry.get("policy")),), entry, interval=False)
        if rate is not None and rating is not None and low is not None and high is not None:
            found.append(RatingRow(rate.of[0], rating, low, high, rate))
    return found


def ranking_chart(rows: Sequence[RatingRow]) -> Markup | None:
    if len(rows) < 2:
        return None
    alt = "; ".join(f"{r.policy}: {r.rating:+.0f} ({r.low:+.0f} to {r.high:+.0f})" for r in rows)
    return charts.interval_chart(
        "ranking",
        "Rating of each policy, 95% interval",
        [(row.policy, row.rating, row.low, row.high) for row in rows],
        "rating (400 points: odds of ten to one)",
        alt,
    )


def ranking_verdict(evaluation: Row | None) -> str:
    """Which policy is the best, as far as that can be told; empty without a ranking."""
    rows = ranking_rows(evaluation)
    if len(rows) < 2:
        return ""
    first, second = rows[0], rows[1]
    wins = f"it wins {first.rate.rate:.1%} of its comparisons"
    if first.low > second.high:
        return f"{first.policy} is the best of {len(rows)} policies: {wins}."
    return (
        f"{first.policy} ranks first of {len(rows)} policies ({wins}), but its interval overlaps "
        f"that of {second.policy}: which of the two is better cannot be told."
    )


def pair_rows(evaluation: Row | None) -> list[RateRow]:
    rows = [
        _rate((plain(entry.get("policy")), plain(entry.get("baseline"))), entry)
        for entry in _list(evaluation, "comparisons")
    ]
    return [row for row in rows if row is not None]


def group_rows(evaluation: Row | None, key: str) -> list[RateRow]:
    """``key``: "categories" or "turns"."""
    groups = (evaluation or {}).get(key)
    if not isinstance(groups, dict):
        return []
    rows = [
        _rate((plain(group), plain(policy)), entry)
        for group, policies in groups.items()
        if isinstance(policies, dict)
        for policy, entry in policies.items()
        if isinstance(entry, dict)
    ]
    return [row for row in rows if row is not None]


def judge_rows(evaluation: Row | None) -> list[tuple[str, Any]]:
    """(what, value) of people or of an AI judge."""
    record = evaluation or {}
    people, ai = (record.get(key) for key in ("people", "ai_judge"))
    found: list[tuple[str, Any]] = []
    if isinstance(people, dict):
        agreed = people.get("agreement")
        agreement: Mapping[str, Any] = agreed if isinstance(agreed, dict) else {}
        found += [
            ("annotators", number(people, "annotators")),
            ("labels", number(people, "labels")),
            ("skipped or flagged", number(people, "skips_and_flags")),
            ("equal labels of two annotators", number(agreement, "percent_agreement")),
            ("Krippendorff's alpha", number(agreement, "krippendorff_alpha")),
            ("chose the completion shown first", number(people, "chose_first_shown")),
            ("median seconds per label", number(people, "median_s")),
        ]
    if isinstance(ai, dict):
        found += [
            ("both orders agree", number(ai, "position_consistency")),
            ("equal completions, not asked about", number(ai, "equal_completions")),
            ("asked with a reference completion", number(ai, "with_reference")),
        ]
    found.append(("comparisons that were not judged", number(record, "not_judged") or None))
    return [(what, value) for what, value in found if value is not None]


def _list(evaluation: Row | None, key: str) -> list[dict[str, Any]]:
    found = (evaluation or {}).get(key)
    return [e for e in found if isinstance(e, dict)] if isinstance(found, list) else []


def _rate(
    of: tuple[str, ...], entry: Mapping[str, Any], *, interval: bool = True
) -> RateRow | None:
    rate = number(entry, "win_rate")
    counts = [number(entry, key) for key in ("wins", "ties", "losses")]
    if rate is None or None in counts:
        return None
    wins, ties, losses = (int(count or 0) for count in counts)
    return RateRow(
        of=of,
        rate=rate,
        low=number(entry, "ci_low") if interval else None,
        high=number(entry, "ci_high") if interval else None,
        length_controlled=number(entry, "length_controlled_win_rate"),
        wins=wins,
        ties=ties,
        losses=losses,
    )
