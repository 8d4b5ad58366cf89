"""What a report tells of labels, and that a damaged record leaves gaps, never an error."""

from __future__ import annotations

from typing import Any

import pytest

from learner.evaluation.labels_panel import agreement_words, label_tables

SHARE = {"hits": 6, "n": 10, "share": 0.6, "low": 0.31, "high": 0.83, "p": 0.75}
HALF = {"agrees_with_others": 0.75, "prefers_first": None, "median_s": 4.0}
LABELS: dict[str, Any] = {
    "sha256": "ab" * 32,
    "counts": {"judgements": 12, "annotators": 2, "consents": {"c1": 12}, "guidelines": {"": 12}},
    "gates": [{"name": "min_alpha", "passed": True, "why": "alpha is 0.5, at least 0.4"}],
    "quality": {
        "agreement": {
            "krippendorff_alpha": 0.5,
            "krippendorff_alpha_interval": [0.25, 0.75],
            "percent_agreement": 0.8,
            "cohen_kappa": None,
        },
        "position_bias": SHARE,
        "annotators": {"1": {"labels": 9, **HALF, "reliability": 0.9, "differs": True}},
        "drift": {"early": HALF, "late": HALF, "drifts": False},
    },
}


def test_what_is_told_of_labels() -> None:
    counts, quality, gates, annotators, drift = label_tables(LABELS)
    assert ("consents", "c1: 12") in counts.rows
    assert ("guideline versions", "not known: 12") in counts.rows
    assert quality.rows == (
        ("Krippendorff's alpha", "0.5", "0.25 to 0.75"),
        ("equal labels", "80.0%", ""),
        ("prefer the completion shown first", "60.0%", "31.0% to 83.0%"),
    )
    assert gates.rows == (("min_alpha", "passed", "alpha is 0.5, at least 0.4"),)
    (row,) = annotators.rows
    assert row[:3] == ("1", "9", "75.0%")
    assert row[-2:] == ("0.9", "differs from the others")
    assert drift.caption == "Drift over time: no significant difference"
    assert agreement_words(LABELS) == "0.500 (0.25 to 0.75)"


@pytest.mark.parametrize("key", [*LABELS, *LABELS["quality"]])
@pytest.mark.parametrize("broken", [None, 3, "x", [], [1], {}, {"x": 1}])
def test_a_damaged_part_leaves_a_gap(key: str, broken: Any) -> None:
    top = {**LABELS, key: broken} if key in LABELS else LABELS
    quality = {**LABELS["quality"], key: broken} if key in LABELS["quality"] else top["quality"]
    label_tables({**top, "quality": quality})
    agreement_words({**top, "quality": quality})
