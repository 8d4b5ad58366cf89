from __future__ import annotations

from typing import Any

import pytest

from reward_service.preferences.quality import (
    agreement,
    cohen_kappa,
    held_out,
    krippendorff_alpha,
    percent_agreement,
    position_bias,
    wilson,
)
from reward_service.preferences.records import PAIR_RANKS, Judgement, prompt_hash


def label(item: str, who: str, choice: Any, order: Any = "ab") -> Judgement:
    return Judgement(
        id=f"{item}/{who}",
        item_id=item,
        annotator_id=who,
        answer="ranking",
        ranks=PAIR_RANKS[choice],
        shown_order=order,
        consent="c",
        created_at="",
    )


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


def test_position_bias_by_hand() -> None:
    labels = [label(f"i{n}", "x", "a", "ab") for n in range(9)]
    labels += [label("j", "x", "a", "ba"), label("k", "x", "tie", "ab"), label("m", "x", "b", "ba")]
    bias = position_bias(labels)
    assert (bias.decided, bias.first) == (11, 10)
    assert bias.significant
    assert not position_bias(labels[:1] + labels[9:10]).significant
    assert position_bias([]).share is None


def test_wilson_interval_known_value() -> None:
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_held_out_is_stable_by_prompt_and_near_its_fraction() -> None:
    hashes = [prompt_hash([{"role": "user", "content": str(n)}]) for n in range(4000)]
    out = [held_out(h, 0.1) for h in hashes]
    assert out == [held_out(h, 0.1) for h in hashes]
    assert sum(out) == pytest.approx(400, abs=70)
    wider = [held_out(h, 0.2) for h in hashes]
    assert all(b for a, b in zip(out, wider, strict=True) if a)
    assert out != [held_out(h, 0.1, "other") for h in hashes]
    assert not any(held_out(h, 0.0) for h in hashes)


def test_agreement_report() -> None:
    pairs = [("a", "a"), ("a", "b"), ("b", "b")]
    labels = [label(f"i{n}", "x", a) for n, (a, _) in enumerate(pairs)]
    labels += [label(f"i{n}", "y", b) for n, (_, b) in enumerate(pairs)]
    report = agreement([*labels, label("alone", "z", "a")])
    assert report["items_with_several_labels"] == 3
    assert report["percent_agreement"] == pytest.approx(2 / 3)
    assert report["cohen_kappa"] == pytest.approx((2 / 3 - 4 / 9) / (1 - 4 / 9))
