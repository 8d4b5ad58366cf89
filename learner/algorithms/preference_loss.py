"""Losses on pairs of a preferred and a rejected response, one loss per pair.

Reduce with `terms.losses.sum() / pairs`, `pairs` being the number of pairs in the global batch.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from learner.algorithms.loss_terms import LossTerms, metric_parts
from learner.algorithms.masked import require_same_shape

DpoLoss = Literal["sigmoid", "ipo"]


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


def dpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
    loss_type: DpoLoss = "sigmoid",
) -> LossTerms:
    """Direct preference optimisation; with h = log-ratio of chosen minus log-ratio of rejected:

        sigmoid (Rafailov et al. 2023)   -(1 - s) log sigmoid(beta h) - s log sigmoid(-beta h)
        ipo (Azar et al. 2023)           (h - 1 / (2 beta))^2

    The four log-probabilities are [N], SUMMED over response tokens; the two reference ones are
    constants. label_smoothing: s, the share of pairs taken to be labelled the wrong way round.
    Metrics: rewards/{chosen,rejected,accuracies,margins}, with reward = beta * log(pi / ref), and
    logps/{chosen,rejected}.
    Raises ValueError for beta <= 0, s outside [0, 0.5), s with "ipo", an unknown loss type.
    """
    if beta <= 0:
        raise ValueError(f"beta must be positive, got {beta}")
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    require_same_shape(
        policy_chosen,
        policy_rejected=policy_rejected,
        ref_chosen=ref_chosen,
        ref_rejected=ref_rejected,
    )
    chosen = policy_chosen - ref_chosen.detach()
    rejected = policy_rejected - ref_rejected.detach()
    losses = _dpo_losses(chosen - rejected, beta, label_smoothing, loss_type)
    every = torch.ones_like(chosen, dtype=torch.bool)
    return LossTerms(
        losses=losses,
        metrics={
            "rewards/chosen": metric_parts(beta * chosen, every),
            "rewards/rejected": metric_parts(beta * rejected, every),
            "rewards/accuracies": metric_parts(chosen > rejected, every),
            "rewards/margins": metric_parts(beta * (chosen - rejected), every),
            "logps/chosen": metric_parts(policy_chosen, every),
            "logps/rejected": metric_parts(policy_rejected, every),
        },
    )


def _dpo_losses(gap: Tensor, beta: float, label_smoothing: float, loss_type: DpoLoss) -> Tensor:
    if loss_type == "sigmoid":
        kept = (1.0 - label_smoothing) * logsigmoid(beta * gap)
        return -kept - label_smoothing * logsigmoid(-beta * gap)
    if loss_type == "ipo":
        if label_smoothing != 0.0:
            raise ValueError("label_smoothing has no effect on the loss type 'ipo'; set it to 0")
        return (gap - 1.0 / (2.0 * beta)).square()
    raise ValueError(f"unknown DPO loss {loss_type!r}; known: {', '.join(get_args(DpoLoss))}")
