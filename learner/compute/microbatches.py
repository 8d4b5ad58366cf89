"""Rows of different lengths -> a few padded tensors, with little padding. No model, no config.

Padding is on the right.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRow:
    """One row: the prompt's and the response's ids together.

    input_ids: [T] int32. loss_mask: [T] bool, True at the tokens whose log-probability is trained;
    the first token has no prediction, so it never counts. Raises ValueError where that is broken.
    """

    input_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]

    def __post_init__(self) -> None:
        if self.input_ids.ndim != 1 or self.input_ids.shape != self.loss_mask.shape:
            raise ValueError(
                f"a row has ids {self.input_ids.shape} and a mask {self.loss_mask.shape}; "
                "both must be [T]"
            )
        if len(self.input_ids) == 0:
            raise ValueError("a row has no tokens")
        if self.loss_mask[0]:
            raise ValueError("the first token of a row cannot be trained: nothing predicts it")

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def trained(self) -> int:
        """Number of trained tokens."""
        return int(self.loss_mask.sum())


def token_row(ids: Iterable[int], mask: Iterable[bool]) -> TokenRow:
    """A row from plain lists. A trained first token leaves the loss: nothing predicts it."""
    loss_mask = np.fromiter(mask, dtype=np.bool_)
    loss_mask[:1] = False
    return TokenRow(input_ids=np.fromiter(ids, dtype=np.int32), loss_mask=loss_mask)


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedRows:
    """[B, T] tensors: input_ids int64, attention_mask int64 (1: real), position_ids int64,
    loss_mask bool."""

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    loss_mask: Tensor


def plan_microbatches(
    lengths: Sequence[int], tokens_per_microbatch: int, *, packed: bool = False
) -> list[list[int]]:
    """Indices of the rows of each microbatch, such that rows * longest <= the budget.

    packed: without padding, the sum of the lengths is what has to fit.
    Sorted by length (stable), longest microbatch first, so that the peak of memory is met at once.
    A row over the budget is alone. Every index occurs exactly once. Raises ValueError for a budget
    or a length that is not positive.
    """
    if tokens_per_microbatch < 1:
        raise ValueError(f"tokens_per_microbatch must be positive, got {tokens_per_microbatch}")
    if any(length < 1 for length in lengths):
        raise ValueError("a row has no tokens")
    plan: list[list[int]] = []
    width = used = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        used += lengths[index] if packed else width
        if plan and used <= tokens_per_microbatch:
            plan[-1].append(index)
        else:
            plan.append([index])
            used = width = lengths[index]
    return plan


def position_ids(attention_mask: Tensor) -> Tensor:
    """[B, T] positions counted over real tokens; padding gets its row's last one (0 before any)."""
    return (attention_mask.cumsum(dim=1) - 1).clamp(min=0)


def pad_rows(
    rows: Sequence[TokenRow], pad_id: int, device: torch.device | str = "cpu"
) -> PaddedRows:
    """Rows padded on the right with `pad_id` to the longest. Raises ValueError for no rows."""
    if not rows:
        raise ValueError("no rows to pad")
    width = max(len(row) for row in rows)
    ids = pad_array([row.input_ids for row in rows], width, pad_id, torch.int64, device)
    ones = [np.ones(len(row), dtype=np.int64) for row in rows]
    mask = pad_array(ones, width, 0, torch.int64, device)
    return PaddedRows(
        input_ids=ids,
        attention_mask=mask,
        position_ids=position_ids(mask),
        loss_mask=pad_array([row.loss_mask for row in rows], width, False, torch.bool, device),
    )


def pad_array(
    values: Sequence[NDArray[np.generic]],
    width: int,
    fill: float,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    starts: Sequence[int] | None = None,
) -> Tensor:
    """[B, width] tensor with values[b] in row b from column starts[b] (0 if None), else `fill`.

    With `starts` = prompt lengths, per-response-token numbers come to stand at their tokens.
    Raises ValueError where a row does not fit.
    """
    out = torch.full((len(values), width), fill, dtype=dtype)
    for index, row in enumerate(values):
        start = starts[index] if starts is not None else 0
        if start + len(row) > width:
            raise ValueError(f"row {index} ends at {start + len(row)}, over the width {width}")
        out[index, start : start + len(row)] = torch.as_tensor(np.array(row)).to(dtype)
    return out.to(device)
