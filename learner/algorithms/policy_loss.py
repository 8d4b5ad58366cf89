"""Policy-gradient losses, one loss per response token.

Shared shapes: logp, prox_logp, advantages, mask are [B, T]. `logp` carries the gradient;
`prox_logp` holds the log-probabilities under the proximal policy, the learner's weights when the
update began, and is a constant. Both at the sampling temperature. Losses are zero where masked;
reduce them with `masked.aggregate`, after multiplying by the weights of `off_policy` if the data
came from another policy than the proximal one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from learner.algorithms.kl import LOG_RATIO_LIMIT, clamped_log_ratio
from learner.algorithms.loss_terms import LossTerms, MetricParts, metric_parts
from learner.algorithms.masked import masked_mean, require_same_shape, zero_masked


def ppo_clip(
    logp: Tensor,
    prox_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> LossTerms:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), r = pi / pi_prox (Schulman et al. 2017).

    clip_high above clip_low is DAPO's "clip higher" (.2/.28).
    dual_clip: c > 1 bounds the loss of a token with negative advantage by -c A, for otherwise a
        huge ratio gives a huge loss (Ye et al. 2020; c = 3). Raises ValueError for c <= 1.
    """
    if dual_clip is not None and dual_clip <= 1.0:
        raise ValueError(f"dual_clip must be above 1, got {dual_clip}")
    logp, prox_logp, advantages = _clean(logp, prox_logp, advantages, mask)
    ratio = clamped_log_ratio(logp, prox_logp).exp()
    losses = _clipped_surrogate(ratio, advantages, clip_low, clip_high)
    metrics = _ratio_metrics(logp, prox_logp, ratio, mask)
    metrics |= _clip_metrics(ratio, advantages, mask, clip_low, clip_high)
    if dual_clip is not None:
        bound = -dual_clip * advantages
        bounded = (advantages < 0) & (losses > bound)
        losses = torch.where(bounded, bound, losses)
        metrics["clipfrac_dual"] = metric_parts(bounded, mask)
    return LossTerms(losses=zero_masked(losses, mask), metrics=metrics)


def reinforce(logp: Tensor, prox_logp: Tensor, advantages: Tensor, mask: Tensor) -> LossTerms:
    """-A log pi (Williams 1992). `prox_logp` only feeds the metrics: nothing bounds the update."""
    logp, prox_logp, advantages = _clean(logp, prox_logp, advantages, mask)
    ratio = clamped_log_ratio(logp, prox_logp).exp()
    return LossTerms(
        losses=zero_masked(-advantages * logp, mask),
        metrics=_ratio_metrics(logp, prox_logp, ratio, mask),
    )


def cispo(
    logp: Tensor,
    prox_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 1.0,
    clip_high: float = 0.28,
) -> LossTerms:
    """-sg(clip(r, 1 - clip_low, 1 + clip_high)) A log pi: the clip limits the weight of a token
    but, unlike PPO's, never takes its gradient away (MiniMax-M1 2025). clip_low 1 means no lower
    bound.
    """
    logp, prox_logp, advantages = _clean(logp, prox_logp, advantages, mask)
    ratio = clamped_log_ratio(logp, prox_logp).exp()
    weight = ratio.detach().clamp(1.0 - clip_low, 1.0 + clip_high)
    metrics = _ratio_metrics(logp, prox_logp, ratio, mask)
    metrics["clipfrac_low"] = metric_parts(ratio < 1.0 - clip_low, mask)
    metrics["clipfrac_high"] = metric_parts(ratio > 1.0 + clip_high, mask)
    metrics["clipfrac"] = metric_parts(weight != ratio, mask)
    return LossTerms(losses=zero_masked(-weight * advantages * logp, mask), metrics=metrics)


def gspo(
    logp: Tensor,
    prox_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> LossTerms:
    """PPO-clip with one ratio per sequence, s = exp(mean over tokens of log r) (Zheng et al. 2025).

    The ratio is length-normalised, hence the narrow clip range. This is the token form: s has its
    value everywhere, and each token gets its own part of the gradient. With one advantage for all
    tokens of a row and "seq-mean-token-mean", value and gradient are those of the sequence form.
    """
    logp, prox_logp, advantages = _clean(logp, prox_logp, advantages, mask)
    mean_log_ratio = masked_mean(logp.detach() - prox_logp, mask, dim=1)[:, None]
    own = logp - logp.detach()
    ratio = (mean_log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT) + own).exp()
    losses = _clipped_surrogate(ratio, advantages, clip_low, clip_high)
    metrics = _ratio_metrics(logp, prox_logp, ratio, mask)
    metrics |= _clip_metrics(ratio, advantages, mask, clip_low, clip_high)
    return LossTerms(losses=zero_masked(losses, mask), metrics=metrics)


POLICY_LOSSES: dict[str, Callable[..., LossTerms]] = {
    "ppo": ppo_clip,
    "reinforce": reinforce,
    "cispo": cispo,
    "gspo": gspo,
}
"""By the word of `algorithm.loss`; each is called as (logp, prox_logp, advantages, mask, **options)
with options named as keys of [algorithm]. `cluster.contracts.registry` has the same words."""


def _clean(
    logp: Tensor, prox_logp: Tensor, advantages: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Check shapes, make constants constant, and clear padding so that no NaN reaches backward."""
    require_same_shape(mask, logp=logp, prox_logp=prox_logp, advantages=advantages)
    return (
        zero_masked(logp, mask),
        zero_masked(prox_logp.detach(), mask),
        zero_masked(advantages.detach(), mask),
    )


def _clipped_surrogate(
    ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def _ratio_metrics(logp: Tensor, prox_logp: Tensor, ratio: Tensor, mask: Tensor) -> MetricParts:
    return {
        "ratio": metric_parts(ratio, mask),
        "approxkl": metric_parts(prox_logp - logp, mask),
    }


def _clip_metrics(
    ratio: Tensor, advantages: Tensor, mask: Tensor, clip_low: float, clip_high: float
) -> MetricParts:
    """Shares of tokens on which the clip decides, that is, which have lost their gradient."""
    low = (ratio < 1.0 - clip_low) & (advantages < 0)
    high = (ratio > 1.0 + clip_high) & (advantages > 0)
    return {
        "clipfrac": metric_parts(low | high, mask),
        "clipfrac_low": metric_parts(low, mask),
        "clipfrac_high": metric_parts(high, mask),
    }
