"""A vLLM engine of two processes: each fetches, loads and proves its part beside generation.

Measured once by vllm_parts_checks.py in its own process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM has no build for this machine")
pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.parallel]

EXACT = 1e-4  # nats; float32 against transformers


@pytest.fixture(scope="module")
def measured(measured_by: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return measured_by("vllm_parts_checks.py")


@pytest.mark.parametrize("way", ["there", "here"])
def test_an_update_in_buckets_takes_effect_whole_while_requests_are_in_flight(
    measured: dict[str, Any], way: str
) -> None:
    """there: each process fetches from the disk; here: one fetches for both."""
    for found in measured[way]:
        assert found["buckets"] > 10
        assert found["steps"] >= 1
        assert max(found["after"], found["canary"]) < EXACT
        assert found["proof"] == "accepted"
    versions = [found["version"] for way in ("there", "here") for found in measured[way]]
    assert sorted(versions) == [[1], [2], [3], [4]]


def test_two_buckets_are_shared_at_a_time_and_none_is_left_behind(measured: dict[str, Any]) -> None:
    assert measured["most"] <= 2
    assert measured["left"] == []


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "1 parameters missing ['model.embed_tokens.weight']"),
        ("extra", "'extra.weight' is unknown to the model"),
        ("shape", "'model.embed_tokens.weight' is (159, 128), the model has (160, 128)"),
        ("torn here", "weights of version 5, tensor"),
        ("torn there", "weights of version 6, tensor"),
    ],
)
def test_a_bad_update_leaves_the_weights_in_force(
    measured: dict[str, Any], kind: str, words: str
) -> None:
    refused = measured["refused"]
    assert refused[kind].startswith("WeightMismatch: ")
    assert words in refused[kind]
    assert "staged is None" in refused["swap"]
    assert max(refused["canary"]) < EXACT
    assert refused["proof"] == "accepted"


def test_a_swap_that_one_of_the_processes_does_not_make_is_caught(measured: dict[str, Any]) -> None:
    bad, good = measured["undone"]
    assert "was to serve version 7, but 19 of the tensors" in bad
    assert good == "accepted"
