"""How probable a model makes whole completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from learner.compute.mesh import ALONE, Mesh
from learner.compute.microbatches import TokenRow, pad_rows
from learner.compute.optimizer import compute_in
from learner.compute.sharding import call
from learner.models.heads import token_logprobs
from learner.offline.shares import shares


def completion_logps(
    model: Any, rows: Sequence[TokenRow], dtype: str, device: torch.device
) -> Tensor:
    """[N] log-probabilities, summed over each row's trained tokens: one padded forward.

    model: may be `Gathered`. dtype: what is computed in (ModelConfig.dtype).
    """
    with compute_in(dtype, device):
        logp, _, _ = call(model, token_logprobs, pad_rows(rows, 0, device))
    return logp.sum(dim=1)


@torch.no_grad()
def all_completion_logps(
    model: Any,
    rows: Sequence[TokenRow],
    dtype: str,
    device: torch.device,
    tokens_per_microbatch: int,
    mesh: Mesh = ALONE,
) -> list[float]:
    """`completion_logps` of any number of rows, in their order, without gradients.

    Each of several processes computes its share, and all get all of them."""
    found = torch.zeros(len(rows), dtype=torch.float64, device=device)
    for part, counts in shares([len(row) for row in rows], tokens_per_microbatch, mesh.data):
        logps = completion_logps(model, [rows[i] for i in part], dtype, device)
        if counts:
            found[part] = logps.double()
    mesh.data.sum_([found])
    numbers: list[float] = found.tolist()
    return numbers
