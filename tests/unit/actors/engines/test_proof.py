"""Digests: one that does not see how numbers are joined and ordered, one that sees every byte."""

from __future__ import annotations

import pytest
import torch

from actors.engines.proof import differing, fingerprint, number_sum


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_is_that_of_the_parts_however_they_are_joined(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, 40, generator=generator).to(dtype) for n in (64, 32, 1000))
    fused = torch.cat([q, k, v, torch.zeros(7, 40, dtype=dtype)])
    assert number_sum([fused]) == number_sum([v, q, k])
    assert number_sum([fused.T.contiguous()]) == number_sum([fused])
    assert number_sum([fused.float()]) == number_sum([fused])


@pytest.mark.parametrize("bit", [0, 1, 7, 15, 22, 30, 31])
def test_any_bit_of_any_number_changes_the_sum(bit: int) -> None:
    weights = torch.randn(300, 300, generator=torch.Generator().manual_seed(1))
    before = number_sum([weights])
    for row in (0, 150, 299):
        changed = weights.clone()
        changed.view(torch.int32)[row, row] ^= 1 << bit if bit < 31 else -(1 << 31)
        assert number_sum([changed]) != before


def test_changes_that_cancel_in_a_plain_sum_are_seen() -> None:
    """One number a step up, another a step down: an optimiser at a small rate does just that."""
    weights = torch.randn(1000, generator=torch.Generator().manual_seed(2)).abs() + 1
    changed = weights.clone()
    changed.view(torch.int32)[3] += 1
    changed.view(torch.int32)[4] -= 1
    assert number_sum([changed]) != number_sum([weights])


def test_a_fingerprint_sees_order_and_type() -> None:
    weights = torch.arange(6.0)
    plain = fingerprint({"w": weights})
    assert fingerprint({"w": weights.clone()}) == plain
    assert fingerprint({"w": weights.flip(0)}) != plain
    assert fingerprint({"w": weights.bfloat16()}) != plain
    assert differing(plain, fingerprint({"w": weights, "x": weights})) == ["x"]
    assert differing(plain, {"w": "another"}) == ["w"]
    assert differing(plain, plain) == []


def test_nothing_is_changed_by_looking() -> None:
    """Integers too: a persistent buffer may hold them."""
    held = [torch.randn(5), torch.arange(5), torch.arange(5, dtype=torch.uint8)]
    before = [tensor.clone() for tensor in held]
    assert number_sum(held) == number_sum(before)
    assert all(torch.equal(a, b) for a, b in zip(held, before, strict=True))
