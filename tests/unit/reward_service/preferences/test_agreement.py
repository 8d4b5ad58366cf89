from __future__ import annotations

import random
from typing import Any

import pytest

from reward_service.preferences.agreement import (
    agreement,
    alpha_interval,
    cohen_kappa,
    krippendorff_alpha,
    percent_agreement,
    votes,
)
from reward_service.preferences.annotator_model import dawid_skene
from reward_service.preferences.records import PAIR_RANKS, Judgement

# Krippendorff (2011), section C: four observers, twelve units, missing values.
OBSERVERS = (
    (1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None),
    (1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3),
    (None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None),
    (1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None),
)
UNITS = [[v for v in unit if v is not None] for unit in zip(*OBSERVERS, strict=True)]


def judgement(item: str, who: str, choice: str, **keys: Any) -> Judgement:
    given: dict[str, Any] = {
        "id": f"{item}/{who}",
        "item_id": item,
        "annotator_id": who,
        "answer": "all_bad" if choice == "both_bad" else "ranking",
        "ranks": PAIR_RANKS.get(choice, ()),
        "consent": "c",
        "created_at": "",
    }
    return Judgement(**given | keys)


def test_percent_agreement_by_hand() -> None:
    assert percent_agreement([["a", "a"], ["a", "b"], ["a", "a", "b"], ["b"]]) == 2 / 5
    assert percent_agreement([["a"], []]) is None


def test_cohen_kappa_by_hand() -> None:
    # 50 items: 20 both yes, 15 both no, 5 and 10 apart: p_o = 0.7, p_e = 0.5, kappa = 0.4.
    first = ["y"] * 25 + ["n"] * 25
    second = ["y"] * 20 + ["n"] * 5 + ["y"] * 10 + ["n"] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    assert cohen_kappa("abab", "abab") == pytest.approx(1.0)
    assert cohen_kappa("aaaa", "aaaa") is None
    assert cohen_kappa([], []) is None
    with pytest.raises(ValueError, match="4 and 3"):
        cohen_kappa("abab", "aba")


