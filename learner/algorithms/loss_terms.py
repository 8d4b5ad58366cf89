"""The value every loss in this package returns: unreduced losses and mergeable metrics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MetricParts = dict[str, tuple[Tensor, Tensor]]
"""Metric name -> (sum, count), two detached 0-d float64 tensors.

Parts of several microbatches or ranks merge by adding sums and adding counts; the metric is then
sum / count. A count may be zero (a rank with only padding), which the reader has to expect.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerms:
    """Losses before reduction, and the metrics measured beside them.

    losses: one loss per token [B, T] (zero at masked positions) or per pair [N]; differentiable.
    metrics: see `MetricParts`.
    """

    losses: Tensor
    metrics: MetricParts


def metric_parts(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of `x` where `mask` is set, number of set positions), detached, in float64."""
    kept = x.detach().to(torch.float64).where(mask.bool(), 0.0)
    return kept.sum(), mask.bool().sum().to(torch.float64)
