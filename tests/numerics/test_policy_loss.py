"""Policy losses against per-token loops, by hand, and on the identities of a first step."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from cluster.contracts import registry
from learner.algorithms.loss_terms import LossTerms
from learner.algorithms.masked import aggregate
from learner.algorithms.policy_loss import (
    POLICY_LOSSES,
    cispo,
    gspo,
    ppo_clip,
    reinforce,
)

MASK = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 1, 1], [0, 1, 1, 0, 0]], dtype=torch.bool)


def _case() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shape = (3, 5)
    logp = -torch.rand(*shape, generator=generator, dtype=torch.float64) * 3
    prox = logp + torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.5
    advantages = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return logp, prox, advantages


def _set_positions() -> Iterator[tuple[int, int]]:
    return ((int(b), int(t)) for b, t in MASK.nonzero())


def _mean(terms: LossTerms, name: str) -> float:
    total, count = terms.metrics[name]
    return (total / count).item()


@pytest.mark.parametrize("dual_clip", [None, 1.1, 3.0])
def test_ppo_clip_matches_a_loop(dual_clip: float | None) -> None:
    logp, prox, advantages = _case()
    terms = ppo_clip(logp, prox, advantages, MASK, clip_low=0.1, clip_high=0.3, dual_clip=dual_clip)
    clipped = dual = 0
    for b, t in _set_positions():
        ratio = math.exp(logp[b, t] - prox[b, t])
        a = advantages[b, t].item()
        inside = min(max(ratio, 0.9), 1.3)
        loss = max(-ratio * a, -inside * a)
        clipped += loss != -ratio * a
        if dual_clip is not None and a < 0 and loss > -dual_clip * a:
            loss, dual = -dual_clip * a, dual + 1
        assert terms.losses[b, t].item() == pytest.approx(loss, abs=1e-12)
    assert clipped > 0
    assert terms.metrics["clipfrac"][0].item() == clipped
    assert terms.metrics["clipfrac"][1].item() == MASK.sum().item()
    low_and_high = _mean(terms, "clipfrac_low") + _mean(terms, "clipfrac_high")
    assert low_and_high == pytest.approx(_mean(terms, "clipfrac"))
    if dual_clip is not None:
        assert terms.metrics["clipfrac_dual"][0].item() == dual
        assert (dual > 0) == (dual_clip == 1.1)


def test_ppo_clip_by_hand() -> None:
    ratio = torch.tensor([[1.5, 1.5, 0.5, 0.5, 5.0, 1.1]])
    advantages = torch.tensor([[2.0, -2.0, 2.0, -2.0, -1.0, 3.0]])
    terms = ppo_clip(ratio.log(), torch.zeros(1, 6), advantages, torch.ones(1, 6), dual_clip=3.0)
    # Good and too likely: 1.2 * 2. Bad and too unlikely: .8 * 2. Bad, 5 times as likely: cut at 3.
    assert terms.losses.tolist()[0] == pytest.approx([-2.4, 3.0, -1.0, 1.6, 3.0, -3.3])
    assert _mean(terms, "clipfrac_high") == pytest.approx(1 / 6)
    assert _mean(terms, "clipfrac_low") == pytest.approx(1 / 6)
    assert _mean(terms, "clipfrac_dual") == pytest.approx(1 / 6)


def test_clipped_tokens_have_no_gradient_and_the_others_have_ratio_times_advantage() -> None:
    ratio = torch.tensor([[1.5, 1.5, 0.5, 0.5, 5.0, 1.1]])
    advantages = torch.tensor([[2.0, -2.0, 2.0, -2.0, -1.0, 3.0]])
    logp = ratio.log().requires_grad_()
    terms = ppo_clip(logp, torch.zeros(1, 6), advantages, torch.ones(1, 6), dual_clip=3.0)
    terms.losses.sum().backward()
    assert logp.grad is not None
    assert logp.grad[0].tolist() == pytest.approx([0.0, 3.0, -1.0, 0.0, 0.0, -3.3])


def test_cispo_keeps_the_gradient_of_a_clipped_token() -> None:
    logp = torch.tensor([[math.log(0.6), math.log(0.1)]], requires_grad=True)
    prox = torch.tensor([[math.log(0.3), math.log(0.4)]])
    terms = cispo(logp, prox, torch.tensor([[2.0, -1.0]]), torch.ones(1, 2), clip_high=0.5)
    # Ratio 2 is cut to 1.5, ratio .25 stays: weights times -A log pi.
    expected = [-1.5 * 2 * math.log(0.6), 0.25 * math.log(0.1)]
    assert terms.losses[0].tolist() == pytest.approx(expected)
    terms.losses.sum().backward()
    assert logp.grad is not None
    assert logp.grad[0].tolist() == pytest.approx([-3.0, 0.25])
    assert _mean(terms, "clipfrac_high") == 0.5
    assert _mean(terms, "clipfrac_low") == 0.0
    bounded = cispo(logp, prox, torch.ones(1, 2), torch.ones(1, 2), clip_low=0.2)
    assert bounded.losses[0, 1].item() == pytest.approx(-0.8 * math.log(0.1))


def test_gspo_has_value_and_gradient_of_the_sequence_form() -> None:
    logp, prox, _ = _case()
    prox = logp + (prox - logp) * 0.02  # near the narrow clip range, on both sides of it
    advantages = torch.tensor([[1.0], [-2.0], [0.5]], dtype=torch.float64)
    clip_low, clip_high = 0.004, 0.003
    mine = logp.clone().requires_grad_()
    terms = gspo(mine, prox, advantages.expand(3, 5), MASK, clip_low=clip_low, clip_high=clip_high)
    loss = aggregate(terms.losses, MASK, "seq-mean-token-mean", 3)
    loss.backward()

    theirs = logp.clone().requires_grad_()
    expected = torch.zeros((), dtype=torch.float64)
    ratios = []
    for b in range(3):
        ratio = torch.exp((theirs - prox)[b][MASK[b]].mean())
        ratios.append(ratio.item())
        a = advantages[b, 0]
        clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
        expected = expected - torch.minimum(ratio * a, clipped * a) / 3
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-12, rtol=0)
    assert _mean(terms, "ratio") == pytest.approx(np.repeat(ratios, MASK.sum(1)).mean())


def test_reinforce_is_minus_advantage_times_logp() -> None:
    logp, prox, advantages = _case()
    terms = reinforce(logp, prox, advantages, MASK)
    assert torch.equal(terms.losses[MASK], (-advantages * logp)[MASK])


@pytest.mark.parametrize("name", list(POLICY_LOSSES))
def test_first_step_identities(name: str) -> None:
    logp, _, advantages = _case()
    logp.requires_grad_()
    terms = POLICY_LOSSES[name](logp, logp.detach().clone(), advantages, MASK)
    tokens = MASK.sum().item()
    aggregate(terms.losses, MASK, "token-mean", tokens).backward()
    assert _mean(terms, "ratio") == 1.0
    assert _mean(terms, "approxkl") == 0.0
    for clip in ("clipfrac", "clipfrac_low", "clipfrac_high"):
        if clip in terms.metrics:
            assert _mean(terms, clip) == 0.0
    if name in ("ppo", "gspo"):
        assert terms.losses[MASK].mean().item() == pytest.approx(-advantages[MASK].mean().item())
    # All of them are the plain policy gradient there.
    expected = (-advantages / tokens).masked_fill(~MASK, 0.0)
    torch.testing.assert_close(logp.grad, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", list(POLICY_LOSSES))
def test_padding_of_any_content_changes_nothing(name: str) -> None:
    logp, prox, advantages = _case()
    results = []
    for filler in (0.0, torch.nan, -torch.inf):
        mine = logp.masked_fill(~MASK, filler).requires_grad_()
        other = prox.masked_fill(~MASK, filler)
        terms = POLICY_LOSSES[name](mine, other, advantages.masked_fill(~MASK, filler), MASK)
        gradient = torch.autograd.grad(aggregate(terms.losses, MASK, "token-mean", 10), mine)
        metrics = (part for pair in terms.metrics.values() for part in pair)
        results.append((terms.losses, *gradient, *metrics))
    for other_result in results[1:]:
        for found, expected in zip(other_result, results[0], strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["ppo", "reinforce"])
def test_gradcheck(name: str) -> None:
    logp, prox, advantages = _case()
    logp.requires_grad_()
    options = {"dual_clip": 3.0} if name == "ppo" else {}
    loss = POLICY_LOSSES[name]
    assert torch.autograd.gradcheck(
        lambda x: loss(x, prox, advantages, MASK, **options).losses, logp
    )


@pytest.mark.parametrize("name", list(POLICY_LOSSES))
def test_only_the_current_policy_gets_a_gradient(name: str) -> None:
    logp, prox, advantages = (x.requires_grad_() for x in _case())
    POLICY_LOSSES[name](logp, prox, advantages, MASK).losses.sum().backward()
    assert logp.grad is not None
    assert prox.grad is None
    assert advantages.grad is None


def test_wild_ratios_stay_finite() -> None:
    logp = torch.tensor([[-1e4, 0.0]], requires_grad=True)
    prox = torch.tensor([[0.0, -1e4]])
    for loss in POLICY_LOSSES.values():
        terms = loss(logp, prox, torch.tensor([[1.0, -1.0]]), torch.ones(1, 2))
        assert torch.isfinite(terms.losses).all()
        assert torch.isfinite(torch.autograd.grad(terms.losses.sum(), logp)[0]).all()


def test_the_table_of_options_tells_the_truth() -> None:
    assert list(registry.POLICY_LOSSES) == list(POLICY_LOSSES)
    for name, loss in POLICY_LOSSES.items():
        assert registry.POLICY_LOSSES[name].options == registry.keywords(loss)[0]


def test_bad_arguments_are_refused() -> None:
    logp, prox, advantages = _case()
    with pytest.raises(ValueError, match="dual_clip must be above 1"):
        ppo_clip(logp, prox, advantages, MASK, dual_clip=1.0)
    with pytest.raises(ValueError, match=r"advantages has shape \(3,\)"):
        ppo_clip(logp, prox, advantages[:, 0], MASK)
