"""Importance weights: by hand, their identities, and what they do to a policy gradient."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from learner.algorithms.importance import Correction, effective_sample_size, importance_weights
from learner.algorithms.loss_terms import MetricParts
from learner.algorithms.masked import aggregate
from learner.algorithms.policy_loss import ppo_clip

# Row 0 has ratios 2, (hole), 4 (product 8); row 1 has .5, .5, 1 (product .25).
MASK = torch.tensor([[1, 0, 1], [1, 1, 1]], dtype=torch.bool)
RATIO = torch.tensor([[2.0, 1e6, 4.0], [0.5, 0.5, 1.0]], dtype=torch.float64)
MU = torch.full((2, 3), math.log(0.1), dtype=torch.float64)
PROX = MU + RATIO.log()

MODES: tuple[Correction, ...] = get_args(Correction)


def _mean(metrics: MetricParts, name: str) -> float:
    total, count = metrics[name]
    return (total / count).item()


@pytest.mark.parametrize(
    ("mode", "floor", "expected", "clipped"),
    [
        ("none", 0.0, [[1, 0, 1], [1, 1, 1]], 0),
        ("decoupled", 0.0, [[2, 0, 3], [0.5, 0.5, 1]], 1 / 5),
        ("token-tis", 0.6, [[2, 0, 3], [0.6, 0.6, 1]], 3 / 5),
        ("sequence-tis", 0.0, [[3, 0, 3], [0.25, 0.25, 0.25]], 1 / 2),
        ("token-mask", 0.0, [[2, 0, 0], [0.5, 0.5, 1]], 1 / 5),
        ("token-mask", 0.6, [[2, 0, 0], [0, 0, 1]], 3 / 5),
        ("sequence-mask", 0.0, [[0, 0, 0], [0.25, 0.25, 0.25]], 1 / 2),
        ("sequence-mask", 0.3, [[0, 0, 0], [0, 0, 0]], 1),
    ],
)
def test_weights_by_hand(
    mode: Correction, floor: float, expected: list[list[float]], clipped: float
) -> None:
    weights, metrics = importance_weights(PROX, MU, MASK, mode, cap=3.0, floor=floor)
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64))
    assert _mean(metrics, "is_clipped_frac") == pytest.approx(clipped)
    ratio = (8 + 0.25) / 2 if mode.startswith("sequence") else (2 + 4 + 0.5 + 0.5 + 1) / 5
    assert _mean(metrics, "is_ratio") == pytest.approx(ratio)


def test_metrics_by_hand() -> None:
    _, metrics = importance_weights(PROX, MU, MASK, "token-mask", cap=3.0)
    # Applied weights 2, 0, .5, .5, 1: sum 4, squares 5.5.
    size = effective_sample_size(_mean(metrics, "is_weight"), _mean(metrics, "is_weight_sq"))
    assert size == pytest.approx(16 / (5 * 5.5))
    log2 = math.log(2)
    assert _mean(metrics, "logp_diff") == pytest.approx((1 + 2 + 1 + 1) * log2 / 5)
    assert _mean(metrics, "mismatch_kl") == pytest.approx((-1 - 2 + 1 + 1) * log2 / 5)
    assert _mean(metrics, "veto") == 0.0


@pytest.mark.parametrize("mode", MODES)
def test_weights_are_one_when_both_policies_agree(mode: Correction) -> None:
    weights, metrics = importance_weights(PROX, PROX.clone(), MASK, mode, cap=2.0, floor=0.5)
    assert torch.equal(weights, MASK.double())
    assert _mean(metrics, "is_ratio") == 1.0
    assert _mean(metrics, "is_clipped_frac") == 0.0
    assert _mean(metrics, "mismatch_kl") == 0.0
    size = effective_sample_size(_mean(metrics, "is_weight"), _mean(metrics, "is_weight_sq"))
    assert size == 1.0


def _loss_and_gradient(behaviour: Tensor, mode: Correction) -> tuple[Tensor, Tensor]:
    logp = (PROX + torch.tensor([0.3, 0.0, -0.4], dtype=torch.float64)).requires_grad_()
    advantages = torch.tensor([[1.0], [-2.0]], dtype=torch.float64).expand(2, 3)
    losses = ppo_clip(logp, PROX, advantages, MASK).losses
    weights, _ = importance_weights(PROX, behaviour, MASK, mode, cap=3.0)
    loss = aggregate(losses * weights, MASK, "token-mean", 5)
    return loss.detach(), torch.autograd.grad(loss, logp)[0]


@pytest.mark.parametrize("mode", MODES)
def test_corrected_ppo_is_plain_ppo_when_the_data_is_on_policy(mode: Correction) -> None:
    for found, plain in zip(
        _loss_and_gradient(PROX, mode), _loss_and_gradient(MU, "none"), strict=True
    ):
        assert torch.equal(found, plain)


def test_decoupled_ppo_matches_its_formula_off_policy() -> None:
    loss, _ = _loss_and_gradient(MU, "decoupled")
    expected = 0.0
    for b, t in ((0, 0), (0, 2), (1, 0), (1, 1), (1, 2)):
        a = (1.0, -2.0)[b]
        ratio = math.exp((0.3, 0.0, -0.4)[t])
        clipped = min(max(ratio, 0.8), 1.2)
        expected -= min(RATIO[b, t].item(), 3.0) * min(ratio * a, clipped * a) / 5
    assert loss.item() == pytest.approx(expected)


def test_masking_keeps_the_original_denominator() -> None:
    losses = torch.ones(2, 3, dtype=torch.float64)
    weights, _ = importance_weights(PROX, MU, MASK, "token-mask", cap=3.0)
    # Survivors weigh 2, .5, .5, 1; still a mean over all 5 tokens, not over 4.
    assert aggregate(losses * weights, MASK, "token-mean", 5).item() == pytest.approx(4 / 5)


@pytest.mark.parametrize("mode", MODES)
def test_veto_drops_the_whole_response(mode: Correction) -> None:
    prox = PROX.clone()
    prox[0, 1] -= 40.0  # in the hole: does not count
    prox[1, 2] = MU[1, 2] + math.log(1e-5)
    weights, metrics = importance_weights(prox, MU, MASK, mode, cap=10.0, veto=1e-4)
    assert (weights[0][MASK[0]] > 0).all()
    assert (weights[1] == 0).all()
    assert _mean(metrics, "veto") == 0.5


@pytest.mark.parametrize("mode", MODES)
def test_padding_and_empty_rows_count_for_nothing(mode: Correction) -> None:
    padded_prox = torch.full((3, 5), torch.nan, dtype=torch.float64)
    padded_mu, mask = padded_prox.clone(), torch.zeros(3, 5)
    padded_prox[:2, :3], padded_mu[:2, :3], mask[:2, :3] = PROX, MU, MASK.float()
    weights, metrics = importance_weights(padded_prox, padded_mu, mask, mode, cap=3.0)
    plain, plain_metrics = importance_weights(PROX, MU, MASK, mode, cap=3.0)
    assert torch.equal(weights[:2, :3], plain)
    assert weights.sum() == plain.sum()
    for name, parts in plain_metrics.items():
        assert torch.equal(torch.stack(metrics[name]), torch.stack(parts)), name


def test_sequence_weights_make_the_estimate_unbiased_and_token_weights_do_not() -> None:
    """Two steps over a vocabulary of two, reward for the pair: expectations by enumeration."""
    mu_logp = torch.tensor([0.7, 0.3], dtype=torch.float64).log()
    prox_logp = torch.tensor([0.4, 0.6], dtype=torch.float64).log()
    responses = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    rewards = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    mask = torch.ones(4, 2)

    def policy_gradient(weights: Tensor, sampled_by: Tensor) -> Tensor:
        logits = prox_logp.clone().requires_grad_()
        logp = logits.log_softmax(0)[responses]
        chance = sampled_by[responses].sum(1).exp()
        return torch.autograd.grad((chance * rewards * (weights * logp).sum(1)).sum(), logits)[0]

    exact = policy_gradient(torch.ones(4, 2, dtype=torch.float64), prox_logp)
    prox, mu = prox_logp[responses], mu_logp[responses]
    by_sequence, _ = importance_weights(prox, mu, mask, "sequence-tis", cap=100.0)
    by_token, _ = importance_weights(prox, mu, mask, "token-tis", cap=100.0)
    uncorrected, _ = importance_weights(prox, mu, mask, "none", cap=100.0)
    torch.testing.assert_close(policy_gradient(by_sequence, mu_logp), exact, atol=1e-12, rtol=0)
    for biased in (by_token, uncorrected):
        assert (policy_gradient(biased, mu_logp) - exact).abs().max() > 1e-2


def test_extreme_mismatch_stays_finite_and_carries_no_gradient() -> None:
    prox = torch.zeros(1, 400, requires_grad=True)
    for mode in MODES:
        weights, metrics = importance_weights(prox, prox - 900, torch.ones(1, 400), mode, cap=5.0)
        assert torch.isfinite(weights).all()
        assert not weights.requires_grad
        assert all(torch.isfinite(p) for pair in metrics.values() for p in pair)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown correction 'tis'"):
        importance_weights(PROX, MU, MASK, "tis", cap=2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="floor < cap"):
        importance_weights(PROX, MU, MASK, "token-tis", cap=1.0, floor=1.0)
    with pytest.raises(ValueError, match="behaviour_logp has shape"):
        importance_weights(PROX, MU[:, :2], MASK, "none", cap=2.0)


def test_effective_sample_size_of_no_weight_is_zero() -> None:
    assert effective_sample_size(0.0, 0.0) == 0.0
