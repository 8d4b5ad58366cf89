"""The real vLLM against transformers: parity, swaps in flight, exact versions, no stale cache.

All measured once by vllm_checks.py in its own process; each test asserts on a part of the numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM has no build for this machine")
pytestmark = [pytest.mark.slow, pytest.mark.parallel]

EXACT = 1e-4  # nats; float32 against transformers
ARCHITECTURES = (
    "llama-tied",
    "llama-untied",
    "qwen2-tied",
    "qwen3-untied",
    "gemma-tied",
    "gemma2-tied",
    "mistral-tied",
    "mistral-untied",
)


@pytest.fixture(scope="module")
def measured(measured_by: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return measured_by("vllm_checks.py")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_log_probabilities_equal_transformers_before_and_after_updates(
    measured: dict[str, Any], name: str
) -> None:
    got = measured[name]
    assert len(got["parity"]) == 3
    assert max(got["parity"]) < EXACT
    assert max(got["canary"]) < EXACT
    assert got["versions"] == [1]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_numbers_that_vllm_loads_are_the_published_ones(
    measured: dict[str, Any], name: str
) -> None:
    """Else a swap would be proven against what vLLM loaded only."""
    assert measured[name]["keeps_numbers"] is True


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_answer_ends_with_the_stop_token_or_at_the_limit(
    measured: dict[str, Any], name: str
) -> None:
    assert measured[name]["ends_right"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_partial_foreign_and_misshapen_updates_are_refused_untouched(
    measured: dict[str, Any], name: str
) -> None:
    assert measured[name]["refused"] == ["WeightMismatch"] * 3
    assert measured[name]["version_after_refusal"] == 1
    assert measured[name]["canary"][3] < EXACT


def test_log_probabilities_are_of_the_temperature_sampled_at(measured: dict[str, Any]) -> None:
    assert measured["recompute"]["temperature"] < EXACT


@pytest.mark.parametrize("how", ["swap", "swap_own_versions"])
def test_recompute_gives_each_version_s_tokens_exactly(measured: dict[str, Any], how: str) -> None:
    got = measured["recompute"][how]
    assert got["straddling"] >= 4
    assert got["spans_exact"]
    assert max(got["old"], got["new"], got["new_begun_before"]) < EXACT


def test_keep_goes_on_with_the_old_cache_and_begins_without_it(measured: dict[str, Any]) -> None:
    got = measured["keep"]["swap"]
    assert got["straddling"] >= 4
    assert got["spans_exact"]
    assert max(got["old"], got["new"]) < EXACT
    assert got["new_begun_before"] > 100 * EXACT  # else this was not "keep"


def test_keep_never_serves_a_new_request_from_an_old_prefix(measured: dict[str, Any]) -> None:
    """Requests vLLM had accepted, but not begun, before the swap are the hard case."""
    got = measured["keep"]
    assert got["waiting_again"] > 0
    assert got["begun_after"] >= got["waiting_again"]
    assert got["begun_after_worst"] < EXACT
    assert got["all_done"]


def test_prefixes_are_shared_within_a_version(measured: dict[str, Any]) -> None:
    assert measured["recompute"]["cached_within_version"] >= 6 * 32


def test_every_parameter_reaches_the_engine(measured: dict[str, Any]) -> None:
    got = measured["recompute"]["each_parameter"]
    assert len(got) == 20
    assert {name: moved for name, (moved, _) in got.items() if moved < 1e-3} == {}
    assert {name: off for name, (_, off) in got.items() if off > EXACT} == {}


def test_abort_seeds_and_bad_prompts(measured: dict[str, Any]) -> None:
    got = measured["recompute"]
    assert got["unfinished_after_abort"] == 0
    assert got["seeded_alike"]
    assert got["drawing_changes_nothing"]  # as an evaluation does, beside training
    assert got["bad_prompts"] == ["refused"] * 3


def test_bfloat16_weights_arrive(measured: dict[str, Any]) -> None:
    assert measured["bfloat16"]["canary"] < 0.3


def test_an_engine_in_8_bits_takes_every_update_and_is_close_to_the_learner(
    measured: dict[str, Any],
) -> None:
    found = measured["int8"]
    assert max(found["canary"]) < 0.1, "the median token"
    assert min(found["moved"]) > 3 * max(found["canary"]), "else an old kernel would pass"
    assert "down_proj" in found["left_behind"]
    assert "no kernel for fp8" in found["fp8"]


def test_an_engine_that_shares_a_gpu_has_a_cache_of_a_set_size(measured: dict[str, Any]) -> None:
    """vLLM's own measurement of what is left fails where another process frees memory."""
    alone, shared = measured["gpu"]["alone"], measured["gpu"]["shared"]
    assert alone["kv_cache_memory_bytes"] is None
    assert shared["kv_cache_memory_bytes"] == 8 << 20
    assert alone["gpu_memory_utilization"] == shared["gpu_memory_utilization"] == 0.45
    # vLLM's newer runner has no place for what limits sampling.
    assert [one["VLLM_USE_V2_MODEL_RUNNER"] for one in (alone, shared)] == [None, "0"]