def test_krippendorff_alpha_by_hand() -> None:
    # Two annotators, ten items, seen 0/1: coincidences o00 = 10, o01 = o10 = 4, o11 = 2, n = 20,
    # n0 = 14, n1 = 6: alpha = 1 - 19 * 8 / (2 * 14 * 6) = 2/21.
    first = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0]
    second = [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    units = [[str(a), str(b)] for a, b in zip(first, second, strict=True)]
    assert krippendorff_alpha(units) == pytest.approx(2 / 21)


def test_krippendorff_alpha_with_missing_labels() -> None:
    # Units {a,a,b}, {b,b}, {a} (left out). Coincidences: aa = 2 * 1/2 = 1, ab = ba = 2 * 1/2 = 1,
    # bb = 2; n_a = 2, n_b = 3, n = 5: alpha = 1 - 4 * 2 / (2 * 2 * 3) = 1/3.
    assert krippendorff_alpha([["a", "a", "b"], ["b", "b"], ["a"]]) == pytest.approx(1 / 3)
    assert krippendorff_alpha([["a", "a"], ["b", "b"]]) == pytest.approx(1.0)
    assert krippendorff_alpha([["a", "a"], ["a", "a"]]) is None
    assert krippendorff_alpha([["a"]]) is None
    assert krippendorff_alpha([]) is None


def test_krippendorff_alpha_as_published() -> None:
    """0.743 and 0.815 in the paper; the further digits from the package `krippendorff` 0.9.0."""
    assert krippendorff_alpha(UNITS) == pytest.approx(NOMINAL, abs=1e-9)
    assert krippendorff_alpha(UNITS, "ordinal") == pytest.approx(ORDINAL, abs=1e-9)


NOMINAL, ORDINAL = 0.743421052631579, 0.8153875037548814


def test_the_interval_of_alpha_covers_and_narrows() -> None:
    def labelled(seed: int, items: int) -> list[list[list[str]]]:
        """Two annotators who answer the truth (a fair coin) with probability 0.9: of nominal alpha
        the true value is 0.9^2 + 0.1^2 - (1 - that) = 0.64."""
        rng = random.Random(seed)
        truth = [rng.choice("ab") for _ in range(items)]
        turned = {"a": "b", "b": "a"}
        return [[[t if rng.random() < 0.9 else turned[t] for _ in range(2)]] for t in truth]

    covered, widths = 0, []
    for seed in range(40):
        interval = alpha_interval(labelled(seed, 60))
        assert interval is not None
        covered += interval[0] <= 0.64 <= interval[1]
        widths.append(interval[1] - interval[0])
    assert covered >= 34
    large = alpha_interval(labelled(0, 960))
    assert large is not None
    assert large[1] - large[0] < 0.4 * sum(widths) / len(widths)
    assert alpha_interval([[["a", "b"]]]) is None
    assert alpha_interval([[["a"]], [["b"]]]) is None


def test_agreement_report() -> None:
    pairs = [("a", "a"), ("a", "b"), ("b", "b")]
    labels = [judgement(f"i{n}", "x", a) for n, (a, _) in enumerate(pairs)]
    labels += [judgement(f"i{n}", "y", b) for n, (_, b) in enumerate(pairs)]
    alone = judgement("alone", "z", "a")
    skipped = judgement("i0", "s", "skip", answer="skip")
    report = agreement([*labels, alone, skipped])
    assert report["items_with_several_labels"] == 3
    assert report["percent_agreement"] == pytest.approx(2 / 3)
    assert report["cohen_kappa"] == pytest.approx((2 / 3 - 4 / 9) / (1 - 4 / 9))
    assert report["krippendorff_alpha"] == report["krippendorff_alpha_ordinal"]


def test_rankings_are_votes_on_each_pair() -> None:
    ranked = judgement("i", "x", "", answer="ranking", ranks=(2, 1, 2))
    bad = judgement("i", "y", "both_bad")
    cast = {(v.annotator_id, v.pair): (v.choice, v.signed) for v in votes([ranked, bad])}
    assert cast == {
        ("x", (0, 1)): ("b", -1.0),
        ("x", (0, 2)): ("tie", 0.0),
        ("x", (1, 2)): ("a", 1.0),
        ("y", (0, 1)): ("both_bad", None),
        ("y", (0, 2)): ("both_bad", None),
        ("y", (1, 2)): ("both_bad", None),
    }


def test_a_far_disagreement_costs_ordinal_agreement_more() -> None:
    def of(strength: float) -> float:
        labels = [judgement(f"i{n}", who, "a", strength=3) for n in range(4) for who in "xy"]
        labels += [judgement(f"j{n}", who, "b", strength=3) for n in range(4) for who in "xy"]
        labels += [judgement("k", "x", "a", strength=1)]
        labels += [judgement("k", "y", "b", strength=strength)]
        return agreement(labels)["krippendorff_alpha_ordinal"]

    assert of(1) > of(3)


def test_dawid_skene_by_hand() -> None:
    """One round without smoothing, two items, two annotators. Votes: i1: x a, y a; i2: x b, y a.
    Majority: T1 = (1, 0), T2 = (1/2, 1/2). M: p = (3/4, 1/4); x: a|a = 1/1.5 = 2/3, b|b = 1;
    y: a|a = 1, a|b = 1. E: i1: a 3/4 * 2/3 * 1 = 1/2, b 1/4 * 0 * 1 = 0; i2: a 3/4 * 1/3 = 1/4,
    b 1/4 * 1 * 1 = 1/4."""
    model = dawid_skene({"i1": {"x": "a", "y": "a"}, "i2": {"x": "b", "y": "a"}}, 0.0, rounds=1)
    assert model is not None
    assert model.truth["i1"]["a"] == pytest.approx(1.0)
    assert model.truth["i2"] == pytest.approx({"a": 0.5, "b": 0.5})
    assert model.shares == pytest.approx({"a": 0.75, "b": 0.25})
    assert model.confusion["x"][0] == pytest.approx((2 / 3, 1 / 3))
    assert dawid_skene({}) is None


def test_dawid_skene_finds_who_can_be_relied_on() -> None:
    """Three who are right 90, 80 and 55 times in 100, and one who always says a."""
    rng = random.Random(3)
    skill = {"good": 0.9, "fair": 0.8, "poor": 0.55}
    truth = {f"i{n}": rng.choice("ab") for n in range(600)}
    turned = {"a": "b", "b": "a"}
    labels = {
        item: {
            **{w: t if rng.random() < s else turned[t] for w, s in skill.items()},
            "lazy": "a",
        }
        for item, t in truth.items()
    }
    model = dawid_skene(labels)
    assert model is not None
    for name, expected in {**skill, "lazy": 0.5}.items():
        assert model.accuracy[name] == pytest.approx(expected, abs=0.06)
    found = {item: max(p, key=lambda c: p[c]) for item, p in model.truth.items()}
    right = sum(found[item] == t for item, t in truth.items())
    majority = sum(
        (sum(label == t for label in labels[item].values()) > 2) for item, t in truth.items()
    )
    assert right > majority
    assert right / len(truth) > 0.88
