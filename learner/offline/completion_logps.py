"""How probable a model makes whole completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from learner.compute.microbatches import TokenRow, pad_rows, plan_microbatches
from learner.compute.optimizer import compute_in
from learner.models.heads import token_logprobs


def completion_logps(
    model: Any, rows: Sequence[TokenRow], dtype: str, device: torch.device
) -> Tensor:
    """[N] log-probabilities, summed over each row's trained tokens: one padded forward.

    dtype: what is computed in (ModelConfig.dtype).
    """
    with compute_in(dtype, device):
        logp, _, _ = token_logprobs(model, pad_rows(rows, 0, device))
    return logp.sum(dim=1)


@torch.no_grad()
def all_completion_logps(
    model: Any,
    rows: Sequence[TokenRow],
    dtype: str,
    device: torch.device,
    tokens_per_microbatch: int,
) -> list[float]:
    """`completion_logps` of any number of rows, in their order, without gradients."""
    found: dict[int, float] = {}
    for part in plan_microbatches([len(row) for row in rows], tokens_per_microbatch):
        logps = completion_logps(model, [rows[i] for i in part], dtype, device)
        found.update(zip(part, logps.tolist(), strict=True))
    return [found[i] for i in range(len(rows))]
