"""The audit finds whatever is wrong with the books, and nothing where nothing is."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from cluster.runs.audit import (
    Audit,
    Rules,
    Sample,
    audit_lines,
    audit_samples,
    audit_steps,
)

RULES = Rules(prompts_per_step=2, samples_per_prompt=2, bound=1, steps=3)
Books = list[dict[str, Any]]


def books() -> Books:
    """Three steps; group 3 was left out; after step 1 the run was resumed from step 1."""

    def row(step: int, trained: list[int], issued: int, **more: Any) -> dict[str, Any]:
        dropped = more.pop("dropped", {})
        return {
            "step": step, "trained": trained, "dropped": dropped, "samples": 2 * len(trained),
            "tokens": 10, "version_min": max(0, step - 1), "version_max": step, "issued": issued,
            "ready": 1, "in_flight": issued - 2 * (step + 1) - 1, "refused": 0, **more,
        }  # fmt: skip

    return [
        {"start": 0},
        row(0, [0, 1], 4),
        row(1, [2, 3], 6),
        {"start": 1},
        row(1, [2], 6, dropped={"3": "not text"}),
        row(2, [4, 5], 6, ready=0, in_flight=0),
    ]


def audited(rows: Books) -> Audit:
    audit = Audit()
    audit_steps(rows, RULES, audit)
    return audit


def test_sound_books_pass_across_a_resume() -> None:
    audit = audited(books())
    assert audit.violations == []
    assert (audit.issued, audit.trained, audit.in_flight) == (6, 5, 0)
    assert dict(audit.dropped) == {"not text": 1}
    assert (audit.sessions, audit.redone, audit.steps) == (2, 1, 3)
    assert audit_lines(audit)[0] == "6 groups issued = 5 trained + 1 dropped + 0 in flight"
    json.dumps(audit.record())


def _twice(rows: Books) -> None:
    rows.append(rows[-1])


def _gap(rows: Books) -> None:
    del rows[4]


def _lost(rows: Books) -> None:
    rows[5]["trained"] = [4]


def _foreign(rows: Books) -> None:
    rows[5]["trained"] = [4, 2]


def _stale(rows: Books) -> None:
    rows[5]["version_min"] = 0


def _from_the_future(rows: Books) -> None:
    rows[5]["version_max"] = 3


def _unbalanced(rows: Books) -> None:
    rows[1]["in_flight"] += 1


@pytest.mark.parametrize(
    ("change", "rule", "groups"),
    [
        (_twice, "none twice", (4, 5)),
        (_gap, "none lost", (4, 5)),
        (_lost, "none lost", (5,)),
        (_foreign, "none twice", (2,)),
        (_stale, "staleness", (4, 5)),
        (_from_the_future, "staleness", (4, 5)),
        (_unbalanced, "balance", ()),
    ],
)
def test_what_is_wrong_is_named(
    change: Callable[[Books], None], rule: str, groups: tuple[int, ...]
) -> None:
    rows = books()
    change(rows)
    found = audited(rows).violations
    assert (rule, groups) in [(violation.rule, violation.ids) for violation in found]


def samples() -> list[Sample]:
    return [
        Sample(group, place, 6, [(1, 4), (2, 6)], 0.5, "v1") for group in (4, 5) for place in (0, 1)
    ]


def audited_samples(given: list[Sample]) -> list[str]:
    audit = Audit()
    audit_samples(2, given, books()[5], RULES, audit)
    return [f"{v.rule} {v.ids}" for v in audit.violations]


@pytest.mark.parametrize(
    ("place", "change", "found"),
    [
        (0, {"group": 6}, "rollouts (6,)"),
        (0, {"sample": 1}, "none twice (4,)"),
        (3, {"spans": [(0, 6)]}, "staleness (5,)"),
        (3, {"spans": [(3, 6)]}, "staleness (5,)"),
        (3, {"spans": [(2, 5)]}, "versions (5,)"),
        (3, {"spans": [(2, 4), (2, 4), (2, 6)]}, "versions (5,)"),
        (2, {"score": float("nan")}, "scores (5,)"),
        (2, {"scorer": ""}, "scores (5,)"),
    ],
)
def test_rollouts_on_disk_are_the_second_witness(
    place: int, change: dict[str, Any], found: str
) -> None:
    from dataclasses import replace

    given = samples()
    assert audited_samples(given) == []
    given[place] = replace(given[place], **change)
    assert found in audited_samples(given)
