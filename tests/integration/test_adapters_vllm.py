"""Several adapters on one real vLLM against peft: parity, mixed batches, updates in flight.

Measured by vllm_adapter_checks.py in its own process; each test asserts on a part of the numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM has no build for this machine")
pytestmark = [pytest.mark.slow, pytest.mark.parallel]

EXACT = 1e-4  # nats; float32 against transformers and peft


@pytest.fixture(scope="module")
def measured(measured_by: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return measured_by("vllm_adapter_checks.py")


def test_each_adapter_and_the_base_are_exact_alone_and_in_one_batch(
    measured: dict[str, Any],
) -> None:
    for batch in ("one", "mixed", "all", "base", "canary", "after_refusals"):
        assert max(measured[batch].values()) < EXACT, batch
    assert set(measured["all"]) == {"one", "two", "base", "fixed"}


def test_an_update_in_flight_gives_each_version_s_tokens_exactly(measured: dict[str, Any]) -> None:
    got = measured["in_flight"]
    assert got["straddling"] >= 4
    assert max(got[part] for part in ("old", "new", "begun_after", "base")) < EXACT


def test_no_request_is_served_from_a_prefix_of_older_weights(measured: dict[str, Any]) -> None:
    got = measured["stale_prefix"]
    assert got["again"][0] >= 64
    assert got["after"][0] == 0
    assert max(off for _, off in got.values()) < EXACT


def test_what_does_not_fit_is_refused(measured: dict[str, Any]) -> None:
    """An adapter missing, a misshapen tensor, a layer without adapters, an A without its B; and a
    request before its adapter came."""
    assert measured["refused"] == ["WeightMismatch"] * 4
    assert measured["before_weights"] == "EngineFailure"


def test_the_proof_sees_one_changed_number(measured: dict[str, Any]) -> None:
    assert measured["tampered"] == "WeightMismatch"


@pytest.mark.long
def test_keep_goes_on_with_the_old_cache_and_begins_without_it(
    measured_by: Callable[[str], dict[str, Any]],
) -> None:
    measured = measured_by("vllm_adapter_keep.py")
    got = measured["in_flight"]
    assert max(got["old"], got["begun_after"], got["base"]) < EXACT
    assert got["new"] > 100 * EXACT  # else this was not "keep"
    assert measured["stale_prefix"]["after"][0] == 0
    assert max(measured["all"].values()) < EXACT
