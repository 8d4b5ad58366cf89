"""Importance weights for responses sampled by another policy than the proximal one.

Three policies are in play: mu sampled the response (older weights, and another numerical
implementation: the inference engine), pi_prox is the learner when the update began, pi is the
learner now. With rho = pi_prox / mu, both families multiply the detached rho into the loss:

    decoupled PPO (Hilton et al. 2021; AReaL)   -rho * min(r A, clip(r) A),  r = pi / pi_prox
    truncated IS, TIS                           the same product, rho cut at a cap

They relate so: decoupled PPO keeps the trust region (the clip around pi_prox) apart from the
correction (rho), which makes a stale mu correctable at all; TIS arose to correct the mismatch of
engine and trainer at EQUAL weights, and is the statement that rho must be bounded. Bounded token
by token, the arithmetic is one and the same, so "decoupled" and "token-tis" compute the same
weights and differ in what the user means by them. They differ from the MASKED forms: truncation
keeps a far-off token with the weight `cap`, masking (AReaL, IcePop) drops it. A dropped token
still counts in the denominator: keep the ORIGINAL mask in `masked.aggregate`, for dividing by the
survivors alone would blow up their gradient.

Token weights ignore that earlier tokens were off-policy too (bias grows as T^2); sequence weights
use the product of rho over the response: unbiased before the cap, but of high variance.

Do not multiply these in when prox_logp IS the behaviour log-probability (the clip then corrects
already), and do not recompute prox_logp and drop mu once engine and trainer differ.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from learner.algorithms.kl import LOG_RATIO_LIMIT
from learner.algorithms.loss_terms import MetricParts, metric_parts
from learner.algorithms.masked import masked_sum, require_same_shape, zero_masked

Correction = Literal[
    "none", "decoupled", "token-tis", "sequence-tis", "token-mask", "sequence-mask"
]


@torch.no_grad()
def importance_weights(
    prox_logp: Tensor,
    behaviour_logp: Tensor,
    mask: Tensor,
    mode: Correction,
    cap: float,
    floor: float = 0.0,
    veto: float = 0.0,
) -> tuple[Tensor, MetricParts]:
    """Weights [B, T] to multiply per-token losses with (no gradient, zero where masked), metrics.

    prox_logp, behaviour_logp, mask: [B, T]; log ratios are clamped to +-20, also summed ones.
    mode: "none" is weight 1; "decoupled", "token-tis", "sequence-tis" clip rho to [floor, cap];
        "token-mask", "sequence-mask" set rho outside [floor, cap] to 0.
    veto: a response with any token rho below it is dropped whole, in every mode; 0 is off, 1e-4
        is usual.
    Metrics, over tokens or, in the "sequence-" modes, over responses: is_ratio (rho untouched),
        is_clipped_frac (changed by cap or floor), is_weight and is_weight_sq (as applied; see
        `effective_sample_size`); over tokens logp_diff (absolute) and mismatch_kl (k1 estimate of
        KL(mu || pi_prox)); over responses veto (share dropped).
    Raises ValueError for an unknown mode or bounds not in order 0 <= floor < cap.
    """
    if mode not in get_args(Correction):
        raise ValueError(f"unknown correction {mode!r}; known: {', '.join(get_args(Correction))}")
    if not 0.0 <= floor < cap:
        raise ValueError(f"need 0 <= floor < cap, got floor {floor} and cap {cap}")
    require_same_shape(mask, prox_logp=prox_logp, behaviour_logp=behaviour_logp)
    log_ratio = zero_masked(prox_logp - behaviour_logp, mask)
    token_ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    has_tokens = mask.bool().any(dim=1, keepdim=True)
    unit_mask, ratio = mask, token_ratio
    if mode.startswith("sequence-"):
        total = masked_sum(log_ratio, mask, dim=1)[:, None]
        unit_mask, ratio = has_tokens, total.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    bounded = _bounded(ratio, mode, cap, floor)
    vetoed = masked_sum((token_ratio < veto).to(ratio.dtype), mask, dim=1)[:, None] > 0
    weights = bounded.masked_fill(vetoed, 0.0)
    metrics = {
        "is_ratio": metric_parts(ratio, unit_mask),
        "is_clipped_frac": metric_parts(
            torch.zeros_like(ratio) if mode == "none" else bounded != ratio, unit_mask
        ),
        "is_weight": metric_parts(weights, unit_mask),
        "is_weight_sq": metric_parts(weights.double().square(), unit_mask),
        "logp_diff": metric_parts(log_ratio.abs(), mask),
        "mismatch_kl": metric_parts(-log_ratio, mask),
        "veto": metric_parts(vetoed, has_tokens),
    }
    return zero_masked(weights.expand(mask.shape), mask), metrics


def effective_sample_size(weight_mean: float, weight_sq_mean: float) -> float:
    """Effective over actual sample size, (sum w)^2 / (n sum w^2), in [0, 1]; 0 if all weights are.

    Takes the means of the metrics is_weight and is_weight_sq, merged over all parts of the batch.
    """
    return weight_mean**2 / weight_sq_mean if weight_sq_mean > 0 else 0.0


def _bounded(ratio: Tensor, mode: Correction, cap: float, floor: float) -> Tensor:
    if mode == "none":
        return torch.ones_like(ratio)
    if mode.endswith("-mask"):
        return torch.where((ratio >= floor) & (ratio <= cap), ratio, 0.0)
    return ratio.clamp(floor, cap)
