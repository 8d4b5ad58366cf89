from __future__ import annotations

import random
from typing import Any

import pytest

from cluster.contracts.config.preferences import QualityConfig
from reward_service.preferences.agreement import votes
from reward_service.preferences.gates import gates_of
from reward_service.preferences.quality import (
    binomial_p,
    by_group,
    difference_p,
    drift,
    gold_accuracy,
    length_bias,
    position_bias,
    quality_report,
    speed,
    wilson,
    with_others,
)
from reward_service.preferences.records import PAIR_RANKS, Candidate, Gold, Item, Judgement


def item(name: str, **keys: Any) -> Item:
    given: dict[str, Any] = {
        "id": name,
        "messages": ({"role": "user", "content": name},),
        "completions": (Candidate(text="short"), Candidate(text="much longer")),
        "source": "s",
        "license": "l",
        "created_at": "",
    }
    return Item(**given | keys)


def label(name: str, who: str, choice: str, order: str = "ab", **keys: Any) -> Judgement:
    given: dict[str, Any] = {
        "id": f"{name}/{who}",
        "item_id": name,
        "annotator_id": who,
        "answer": "all_bad" if choice == "both_bad" else "ranking",
        "ranks": PAIR_RANKS.get(choice, ()),
        "shown_order": order,
        "consent": "c",
        "created_at": "",
    }
    return Judgement(**given | keys)


def test_position_bias_by_hand() -> None:
    labels = [label(f"i{n}", "x", "a", "ab") for n in range(9)]
    labels += [label("j", "x", "a", "ba"), label("k", "x", "tie", "ab"), label("m", "x", "b", "ba")]
    labels += [label("unknown", "x", "a", "")]
    bias = position_bias(labels)
    assert (bias.n, bias.hits) == (11, 10)
    # P(10 or 11 of 11, or 0 or 1) = 2 * (11 + 1) / 2^11.
    assert bias.p == pytest.approx(24 / 2048)
    assert bias.significant
    assert not position_bias(labels[:1] + labels[9:10]).significant
    assert position_bias([]).share is None


def test_exact_and_approximate_tests_by_hand() -> None:
    assert binomial_p(5, 10) == 1.0
    assert binomial_p(0, 3) == pytest.approx(0.25)
    assert binomial_p(60, 100) == pytest.approx(0.0568879, abs=1e-6)
    # 30 of 50 against 20 of 50: z = 0.2 / sqrt(0.25 * 2 / 50) = 2.
    assert difference_p(30, 50, 20, 50) == pytest.approx(0.0455, abs=1e-4)
    assert difference_p(0, 0, 1, 2) is None
    assert difference_p(3, 3, 2, 2) is None


def test_wilson_interval_known_value() -> None:
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_gold_length_and_speed() -> None:
    gold = item("g", gold=Gold(ranks=(2, 1)))
    judged = [
        (gold, label("g", "x", "b", duration_s=1.0)),
        (gold, label("g", "y", "a", duration_s=4.0)),
        (gold, label("g", "z", "both_bad", duration_s=5.0)),
        (gold, label("g", "w", "", answer="skip", duration_s=0.5)),
        (item("i"), label("i", "x", "b")),
    ]
    assert (gold_accuracy(judged).hits, gold_accuracy(judged).n) == (1, 3)
    assert (length_bias(judged).hits, length_bias(judged).n) == (2, 3)
    taken = speed(j for _, j in judged)
    assert (taken["known"], taken["median_s"], taken["under_2s"]) == (3, 4.0, 1)
    assert speed([])["median_s"] is None


def test_agreement_with_others_leaves_even_splits_out() -> None:
    labels = [label("i", who, choice) for who, choice in (("x", "a"), ("y", "a"), ("z", "b"))]
    assert with_others(votes(labels)) == {("i", "z"): (0, 1)}
    pair = [label("i", "x", "a"), label("i", "y", "a"), label("alone", "x", "a")]
    assert with_others(votes(pair)) == {("i", "x"): (1, 1), ("i", "y"): (1, 1)}


def test_a_group_that_judges_by_length_is_named() -> None:
    rng = random.Random(0)
    teams = {"x": "north", "y": "south", "z": "east"}
    judged = [
        (item(f"i{n}"), label(f"i{n}", who, "b" if rng.random() < share else "a"))
        for n in range(150)
        for who, share in (("x", 0.5), ("y", 0.5), ("z", 0.9))
    ]
    table = by_group(judged, lambda _, judgement: teams[judgement.annotator_id])
    assert table["east"]["differs"]
    assert table["east"]["prefers_longer"] == pytest.approx(0.9, abs=0.07)
    assert table["east"]["p"]["prefers_longer"] < 1e-6
    fair = by_group(judged[::3] + judged[1::3], lambda _, judgement: teams[judgement.annotator_id])
    assert [row["differs"] for row in fair.values()] == [False, False]


def test_drift_is_seen_and_steadiness_is_not_drift() -> None:
    rng = random.Random(1)

    def days(late: float) -> list[tuple[Item, Judgement]]:
        return [
            (
                item(f"i{n}"),
                label(
                    f"i{n}",
                    "x",
                    "a" if rng.random() < (0.5 if n < 200 else late) else "b",
                    created_at=f"2026-01-{1 + n // 20:02}",
                ),
            )
            for n in range(400)
        ]

    tired = drift(days(0.85))
    assert tired["drifts"]
    assert tired["late"]["prefers_first"] > 0.7
    assert not drift(days(0.5))["drifts"]
    assert not drift([])["drifts"]
    assert drift([])["early"]["median_s"] is None


def report() -> dict[str, Any]:
    judged = [
        (item(f"i{n}", topic="t"), label(f"i{n}", who, choice, "ab"))
        for n in range(20)
        for who, choice in (("x", "a"), ("y", "a" if n % 4 else "b"))
    ]
    gold = item("g", gold=Gold(ranks=(1, 2)))
    judged += [(gold, label("g", "x", "a")), (gold, label("g", "y", "b"))]
    return quality_report(judged, {"x": "north"})


def test_the_report_holds_everything() -> None:
    found = report()
    assert found["agreement"]["percent_agreement"] == pytest.approx(0.75)
    assert (found["gold"]["hits"], found["gold"]["n"]) == (1, 2)
    assert found["position_bias"]["n"] == 40, "control items stay out"
    assert found["annotators"]["x"]["gold"] == 1.0
    assert found["annotators"]["y"]["agrees_with_others"] == pytest.approx(0.75)
    assert set(found["teams"]) == {"north"}
    assert set(found["topics"]) == {"t"}
    assert 0 <= found["annotators"]["x"]["reliability"] <= 1
    empty = quality_report([])
    assert empty["agreement"]["krippendorff_alpha"] is None


def test_gates() -> None:
    none_set = gates_of(QualityConfig(), report(), 42)
    assert none_set == []
    config = QualityConfig(min_alpha=0.4, min_gold=0.8, max_position_bias=0.1, min_labels=40)
    gates = {gate.name: gate for gate in gates_of(config, report(), 42)}
    assert {name: gate.passed for name, gate in gates.items()} == {
        "min_labels": True,
        "min_alpha": False,
        "min_gold": False,
        "max_position_bias": False,
    }
    assert "gold accuracy is 0.5, but must be at least 0.8 (quality.min_gold)" in (
        gates["min_gold"].why
    )
    assert "0.875 of the comparisons prefer the completion shown first" in (
        gates["max_position_bias"].why
    )
    unmeasured = gates_of(config, quality_report([]), 0)
    assert not any(gate.passed for gate in unmeasured)
    assert "no two annotators judged the same items" in unmeasured[1].why
