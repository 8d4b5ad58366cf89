"""Losses that train a policy directly on preferences, without a reward model: one loss per pair
(KTO: per completion). `docs/algorithms.md` compares them.

`chosen` and `rejected` [N] say how probable the policy makes each completion. What that number is
differs by loss, and `learner.offline.dpo` makes it:

    log-ratio   log pi(y|x) - log ref(y|x), summed over the completion's tokens   DPO, IPO, KTO
    mean        log pi(y|x) / |y|                                                 ORPO, SimPO

DPO and IPO take either one divided by |y| or without the reference as well.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from learner.algorithms.loss_terms import MetricParts, metric_parts
from learner.algorithms.masked import require_same_shape


def dpo(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - s) log sigmoid(beta h) - s log sigmoid(-beta h), with h = chosen - rejected: [N].

    Source: Rafailov et al. 2023, equation 7; with s, the share of pairs that are taken to be
    labelled the wrong way round: Mitchell 2023, "A note on DPO with noisy preferences", equation 3.
    Divided by the number of tokens, chosen and rejected give length-normalised DPO (Lambert et al.
    2024, Tülu 3). Raises ValueError for beta <= 0 or s outside [0, 0.5).
    """
    return simpo(chosen, rejected, beta, 0.0, label_smoothing)


def ipo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """(h - 1 / (2 beta))^2, with h = chosen - rejected: [N]. Source: Azar et al. 2023, equation 17.

    The paper's log-ratios are sums over tokens. TRL's are means per token: divide by the number of
    tokens for its loss. Raises ValueError for beta <= 0.
    """
    require_same_shape(chosen, rejected=rejected)
    _require_positive(beta)
    return (chosen - rejected - 1.0 / (2.0 * beta)).square()


def simpo(
    chosen: Tensor,
    rejected: Tensor,
    beta: float,
    target_margin: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """-(1 - s) log sigmoid(d) - s log sigmoid(-d), d = beta (chosen - rejected) - target_margin.

    chosen, rejected: mean log-probability per token. Source: Meng et al. 2024, equation 6
    (target_margin: gamma); s as in `dpo`. Raises ValueError for beta <= 0 or s outside [0, 0.5).
    """
    require_same_shape(chosen, rejected=rejected)
    _require_positive(beta)
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    gap = beta * (chosen - rejected) - target_margin
    return -(1.0 - label_smoothing) * logsigmoid(gap) - label_smoothing * logsigmoid(-gap)


def orpo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """-chosen - beta log sigmoid(log odds(chosen) - log odds(rejected)), odds = P / (1 - P): [N].

    chosen, rejected: mean log-probability per token, log P. Source: Hong et al. 2024, equations 3,
    6 and 7 (beta: lambda). The likelihood is that of the completion alone, as in equation 2; TRL's
    covers the prompt, too. Raises ValueError for beta <= 0.
    """
    require_same_shape(chosen, rejected=rejected)
    _require_positive(beta)
    return -chosen - beta * logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def kto(
    log_ratios: Tensor,
    desirable: Tensor,
    kl: float,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """w_d (1 - sigmoid(beta (r - kl))) of a desirable completion, w_u (1 - sigmoid(beta (kl - r)))
    of an undesirable one, r being its log-ratio: [N].

    log_ratios: [N]. desirable: [N] bool. kl: the reference point, see `kto_reference_point`.
    Source: Ethayarajh et al. 2024, equations 7 and 8 (w: lambda). Raises ValueError for beta <= 0.
    """
    require_same_shape(log_ratios, desirable=desirable)
    _require_positive(beta)
    gain = beta * torch.where(desirable, log_ratios - kl, kl - log_ratios)
    weight = torch.where(desirable, desirable_weight, undesirable_weight).to(gain.dtype)
    return weight * torch.sigmoid(-gain)


def kto_reference_point(mismatched: Tensor) -> float:
    """KTO's estimate of KL(pi || ref) in nats per completion: max(0, mean of log-ratios).

    mismatched: [M] log-ratios of each prompt with a completion of ANOTHER prompt; they carry no
    gradient. Source: Ethayarajh et al. 2024, section 4.1. It is biased, but cheap: nothing is
    sampled. Raises ValueError for no log-ratios.
    """
    if mismatched.numel() == 0:
        raise ValueError("no mismatched completions to estimate the KL from")
    return max(0.0, float(mismatched.detach().double().mean()))


def reward_metrics(
    chosen: Tensor, rejected: Tensor, has_chosen: Tensor, has_rejected: Tensor
) -> MetricParts:
    """rewards/{chosen,rejected,accuracies,margins} of [N] implicit rewards; a tie is wrong.

    has_chosen, has_rejected: [N] bool, which rows hold that side. Accuracy and margin are over the
    rows that hold both.
    """
    both = has_chosen & has_rejected
    return {
        "rewards/chosen": metric_parts(chosen, has_chosen),
        "rewards/rejected": metric_parts(rejected, has_rejected),
        "rewards/accuracies": metric_parts(chosen > rejected, both),
        "rewards/margins": metric_parts(chosen - rejected, both),
    }


def _log_odds(logp: Tensor) -> Tensor:
    """log(P / (1 - P)) of log P, exact for P near 0 and near 1; P = 1 counts as the next number."""
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    # Mächler 2012: each form is exact where the other cancels. Masked, so that no NaN gets back.
    near_one = logp > -math.log(2.0)
    one = torch.log(-torch.expm1(logp.where(near_one, -0.5)))
    zero = torch.log1p(-torch.exp(logp.where(~near_one, -1.0)))
    return logp - torch.where(near_one, one, zero)


def _require_positive(beta: float) -> None:
    if beta <= 0:
        raise ValueError(f"beta must be positive, got {beta}")
