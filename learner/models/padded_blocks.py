"""Attention over a pack on a CPU: samples of about the same length at a time, padded for it alone.

All other layers see the pack, which has no padding. Attention alone wants rows: a sample at a time
makes many small products, and the whole pack in one row makes a product of every two samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_FULL = 0.75  # of a block's width: a shorter sample begins the next block, if enough are left
_LEAST = 8  # samples of a block; for fewer the calls cost more than the padding


@dataclass(frozen=True, slots=True, eq=False)
class PaddedBlock:
    """Samples that lie one after the other in a pack, at positions [begin, end).

    rows, width: of the padded rows they attend in. spread: int64 [rows * width], which of the
    positions stands at each place; a sample's last one at its padding. real: int64 [end - begin],
    the place of each position. None for both where all samples are as long as each other.
    ahead: float32 [width, width], -inf where a position would attend to a later one, else 0.
    """

    begin: int
    end: int
    rows: int
    width: int
    spread: Tensor | None
    real: Tensor | None
    ahead: Tensor

    def padded(self, states: Tensor) -> Tensor:
        """[1, heads, T, D] of the pack -> [heads * rows, width, D] of the block."""
        own = states.squeeze(0)
        if self.end - self.begin < own.shape[1]:
            own = own[:, self.begin : self.end]
        if self.spread is not None and self.real is not None:
            own = _Spread.apply(own, self.spread, self.real)
        return own.reshape(-1, self.width, states.shape[-1])

    def packed(self, rows: Tensor) -> Tensor:
        """[heads * rows, width, D] of the block -> [heads, end - begin, D]."""
        flat = rows.reshape(-1, self.rows * self.width, rows.shape[-1])
        return flat if self.real is None else _Gathered.apply(flat, self.real)


def padded_blocks(lengths: Sequence[int], device: torch.device | str) -> tuple[PaddedBlock, ...]:
    """The blocks of a pack of samples of these lengths, in order."""
    blocks, begin, first = [], 0, 0
    for last in _ends(lengths):
        block = _block(np.asarray(lengths[first:last]), begin, device)
        blocks.append(block)
        begin, first = block.end, last
    return tuple(blocks)


def block_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, blocks: Sequence[PaddedBlock]
) -> Tensor:
    """Causal attention of each sample of a pack to itself: [1, heads, T, D] (key and value may have
    fewer heads) -> [1, T, heads, D]."""
    alike = query.shape[1] // key.shape[1]
    if alike > 1:
        key, value = (states.repeat_interleave(alike, dim=1) for states in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    outs = []
    for block in blocks:
        q, k, v = (block.padded(states) for states in (query, key, value))
        outs.append(block.packed(_attended(q, k, v, scale, block.ahead)))
    return (outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)).transpose(0, 1)[None]


def _attended(query: Tensor, key: Tensor, value: Tensor, scale: float, ahead: Tensor) -> Tensor:
    """Each of [n, width, D]. Padding stands behind its sample, so the causal mask hides it.

    Written out, because torch's fused kernel makes its small products one by one: with the float32
    products of oneDNN (see `prepare_torch`) it takes five times as long.
    """
    mask = ahead.to(query.dtype).expand(len(query), *ahead.shape)
    scores = torch.baddbmm(mask, query, key.transpose(1, 2), alpha=scale)
    return torch.bmm(scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype), value)


def _ends(lengths: Sequence[int]) -> list[int]:
    """Behind which samples a block ends: where the next is much shorter or longer."""
    ends, first = [], 0
    for index in range(1, len(lengths)):
        block = lengths[first:index]
        alike = _FULL * max(block) <= lengths[index] and _FULL * lengths[index] <= min(block)
        if not alike and len(block) >= _LEAST and len(lengths) - index >= _LEAST:
            ends.append(index)
            first = index
    return [*ends, len(lengths)]


def _block(lengths: np.ndarray[Any, Any], begin: int, device: torch.device | str) -> PaddedBlock:
    rows, width, total = len(lengths), int(lengths.max()), int(lengths.sum())
    ahead = torch.full((width, width), -torch.inf, device=device).triu(1)
    if total == rows * width:
        return PaddedBlock(begin, begin + total, rows, width, None, None, ahead)
    starts = np.cumsum(lengths) - lengths
    columns = np.arange(width)
    spread = starts[:, None] + np.minimum(columns, lengths[:, None] - 1)
    real = np.flatnonzero((columns < lengths[:, None]).ravel())
    there, back = (torch.from_numpy(places).to(device) for places in (spread.ravel(), real))
    return PaddedBlock(begin, begin + total, rows, width, there, back, ahead)


class _Spread(torch.autograd.Function):
    """Positions [heads, n, D] to places [heads, rows * width, D]. torch's own gradient would add up
    what comes from every place; nothing comes from padding."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, spread: Tensor, real: Tensor) -> Tensor:
        ctx.save_for_backward(real)
        return states.index_select(1, spread)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(1, ctx.saved_tensors[0]), None, None


class _Gathered(torch.autograd.Function):
    """Places [heads, rows * width, D] to positions [heads, n, D]; the gradient of padding is 0."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, real: Tensor) -> Tensor:
        ctx.save_for_backward(real)
        ctx.places = states.shape[1]
        return states.index_select(1, real)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        every = grad.new_zeros(len(grad), ctx.places, grad.shape[-1])
        return every.index_copy_(1, ctx.saved_tensors[0], grad), None
