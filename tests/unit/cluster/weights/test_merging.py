"""The merge that learner and workers compute: exact to one rounding, and the same everywhere."""

from __future__ import annotations

import pytest
import torch

from cluster.contracts.errors import WeightMismatch
from cluster.weights.merging import (
    base_fingerprint,
    factor_names,
    factors_by_weight,
    merged_weight,
)


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_merge_is_rounded_once_and_does_not_depend_on_how_it_is_cut() -> None:
    base, a, b = some(700, 300), some(4, 300, seed=1), some(700, 4, seed=2)
    exact = base.double() + 2.0 * (b.double() @ a.double())
    before = base.clone()
    merged = merged_weight(base, a, b, 2.0)
    assert torch.equal(merged, exact.float())
    assert torch.equal(base, before)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(merged_weight(base, a, b, 2.0), merged)
    short = merged_weight(base.bfloat16(), a, b, 2.0)
    assert torch.equal(short, (base.bfloat16().double() + 2.0 * (b.double() @ a.double())).float())


def test_factors_come_in_pairs() -> None:
    a, b = factor_names("model.layers.0.mlp.up_proj")
    given = {a: some(4, 8), b: some(16, 4)}
    assert list(factors_by_weight(given)) == ["model.layers.0.mlp.up_proj.weight"]
    for odd in ({a: given[a]}, {b: given[b]}, {**given, "lm_head.weight": some(2, 2)}):
        with pytest.raises(WeightMismatch, match=r"no B|no layer"):
            factors_by_weight(odd)


def test_a_fingerprint_knows_numbers_names_and_type_but_not_the_order() -> None:
    tensors = {"one": some(3, 4), "two": some(5, seed=1)}
    found = base_fingerprint(tensors.items(), "float32")
    assert base_fingerprint(reversed(tensors.items()), "float32") == found
    moved = {**tensors, "two": tensors["two"] + 1e-6}
    named = {"one": tensors["one"], "three": tensors["two"]}
    assert base_fingerprint(moved.items(), "float32") != found
    assert base_fingerprint(named.items(), "float32") != found
    assert base_fingerprint(tensors.items(), "bfloat16") != found
    # A base that is kept in bfloat16 has lost the bits that are not part of it.
    rounded = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    assert base_fingerprint(rounded.items(), "bfloat16") == base_fingerprint(
        tensors.items(), "bfloat16"
    )
