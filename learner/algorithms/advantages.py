"""Advantages: from scores to one number per response token.

`compute_advantages` is the one door for a learner; the estimators behind it are plain functions.
Nothing here carries a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from learner.algorithms.masked import (
    last_valid_index,
    masked_sum,
    moment_sums,
    moments_from_sums,
    require_same_shape,
    whiten,
    zero_masked,
)

_STD_EPS = 1e-6


@torch.no_grad()
def terminal_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Per-token rewards [B, T]: -kl_coef * kl on every token, plus the score on the last one.

    scores: [B]. kl: [B, T] per-token estimate, k1 if the gradient is to be that of the KL.
    mask: [B, T]; the last token is the last SET position, holes before it or not.
    Raises ValueError if a row without any token has a score: there is no place to put it.
    """
    require_same_shape(mask, kl=kl)
    require_same_shape(mask[:, 0], scores=scores)
    empty = ~mask.bool().any(dim=1)
    if bool((empty & (scores != 0)).any()):
        rows = torch.nonzero(empty & (scores != 0)).flatten().tolist()
        raise ValueError(f"rows {rows} have a score but no response token")
    rewards = zero_masked(-kl_coef * kl, mask)
    at_end = torch.zeros_like(rewards)
    at_end.scatter_(1, last_valid_index(mask)[:, None], scores[:, None].to(rewards.dtype))
    return rewards + at_end


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016): (advantages, returns), both [B, T].

        delta_t = r_t + gamma * V_{t+1} - V_t
        A_t = delta_t + gamma * lam * A_{t+1};  R_t = A_t + V_t

    t runs over SET positions only: a masked one hands the next value and the next advantage on
    to the token before it, undiscounted, and its own reward and value are ignored.
    bootstrap: [B] value of the state after the last token: 0 (or None) where the response ended,
        the critic's value where it was cut off. Returns are unwhitened, fit for the value loss.
    """
    require_same_shape(mask, rewards=rewards, values=values)
    keep = mask.bool()
    advantages = torch.zeros_like(values)
    next_advantage = torch.zeros_like(values[:, 0])
    next_value = torch.zeros_like(next_advantage)
    if bootstrap is not None:
        require_same_shape(mask[:, 0], bootstrap=bootstrap)
        next_value = bootstrap.to(values.dtype)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        here = keep[:, t]
        next_advantage = torch.where(here, delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(here, values[:, t], next_value)
        advantages[:, t] = next_advantage
    return zero_masked(advantages, mask), zero_masked(advantages + values, mask)


def discounted_returns(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Reward to go, sum over later set positions of gamma^k * r, [B, T]."""
    # With no values and lambda 1, GAE telescopes to exactly this.
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)[0]


@torch.no_grad()
def grpo(scores: Tensor, group_ids: Tensor, scale_by_std: bool = True) -> Tensor:
    """Group-relative advantages [B]: (R - mean_G) / (std_G + 1e-6), std unbiased.

    scores: [B]; group_ids: [B] int64, equal for samples of one prompt, in any order.
    A group of one has nothing to compare with: it takes mean 0 and std 1, so A = R / (1 + 1e-6).
    scale_by_std: False is Dr. GRPO (Liu et al. 2025), which leaves the standard deviation out.
    Source: Shao et al. 2024 (DeepSeekMath).
    """
    centred, group, counts = _centre_by_group(scores, group_ids)
    if scale_by_std:
        squares = torch.zeros_like(counts).index_add_(0, group, centred.square())
        std = (squares / (counts - 1).clamp(min=1)).sqrt()
        centred = centred / (torch.where(counts > 1, std, 1.0)[group] + _STD_EPS)
    return centred.to(scores.dtype)


@torch.no_grad()
def rloo(scores: Tensor, group_ids: Tensor) -> Tensor:
    """Leave-one-out advantages [B]: R_i minus the mean of the OTHERS, = G/(G-1) (R_i - mean_G).

    Shapes as in `grpo`. A group of one has no others; its baseline is 0 and A = R.
    Source: Kool et al. 2019; Ahmadian et al. 2024.
    """
    centred, group, counts = _centre_by_group(scores, group_ids)
    return (centred * (counts / (counts - 1).clamp(min=1))[group]).to(scores.dtype)


