"""Sequence parallelism: each process computes a part of the positions of every row.

Jacobs et al., "DeepSpeed Ulysses" (2023). Everything but attention treats positions alone. For
attention, processes exchange positions for heads: each then has all positions of a part of the
heads, and exchanges back. Two exchanges a layer, of a size that does not grow with the processes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from learner.compute.ranks import Ranks


@dataclass(frozen=True, slots=True, eq=False)
class SequencePart:
    """The positions that this process has of rows of `len(ranks) * width` positions.

    ranks: the processes that share the rows, S of them. positions: int64 [b, width], what rotary
    embeddings turn by.
    """

    ranks: Ranks
    positions: Tensor

    @property
    def width(self) -> int:
        return self.positions.shape[1]

    def to_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[b, heads, width, D] each -> [b, heads / S, S * width, D]: all positions, some heads.

        Key-value heads are repeated until S divides them; how many heads of the query share one
        follows from the shapes. In one exchange, and so in one dtype.
        """
        size = self.ranks.size
        times = size // math.gcd(size, key.shape[1])
        parts = [query, *(x.repeat_interleave(times, dim=1) for x in (key, value))]
        kind = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
        # [b, S, heads / S, width, D]: the second dimension says to whom.
        split = [x.to(kind).unflatten(1, (size, -1)) for x in parts]
        every: Tensor = _Exchange.apply(torch.cat(split, dim=2), self.ranks, True)
        q, k, v = every.split([x.shape[2] for x in split], dim=1)
        return q, k, v

    def to_positions(self, out: Tensor) -> Tensor:
        """[b, S * width, heads / S, D] -> [b, width, heads, D]."""
        own: Tensor = _Exchange.apply(out.transpose(1, 2), self.ranks, False)
        return own.flatten(1, 2).transpose(1, 2)

    def whole(self, tensor: Tensor) -> Tensor:
        """The sum over processes of tensors in which each has filled in its own numbers, and zeros
        elsewhere.

        Each process then computes the whole loss, so its own numbers get their whole gradient from
        its own loss: nothing is added up in backward.
        """
        found: Tensor = _Whole.apply(tensor, self.ranks)
        return found


class _Exchange(torch.autograd.Function):
    """Positions for heads ([b, S, h, width, D] -> [b, h, S * width, D]), or back. The one is the
    gradient of the other."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: Ranks, to_heads: bool) -> Tensor:
        ctx.ranks, ctx.to_heads = ranks, to_heads
        return _exchanged(tensor, ranks, to_heads)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _exchanged(grad, ctx.ranks, not ctx.to_heads), None, None


def _exchanged(tensor: Tensor, ranks: Ranks, to_heads: bool) -> Tensor:
    if to_heads:
        found = ranks.exchange(tensor.movedim(1, 0))  # [S, b, h, width, D], from each its positions
        return found.movedim(0, 2).flatten(2, 3)
    positions = tensor.unflatten(2, (ranks.size, -1))  # [b, h, S, width, D]
    return ranks.exchange(positions.movedim(2, 0)).movedim(0, 1)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: Ranks) -> Tensor:
        total = tensor.clone()
        ranks.sum_([total])
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
