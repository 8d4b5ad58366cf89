"""Losses of a reward model, one loss per comparison.

Further dimensions (members of an ensemble) come first. Nothing is reduced over them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from learner.algorithms.masked import require_same_shape


def bradley_terry(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None = None,
    centering: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """-(1 - s) log sigmoid(d) - s log sigmoid(-d) + centering (chosen + rejected)^2, with
    d = chosen - rejected - margin. Same shape as `chosen`.

    chosen, rejected: [...] rewards. margin: [...], how much better the chosen one was rated (Llama
    2), or Rao and Kupper's threshold where ties are data, see `rao_kupper_tie`. centering: pulls
    rewards towards mean 0, which the first term leaves open (Eisenstein et al. 2023; .01).
    label_smoothing: s, the share of pairs taken to be labelled the wrong way round. Source: Bradley
    & Terry 1952. Raises ValueError for s outside [0, 0.5).
    """
    require_same_shape(chosen, rejected=rejected)
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    gap = chosen - rejected
    if margin is not None:
        require_same_shape(chosen, margin=margin)
        gap = gap - margin
    losses = -(1.0 - label_smoothing) * logsigmoid(gap)
    if label_smoothing != 0.0:
        losses = losses - label_smoothing * logsigmoid(-gap)
    if centering != 0.0:
        losses = losses + centering * (chosen + rejected).square()
    return losses


def rao_kupper_tie(first: Tensor, second: Tensor, threshold: float) -> Tensor:
    """-log P(tie) of two rewards [...]. Raises ValueError for threshold <= 0.

    Rao & Kupper 1967 with threshold = log theta, for d = first - second:

        P(first wins) = sigmoid(d - threshold)        P(second wins) = sigmoid(-d - threshold)
        P(tie) = (theta^2 - 1) P(first wins) P(second wins)

    The three sum to 1. A win is then `bradley_terry` with the margin `threshold`, which is why this
    model and not Davidson's (1970) is taken.
    """
    require_same_shape(first, second=second)
    if threshold <= 0:
        raise ValueError(f"threshold must be positive, got {threshold}: no tie is possible at 0")
    gap = first - second
    wins = logsigmoid(gap - threshold) + logsigmoid(-gap - threshold)
    return -math.log(math.expm1(2.0 * threshold)) - wins


def plackett_luce(scores: Tensor, present: Tensor) -> Tensor:
    """-log P(ranking) = sum over places i of logsumexp(scores[i:]) - scores[i]: [...].

    scores: [..., M], best first. present: [..., M] bool, False at the end of shorter rankings. Of
    two completions it is `bradley_terry`. Source: Plackett 1975, Luce 1959.
    """
    require_same_shape(scores, present=present)
    hidden = scores.masked_fill(~present, -torch.inf)
    left = hidden.flip(-1).logcumsumexp(-1).flip(-1)
    # At a missing place both are -inf; `where` must not meet inf - inf in the backward pass.
    return (left.where(present, 0.0) - scores.where(present, 0.0)).sum(-1)