def _centre_by_group(scores: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(R - mean_G [B], index of each sample's group [B], group sizes [groups]).

    In float64: equal scores must give advantages of 0, and float32 rounding divided by a standard
    deviation of about 0 would give anything but.
    """
    require_same_shape(scores, group_ids=group_ids)
    _, group, sizes = torch.unique(group_ids, return_inverse=True, return_counts=True)
    counts = sizes.to(torch.float64)
    exact = scores.to(torch.float64)
    means = torch.zeros_like(counts).index_add_(0, group, exact) / counts
    return exact - torch.where(counts > 1, means, 0.0)[group], group, counts


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvantageInputs:
    """What any estimator may need. B rows must contain whole groups for the group-based ones.

    rewards, mask: [B, T], see `terminal_rewards`; group-based estimators sum rewards over the row,
        so a KL penalty inside them counts and one in the loss (kl_coef 0 here) does not.
    scores: [B], what `rewards` holds on the last token apart from penalties. penalties: [B, T], the
        KL penalties that `rewards` holds, or None where it holds none.
    group_ids: [B] int64. values: [B, T], for "gae" only. bootstrap: [B] or None, for "gae" only.
    """

    rewards: Tensor
    mask: Tensor
    group_ids: Tensor
    scores: Tensor
    penalties: Tensor | None = None
    values: Tensor | None = None
    bootstrap: Tensor | None = None
    gamma: float = 1.0
    lam: float = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantages:
    """advantages [B, T], zero where masked; returns [B, T] for the value loss, or None."""

    advantages: Tensor
    returns: Tensor | None = None


def _gae(inputs: AdvantageInputs) -> Advantages:
    if inputs.values is None:
        raise ValueError("the advantage estimator 'gae' needs values from a critic")
    advantages, returns = gae(
        inputs.rewards, inputs.values, inputs.mask, inputs.gamma, inputs.lam, inputs.bootstrap
    )
    return Advantages(advantages=advantages, returns=returns)


def _grpo(inputs: AdvantageInputs, *, scale_by_std: bool = True) -> Advantages:
    """GRPO's standard deviation is that of the SCORES: a KL penalty in the reward is centred within
    the group, but not divided. Divided together, a group whose scores are all equal would be
    trained on the noise of its KL estimates, blown up to the size of a full score."""
    if not scale_by_std or inputs.penalties is None:
        totals = masked_sum(inputs.rewards, inputs.mask, dim=1)
        return _to_tokens(grpo(totals, inputs.group_ids, scale_by_std), inputs)
    penalty = masked_sum(inputs.penalties, inputs.mask, dim=1)
    scored = grpo(inputs.scores.to(penalty.dtype), inputs.group_ids)
    return _to_tokens(scored + grpo(penalty, inputs.group_ids, scale_by_std=False), inputs)


def _rloo(inputs: AdvantageInputs) -> Advantages:
    totals = masked_sum(inputs.rewards, inputs.mask, dim=1)
    return _to_tokens(rloo(totals, inputs.group_ids), inputs)


def _returns_to_go(inputs: AdvantageInputs) -> Advantages:
    return Advantages(advantages=discounted_returns(inputs.rewards, inputs.mask, inputs.gamma))


def _reinforce_baseline(inputs: AdvantageInputs) -> Advantages:
    totals = masked_sum(inputs.rewards, inputs.mask, dim=1)
    return _to_tokens(grpo(totals, inputs.group_ids, scale_by_std=False), inputs)


def _to_tokens(per_response: Tensor, inputs: AdvantageInputs) -> Advantages:
    """Every token of a response gets the advantage [B] of the whole response."""
    spread = per_response[:, None].expand_as(inputs.rewards)
    return Advantages(advantages=zero_masked(spread, inputs.mask))


ESTIMATORS: dict[str, Callable[..., Advantages]] = {
    "gae": _gae,
    "grpo": _grpo,
    "rloo": _rloo,
    "reinforce++": _returns_to_go,
    "reinforce-baseline": _reinforce_baseline,
}
"""By the word of `algorithm.advantage`; each is called as (inputs, **options) and gives RAW
advantages. `cluster.contracts.registry` has the same words, and says which whiten by definition.
REINFORCE++ (Hu et al. 2025): returns to go, or rewards minus the group mean; both whitened."""


def _one_rank(sums: Tensor) -> Tensor:
    return sums


@torch.no_grad()
def compute_advantages(
    estimator: Callable[[AdvantageInputs], Advantages],
    inputs: AdvantageInputs,
    whitened: bool,
    add_over_ranks: Callable[[Tensor], Tensor] = _one_rank,
) -> Advantages:
    """Advantages by the estimator, whitened over the global batch if wanted. Returns never are.

    add_over_ranks: adds a [3] float64 tensor over all ranks that hold a part of the batch, so that
        mean and variance are those of the whole. Every rank must call it, also one without tokens.
    Raises ValueError for missing values or shapes that do not fit.
    """
    require_same_shape(inputs.mask, rewards=inputs.rewards)
    require_same_shape(inputs.mask[:, 0], group_ids=inputs.group_ids, scores=inputs.scores)
    raw = estimator(inputs)
    require_same_shape(inputs.mask, advantages=raw.advantages)
    if not whitened:
        return raw
    moments = moments_from_sums(add_over_ranks(moment_sums(raw.advantages, inputs.mask)))
    return Advantages(
        advantages=whiten(raw.advantages, inputs.mask, moments=moments), returns=raw.returns
    )
