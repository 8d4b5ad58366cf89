"""Losses of a reward model, one loss per comparison.

Reduce with `terms.losses.sum() / comparisons`, counted over the global batch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from learner.algorithms.loss_terms import LossTerms, metric_parts
from learner.algorithms.masked import require_same_shape


def bradley_terry(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, centering: float = 0.0
) -> LossTerms:
    """-log sigmoid(chosen - rejected - margin) + centering * (chosen + rejected)^2.

    chosen, rejected: [N] rewards. margin: [N], how much better the chosen one was rated (Llama 2).
    centering: pulls rewards towards mean 0, which the first term leaves open (Eisenstein et al.
    2023; .01). Metrics: accuracy (ties count as wrong), margin, reward_chosen, reward_rejected.
    Source: Bradley & Terry 1952.
    """
    require_same_shape(chosen, rejected=rejected)
    gap = chosen - rejected
    wanted = gap
    if margin is not None:
        require_same_shape(chosen, margin=margin)
        wanted = gap - margin
    losses = -logsigmoid(wanted)
    if centering != 0.0:
        losses = losses + centering * (chosen + rejected).square()
    every = torch.ones_like(gap, dtype=torch.bool)
    return LossTerms(
        losses=losses,
        metrics={
            "accuracy": metric_parts(gap > 0, every),
            "margin": metric_parts(gap, every),
            "reward_chosen": metric_parts(chosen, every),
            "reward_rejected": metric_parts(rejected, every),
        },
    )
