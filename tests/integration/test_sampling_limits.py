"""Limits on sampling in real vLLM: the learner computes the probabilities that were sampled from.

All measured once by vllm_limits.py in its own process; each test asserts on a part of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM has no build for this machine")
pytestmark = [pytest.mark.slow, pytest.mark.parallel]

EXACT = 2e-5  # nats, over tiny models in float32
VARYING, FIXED = ("top_k", "top_p", "min_p", "all"), ("banned_tokens", "allowed_tokens")


@pytest.fixture(scope="module")
def measured(measured_by: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return measured_by("vllm_limits.py")


@pytest.mark.parametrize("name", [*VARYING, "min_tokens", *FIXED])
def test_engine_and_learner_agree_padded_and_packed(measured: dict[str, Any], name: str) -> None:
    got = measured[name]
    assert got["tokens"] > 40
    assert max(got["padded"], got["packed"]) < EXACT
    assert got["ignored"] > 1e-2  # a learner that does not know of the limit


def test_what_was_sampled_keeps_to_the_limits(measured: dict[str, Any]) -> None:
    def tokens(name: str) -> set[int]:
        return {token for ids, _ in measured[name]["sampled"] for token in ids}

    assert tokens("allowed_tokens") <= {1, *range(30, 60)}
    assert not tokens("banned_tokens") & set(range(4, 40))
    early = [t for ids, _ in measured["min_tokens"]["sampled"] for t in ids[:6]]
    assert not set(early) & set(range(1, 60))
    assert min(len(ids) for ids, _ in measured["min_tokens"]["sampled"]) == 7


def test_what_is_carried_is_small(measured: dict[str, Any]) -> None:
    for name in FIXED:  # once per completion, not per token
        assert measured[name]["bytes"] < 12 * (4 * 50 + 64)
    assert measured["top_k"]["bytes"] < measured["top_k"]["tokens"] * (4 * 20 + 8) + 1000


def test_limits_across_a_swap_with_staleness(measured: dict[str, Any]) -> None:
    got = measured["swap, recompute"]
    assert got["straddling"] >= 4
    assert got["version 1"] < EXACT
    assert 1e-3 < got["stale"] < 10  # other weights, the sets of the old ones: finite
    assert got["kept left over"] == 0
    assert got["canary"] < 1e-4  # no limit touches it


def test_stop_strings_end_completions_and_are_cut_off_their_text(
    measured: dict[str, Any],
) -> None:
    got = measured["stop"]
    assert max(got["padded"], got["packed"]) < EXACT
    ended = 0
    for ids, reason, text in got["answers"]:
        words = [f"w{i}" for i in ids if i not in (1, 2)]
        whole = " ".join(words)
        by_string = reason == "stop" and ids[-1] != 1
        ended += by_string
        if by_string:
            before = " ".join(f"w{i}" for i in ids[:-1] if i not in (1, 2))
            assert len(ids) > 4
            assert any(whole.find(s, len(before) - len(s) + 1) >= 0 for s in ("w5", "w7 w"))
            assert whole.startswith(text)
            assert len(text) < len(whole)
        else:
            assert text == whole
    assert ended >= 3


def test_a_token_outside_the_vocabulary_is_refused(measured: dict[str, Any]) -> None:
    assert "token 160 is outside the vocabulary of 160" in measured["refused"]
