"""Loss of the critic, and how much of the returns it explains."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from learner.algorithms.loss_terms import LossTerms, metric_parts
from learner.algorithms.masked import require_same_shape, zero_masked


def clipped_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: float | None = 0.2,
) -> LossTerms:
    """0.5 * max((V - R)^2, (V_old + clamp(V - V_old, +-clip) - R)^2) per token.

    All [B, T]; `values` carries the gradient, `old_values` are those of the start of the update,
    `returns` are unwhitened. clip: None for the plain squared error. Source: OpenAI's PPO code.
    Metrics: clipfrac (tokens on which the clipped branch decides), value, return, return_sq,
    error, error_sq; the last four feed `explained_variance`.
    """
    require_same_shape(mask, values=values, old_values=old_values, returns=returns)
    values = zero_masked(values, mask)
    old_values = zero_masked(old_values.detach(), mask)
    returns = zero_masked(returns.detach(), mask)
    squares = (values - returns).square()
    decided = torch.zeros_like(mask, dtype=torch.bool)
    if clip is not None:
        clipped = old_values + (values - old_values).clamp(-clip, clip)
        clipped_squares = (clipped - returns).square()
        decided = clipped_squares > squares
        squares = torch.maximum(squares, clipped_squares)
    exact_returns = returns.double()
    exact_errors = exact_returns - values.detach().double()
    return LossTerms(
        losses=zero_masked(0.5 * squares, mask),
        metrics={
            "clipfrac": metric_parts(decided, mask),
            "value": metric_parts(values, mask),
            "return": metric_parts(exact_returns, mask),
            "return_sq": metric_parts(exact_returns.square(), mask),
            "error": metric_parts(exact_errors, mask),
            "error_sq": metric_parts(exact_errors.square(), mask),
        },
    )


def explained_variance(
    return_mean: float, return_sq_mean: float, error_mean: float, error_sq_mean: float
) -> float:
    """1 - Var(R - V) / Var(R) from merged metric means; 1 is perfect, 0 is as good as a constant.

    NaN if the returns do not vary, for there is then nothing to explain.
    """
    variance = return_sq_mean - return_mean**2
    if variance <= 1e-12 * max(return_sq_mean, 1e-300):
        return math.nan
    return 1.0 - (error_sq_mean - error_mean**2) / variance
