"""Attention in padded blocks is that of one sample after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from learner.models.padded_blocks import block_attention, padded_blocks

HEADS, SIZE = 4, 8
LENGTHS = {
    "alike": [5] * 4,
    "one block": [7, 6, 6, 1],
    "two blocks": [*range(30, 22, -1), *range(10, 2, -1)],
    "unsorted": [3, 9, 1, 12],
}


def one_by_one(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    parts = [x.split(lengths, dim=2) for x in (query, key, value)]
    outs = [
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        for q, k, v in zip(*parts, strict=True)
    ]
    return torch.cat(outs, dim=2).transpose(1, 2)


@pytest.mark.parametrize("kv_heads", [HEADS, 2])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_output_and_gradients_are_those_of_each_sample_alone(
    lengths: list[int], kv_heads: int
) -> None:
    generator = torch.Generator().manual_seed(0)

    def states(heads: int) -> Tensor:
        made = torch.randn(1, heads, sum(lengths), SIZE, generator=generator, dtype=torch.float64)
        return made.requires_grad_()

    given = states(HEADS), states(kv_heads), states(kv_heads)
    weight = torch.randn(1, sum(lengths), HEADS, SIZE, generator=generator, dtype=torch.float64)
    found = block_attention(*given, None, padded_blocks(lengths, "cpu"))
    wanted = one_by_one(*given, lengths)
    # The softmax is taken in float32, whatever comes in.
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    grads = [torch.autograd.grad((out * weight).sum(), given) for out in (found, wanted)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


def test_blocks_cover_the_pack_and_begin_where_samples_become_much_shorter() -> None:
    lengths = LENGTHS["two blocks"]
    blocks = padded_blocks(lengths, "cpu")
    assert [(b.begin, b.end, b.rows, b.width) for b in blocks] == [
        (0, sum(lengths[:8]), 8, 30),
        (sum(lengths[:8]), sum(lengths), 8, 10),
    ]
    # Too few samples for a block of their own are padded with the others.
    assert len(padded_blocks([30, 30, 3, 3], "cpu")) == 1
