"""LoRA operators for vLLM on a CPU: one matrix product per adapter that is present in the batch.

vLLM's own CPU operators copy the whole A and B of its adapter for each token, which makes a LoRA
engine three times slower. They also read "no adapter" (index -1) as the last slot, so that requests
to the base, in one batch with requests to adapters, would silently be computed with whatever that
slot holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform

Rows = list[tuple[int, Tensor | None]]
"""Slot of an adapter -> the rows of the batch that it computes; None: all of them."""


def use_grouped_kernels() -> None:
    """Have engines that are built from now on use these operators, where the platform is a CPU."""
    if current_platform.is_cpu():
        name = f"{GroupedLora.__module__}.{GroupedLora.__name__}"
        type(current_platform).get_punica_wrapper = classmethod(lambda cls: name)


class GroupedLora(PunicaWrapperCPU):
    """y += x A' B' for each adapter over its own rows; rows without an adapter stay as they are."""

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self._token_rows: Rows = []
        self._sampler_rows: Rows = []

    def update_metadata(self, mapping: Any, *rest: Any, **more: Any) -> None:
        super().update_metadata(mapping, *rest, **more)
        self._token_rows = rows_by_slot(self.token_lora_indices)
        self._sampler_rows = rows_by_slot(self.sampler_indices)

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Sequence[Tensor],
        lora_b_stacked: Sequence[Tensor],
        scale: float,
        output_slices: Sequence[int],
        *,
        buffer: Any = None,
        **more: Any,
    ) -> None:
        """y [tokens, out] is changed in place; slice i of its columns belongs to A and B i."""
        flat_y, flat_x = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        start = 0
        for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            part = flat_y[:, start : start + width]
            add_products(part, flat_x, a, b, scale, self._token_rows)
            start += width

    def add_lora_logits(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Tensor,
        lora_b_stacked: Tensor,
        scale: float,
        *,
        buffer: Any = None,
        **more: Any,
    ) -> None:
        flat_y, flat_x = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        add_products(flat_y, flat_x, lora_a_stacked, lora_b_stacked, scale, self._sampler_rows)


def rows_by_slot(indices: Tensor) -> Rows:
    """indices: int64 [rows], slot of each row's adapter, -1 for none."""
    slots = indices.unique().tolist()
    if len(slots) == 1:
        return [(slot, None) for slot in slots if slot >= 0]
    return [(slot, (indices == slot).nonzero()[:, 0]) for slot in slots if slot >= 0]


def add_products(
    y: Tensor, x: Tensor, a_stacked: Tensor, b_stacked: Tensor, scale: float, rows: Rows
) -> None:
    """y [rows, out] += scale * x A' B', A and B ([slots, 1, rank, in] and [slots, 1, out, rank]) of
    the slot that computes each row."""
    for slot, chosen in rows:
        a, b = a_stacked[slot, 0], b_stacked[slot, 0]
        part = x if chosen is None else x.index_select(0, chosen)
        product = (part.to(a.dtype) @ a.t()) @ b.t()
        if scale != 1.0:
            product = product * scale
        columns = min(y.shape[1], product.shape[1])
        product = product[:, :columns].to(y.dtype)
        if chosen is None:
            y[: len(product), :columns] += product
        else:
            y[:, :columns].index_add_(0, chosen, product)
