"""A swap at every decode step on real vLLM: each token is of the version it is recorded with.

All measured once by vllm_torture.py in its own process; each test asserts on a part of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM has no build for this machine")
pytestmark = [pytest.mark.slow, pytest.mark.parallel]

EXACT = 1e-4  # nats; float32 against transformers


@pytest.fixture(scope="module")
def measured(measured_by: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return measured_by("vllm_torture.py")


@pytest.mark.parametrize("mode", ["recompute", "keep"])
def test_the_torture_was_one(measured: dict[str, Any], mode: str) -> None:
    """Otherwise the exactness below would say nothing."""
    got = measured[mode]
    assert got["most"] >= 16  # requests in flight at once
    assert got["swaps"] >= 40
    assert got["most_versions"] >= 16  # in one answer
    assert got["lengths"] >= 8
    assert got["done"] == 44
    assert got["beside"]["steps"] >= 5


def test_recompute_each_token_is_what_its_version_computes(measured: dict[str, Any]) -> None:
    for part in (measured["recompute"], measured["recompute"]["beside"]):
        assert part["tokens"] > 150
        assert part["worst"] < EXACT
        assert part["ambiguous"] < 0.02  # no other version would have passed for it


def test_keep_each_token_is_what_its_version_computes_over_the_old_cache(
    measured: dict[str, Any],
) -> None:
    for part in (measured["keep"], measured["keep"]["beside"]):
        assert part["tokens"] > 150
        assert part["worst"] < EXACT
        assert part["mixed"] > 0.5  # a forward pass under one version would not give it


@pytest.mark.parametrize("mode", ["recompute", "keep"])
def test_several_tokens_between_two_swaps_are_of_the_recorded_version(
    measured: dict[str, Any], mode: str
) -> None:
    got = measured[mode]["turns"]
    assert got["done"] == 44
    assert got["longest"] == 5  # a whole turn under one version
    assert got["most_versions"] >= 4
    assert got["tokens"] > 150
    assert got["worst"] < EXACT


@pytest.mark.parametrize("mode", ["recompute", "keep"])
def test_no_prefix_crosses_versions(measured: dict[str, Any], mode: str) -> None:
    """The same prompt twice under each of two versions, the cache in use by another request."""
    assert measured[mode]["prefix"] == [0, 64, 0, 64]


@pytest.mark.parametrize(("way", "count"), [("recompute", 26), ("fixed", 26)])
def test_every_parameter_reaches_the_engine(measured: dict[str, Any], way: str, count: int) -> None:
    """With biases and a tied head; ``fixed``: copied over the weights in force, as on CUDA."""
    got = measured[way]["each_parameter"]
    assert len(got) == count
    assert {name: moved for name, (moved, _) in got.items() if moved < 1e-3} == {}
    assert {name: off for name, (_, off) in got.items() if off > EXACT} == {}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_swap_that_does_not_do_its_work_is_caught(measured: dict[str, Any], dtype: str) -> None:
    """At lr 1e-7, where the canary cannot tell the versions apart."""
    got = measured["recompute"]["undone"] if dtype == "float32" else measured["undone_bfloat16"]
    assert got["good"] == ["accepted"] * 7
    for fault in ("nothing", "there and back", "no kernels", "kernels only", "one kernel not"):
        assert got[fault].startswith("WeightMismatch: vllm"), fault
        assert "of the tensors it computes with are not of that version" in got[fault]
    assert got["first half"].startswith("WeightMismatch")
    assert max(got["old check"]) < {"float32": 1e-3, "bfloat16": 0.5}[dtype]


def test_a_copy_over_fixed_addresses_that_copies_nothing_is_caught(
    measured: dict[str, Any],
) -> None:
    first, undone, last = measured["fixed"]["undone"]
    assert (first, last) == ("accepted", "accepted")
    assert undone.startswith("WeightMismatch")


def test_packed_kernels_hold_the_published_numbers_bit_for_bit(measured: dict[str, Any]) -> None:
    held, wanted = measured["recompute"]["read_out"]
    assert held == wanted


def test_fixed_addresses_stay_fixed(measured: dict[str, Any]) -> None:
    assert measured["fixed"]["moved"] == []


def test_a_tied_head_that_the_checkpoint_spells_out_follows_updates(
    measured: dict[str, Any],
) -> None:
    for got in (measured["spelled_out_head"], measured["fixed"]["spelled_out_head"]):
        assert len(got) == 4
        assert max(got) < EXACT


def test_a_failure_half_way_in_staging_leaves_the_old_weights(measured: dict[str, Any]) -> None:
    got = measured["recompute"]["half_staged"]
    assert got["said"].startswith("Retryable: vllm")
    assert got["said"].endswith("failed staging version 6000, version 5026 stays in force: no room")
    assert "was to swap in version 6000, staged is None" in got["swap"]
    assert got["still"][0] < EXACT
    assert got["still"][1] == 0
    assert "passed over ['model.embed_tokens.weight']" in got["dropped"]
    assert got["after"] < EXACT


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("torn", "version 4, tensor 'model.embed_tokens.weight': checksum differs: torn"),
        ("truncated", "version 4, tensor 'model.embed_tokens.weight': shape (159, 64), announced"),
        ("missing", "version 4, tensor 'model.embed_tokens.weight': missing (1 in all)"),
        ("older", "version 2 arrived after a newer one: version 3 is in force"),
        ("duplicate", "version 3 arrived again: version 3 is in force"),
        ("unfitting", "does not fit the model: 'extra.weight' is unknown to the model"),
    ],
)
def test_a_bad_update_is_refused_and_the_worker_goes_on(
    measured: dict[str, Any], kind: str, words: str
) -> None:
    message, versions, off = measured["worker"][kind]
    assert message.startswith("WeightMismatch: ")
    assert words in message
    assert versions == [3]
    assert off < EXACT
    assert measured["worker"]["then"][0] == [4]  # and takes the next good one
    assert measured["worker"]["then"][1] < EXACT
    assert measured["worker"]["late"] == [True]  # aborted in the middle of its decoding
    assert measured["worker"]["after_late"][1] < EXACT


@pytest.mark.parametrize("mode", ["recompute", "keep"])
def test_a_swap_takes_less_than_a_step(measured: dict[str, Any], mode: str) -> None:
    """CPU seconds of the swap itself (a tiny model: 0.1 ms); it was 10 ms when it loaded."""
    assert measured[mode]["cpu"] < 0.002
