"""Reductions over padded [B, T] tensors in which only the masked-in positions count.

A mask is bool or float and holds 1 for real response tokens. It may have holes (the turns of
somebody else inside one response). Whatever stands at a masked position, NaN included, is ignored.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Aggregation = Literal[
    "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"
]

Moments = tuple[Tensor, Tensor]
"""(mean, Bessel-corrected variance), two 0-d tensors."""

_WHITEN_EPS = 1e-8


def require_same_shape(like: Tensor, **tensors: Tensor) -> None:
    """Raise ValueError for the first tensor whose shape differs from that of `like`.

    Broadcasting [B] against [B, T] succeeds whenever B equals T, and is then wrong in silence.
    """
    for name, tensor in tensors.items():
        if tensor.shape != like.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} where {tuple(like.shape)} is needed"
            )


def zero_masked(x: Tensor, mask: Tensor) -> Tensor:
    """`x` with zeros at masked positions, which get no gradient. (Multiplying would keep NaN.)"""
    return x.where(mask.bool(), 0.0)


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of `x` over set positions, over everything or along `dim`."""
    kept = zero_masked(x, mask)
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of `x` over set positions; 0 where there is none."""
    count = mask.bool().sum() if dim is None else mask.bool().sum(dim)
    return masked_sum(x, mask, dim) / count.clamp(min=1)


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """Bessel-corrected variance of `x` over all set positions; 0 for fewer than two."""
    deviation = x - masked_mean(x, mask)
    return masked_sum(deviation.square(), mask) / (mask.bool().sum() - 1).clamp(min=1)


def moment_sums(x: Tensor, mask: Tensor) -> Tensor:
    """[3] float64 tensor (count, sum, sum of squares) over set positions.

    Add these over microbatches or ranks, then call `moments_from_sums` for global statistics.
    float64 because the variance is later a difference of two large numbers.
    """
    kept = zero_masked(x.detach(), mask).to(torch.float64)
    return torch.stack([mask.bool().sum().to(torch.float64), kept.sum(), kept.square().sum()])


def moments_from_sums(sums: Tensor) -> Moments:
    """(mean, Bessel-corrected variance) in float64 from the added-up `moment_sums`."""
    count, total, squares = sums.unbind()
    mean = total / count.clamp(min=1)
    var = (squares - total * mean).clamp(min=0) / (count - 1).clamp(min=1)
    return mean, var


def whiten(
    x: Tensor, mask: Tensor, shift_mean: bool = True, moments: Moments | None = None
) -> Tensor:
    """(x - mean) * rsqrt(var + 1e-8) at set positions, zero elsewhere; dtype and shape of `x`.

    shift_mean: False adds the mean back, so that only the scale changes (used for rewards).
    moments: global (mean, variance) when `x` is one part of a larger batch; taken from `x` if None.
    One single value has no variance: it becomes 0 (or stays as it is without `shift_mean`).
    Source: Ziegler et al. 2019, with the variance Bessel-corrected.
    """
    mean, var = (masked_mean(x, mask), masked_var(x, mask)) if moments is None else moments
    mean, var = mean.to(x.dtype), var.to(x.dtype)
    whitened = (x - mean) * torch.rsqrt(var + _WHITEN_EPS)
    return zero_masked(whitened if shift_mean else whitened + mean, mask)


def last_valid_index(mask: Tensor) -> Tensor:
    """[B] int64 index of the last set position of each row of a [B, T] mask; 0 for an empty row."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    return (positions * mask.bool()).amax(dim=1)


def aggregate(
    losses: Tensor,
    mask: Tensor,
    mode: Aggregation,
    denominator: float,
    max_length: int | None = None,
) -> Tensor:
    """Reduce per-token losses [B, T] to a 0-d loss.

    denominator: number of set tokens ("token-mean") or of sequences (the "seq-" modes) in the
        GLOBAL batch. Losses of all microbatches and ranks then ADD UP to the loss of the batch,
        and so do gradients, however the batch was split. A data-parallel wrapper that averages
        gradients has to be undone by the caller (multiply by the number of ranks).
    max_length: the constant that "seq-mean-token-sum-norm" divides by (Dr. GRPO).
    Raises ValueError for an unknown mode, a denominator that is not positive, a missing max_length.
    Sources: token-mean DAPO; seq-mean-token-mean GRPO; seq-mean-token-sum-norm Dr. GRPO.
    """
    require_same_shape(mask, losses=losses)
    if denominator <= 0:
        raise ValueError(f"the global denominator must be positive, got {denominator}")
    if mode in ("token-mean", "seq-mean-token-sum"):
        return masked_sum(losses, mask) / denominator
    if mode == "seq-mean-token-mean":
        return masked_mean(losses, mask, dim=1).sum() / denominator
    if mode == "seq-mean-token-sum-norm":
        if max_length is None or max_length <= 0:
            raise ValueError(f"{mode} needs a positive max_length, got {max_length}")
        return masked_sum(losses, mask) / (denominator * max_length)
    raise ValueError(f"unknown aggregation {mode!r}; known: {', '.join(get_args(Aggregation))}")
