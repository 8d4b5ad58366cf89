"""Limits on sampling against plain loops, and what they record."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from actors.engines.token_limits import TokenLimits
from actors.settings import EngineSettings
from cluster.contracts.errors import UserError
from cluster.contracts.records import TokenSets

SIZE = 40


def limits(**keys: Any) -> TokenLimits:
    base = {"model_path": "", "max_tokens": 9, "max_model_len": 40, "stop_token_ids": (1, 2)}
    return TokenLimits(EngineSettings(**{**base, **keys}), SIZE)


def logits(rows: int = 5) -> torch.Tensor:
    return torch.randn(rows, SIZE, generator=torch.Generator().manual_seed(0)) * 2


def kept_by_hand(row: torch.Tensor, keys: dict[str, Any], place: int) -> list[int]:
    left = [t for t in range(SIZE) if not keys.get("allowed_tokens") or t in keys["allowed_tokens"]]
    left = [t for t in left if t not in keys.get("banned_tokens", ())]
    if place < keys.get("min_tokens", 0):
        left = [t for t in left if t not in (1, 2)]
    left = sorted(left, key=lambda t: -float(row[t]))
    left = left[: keys.get("top_k") or SIZE]
    weights = [math.exp(float(row[t])) for t in left]
    total, so_far, kept = sum(weights), 0.0, []
    for token, weight in zip(left, weights, strict=True):
        if so_far / total < keys.get("top_p", 1.0) and weight >= keys.get("min_p", 0) * weights[0]:
            kept.append(token)
        so_far += weight
    return sorted(kept)


CASES: list[dict[str, Any]] = [
    {"top_k": 7},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"top_k": 12, "top_p": 0.9, "min_p": 0.02},
    {"allowed_tokens": (1, 3, 8, 30)},
    {"banned_tokens": (4, 5, 39)},
    {"min_tokens": 2},
    {"min_tokens": 2, "banned_tokens": (7,), "allowed_tokens": (1, 3, 7, 9), "top_k": 2},
]


@pytest.mark.parametrize("keys", CASES, ids=str)
def test_what_is_left_is_what_a_loop_leaves(keys: dict[str, Any]) -> None:
    made, places = limits(**keys), [0, 1, 2, 3, 8]
    given = logits()
    left = given.clone()
    recorded = made.apply(left, places)
    for row, place in enumerate(places):
        wanted = kept_by_hand(given[row], keys, place)
        assert (left[row] > -math.inf).nonzero()[:, 0].tolist() == wanted
        assert torch.equal(left[row, wanted], given[row, wanted])
        if recorded is not None:
            assert sorted(recorded[row]) == wanted
    assert (recorded is not None) == made.vary
    assert made.any


def test_no_limit_is_no_limit() -> None:
    made = limits()
    assert not made.any
    assert made.sets(4, []) is None


def test_fixed_limits_are_recorded_once_not_per_token() -> None:
    assert limits(banned_tokens=(9, 4)).sets(7, []) == TokenSets(ends=[7], counts=[-2], ids=[4, 9])
    assert limits(allowed_tokens=(9, 1), banned_tokens=(1,)).sets(7, []) == TokenSets(
        ends=[7], counts=[1], ids=[9]
    )
    assert limits(min_tokens=3).sets(7, []) == TokenSets(ends=[3, 7], counts=[-2, 0], ids=[1, 2])
    assert limits(min_tokens=3).sets(3, []) == TokenSets(ends=[3], counts=[-2], ids=[1, 2])
    assert limits(min_tokens=3, allowed_tokens=(1, 5)).sets(4, []) == TokenSets(
        ends=[3, 4], counts=[1, 2], ids=[5, 1, 5]
    )


def test_nothing_is_recorded_where_nobody_asks() -> None:
    made = limits(top_k=3, record_token_sets=False)
    left = logits()
    assert made.apply(left, [0] * 5) is None
    assert (left > -math.inf).sum(dim=-1).tolist() == [3] * 5
    assert made.sets(4, []) is None


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"banned_tokens": (40,)}, "token 40 is outside the vocabulary of 40"),
        ({"allowed_tokens": (-1,)}, "token -1 is outside"),
        ({"allowed_tokens": (3,), "banned_tokens": (3,)}, "no token is left"),
        ({"allowed_tokens": (1, 2), "min_tokens": 1}, "no token is left"),
    ],
)
def test_limits_that_cannot_work_are_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        limits(**keys)
