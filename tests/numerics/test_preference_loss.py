"""Preference losses by hand and against loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from learner.algorithms.loss_terms import LossTerms
from learner.algorithms.preference_loss import bradley_terry, dpo


def _mean(terms: LossTerms, name: str) -> float:
    total, count = terms.metrics[name]
    return (total / count).item()


def _pairs(count: int, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(6, generator=generator, dtype=torch.float64) * 2 for _ in range(count))


def _softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_bradley_terry_at_equality_is_log_2_and_a_tie_is_wrong() -> None:
    terms = bradley_terry(torch.tensor([1.0, -3.0]), torch.tensor([1.0, -3.0]))
    assert terms.losses.tolist() == pytest.approx([math.log(2)] * 2)
    assert _mean(terms, "accuracy") == 0.0


@pytest.mark.parametrize("centering", [0.0, 0.01])
@pytest.mark.parametrize("with_margin", [False, True])
def test_bradley_terry_matches_a_loop(centering: float, with_margin: bool) -> None:
    chosen, rejected, margin = _pairs(3)
    terms = bradley_terry(chosen, rejected, margin if with_margin else None, centering)
    for i in range(6):
        c, r = chosen[i].item(), rejected[i].item()
        gap = c - r - (margin[i].item() if with_margin else 0.0)
        expected = _softplus(-gap) + centering * (c + r) ** 2
        assert terms.losses[i].item() == pytest.approx(expected, abs=1e-12)
    assert _mean(terms, "accuracy") == pytest.approx((chosen > rejected).double().mean().item())
    assert _mean(terms, "margin") == pytest.approx((chosen - rejected).mean().item())


def test_bradley_terry_sees_differences_only_and_centering_sees_the_sum() -> None:
    chosen, rejected = _pairs(2)
    plain = bradley_terry(chosen, rejected).losses
    torch.testing.assert_close(bradley_terry(chosen + 5, rejected + 5).losses, plain)
    centred = bradley_terry(chosen + 5, rejected + 5, centering=0.1).losses
    torch.testing.assert_close(centred, plain + 0.1 * (chosen + rejected + 10).square())


def test_bradley_terry_stays_finite_far_out() -> None:
    chosen = torch.tensor([1e4, -1e4], requires_grad=True)
    terms = bradley_terry(chosen, -chosen.detach())
    assert terms.losses.tolist() == pytest.approx([0.0, 2e4])
    terms.losses.sum().backward()
    assert chosen.grad is not None
    assert chosen.grad.tolist() == pytest.approx([0.0, -1.0])


def test_dpo_is_log_2_when_policy_and_reference_agree() -> None:
    chosen, rejected = _pairs(2)
    for smoothing in (0.0, 0.2):
        terms = dpo(chosen, rejected, chosen, rejected, beta=0.1, label_smoothing=smoothing)
        assert terms.losses.tolist() == pytest.approx([math.log(2)] * 6)
    assert _mean(terms, "rewards/margins") == 0.0
    ipo = dpo(chosen, rejected, chosen, rejected, beta=0.1, loss_type="ipo")
    assert ipo.losses.tolist() == pytest.approx([25.0] * 6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_dpo_matches_a_loop(smoothing: float) -> None:
    pc, pr, rc, rr = _pairs(4)
    beta = 0.3
    terms = dpo(pc, pr, rc, rr, beta, smoothing)
    ipo = dpo(pc, pr, rc, rr, beta, loss_type="ipo")
    for i in range(6):
        h = (pc[i] - rc[i] - (pr[i] - rr[i])).item()
        expected = (1 - smoothing) * _softplus(-beta * h) + smoothing * _softplus(beta * h)
        assert terms.losses[i].item() == pytest.approx(expected, abs=1e-12)
        assert ipo.losses[i].item() == pytest.approx((h - 1 / (2 * beta)) ** 2, abs=1e-12)
    assert _mean(terms, "rewards/chosen") == pytest.approx(beta * (pc - rc).mean().item())
    assert _mean(terms, "rewards/rejected") == pytest.approx(beta * (pr - rr).mean().item())
    better = (pc - rc > pr - rr).double().mean().item()
    assert 0 < better < 1
    assert _mean(terms, "rewards/accuracies") == pytest.approx(better)
    assert _mean(terms, "logps/chosen") == pytest.approx(pc.mean().item())


def test_dpo_is_bradley_terry_on_its_implicit_rewards() -> None:
    pc, pr, rc, rr = _pairs(4)
    expected = bradley_terry(0.3 * (pc - rc), 0.3 * (pr - rr)).losses
    torch.testing.assert_close(dpo(pc, pr, rc, rr, 0.3).losses, expected)


def test_gradcheck_and_a_constant_reference() -> None:
    pc, pr, rc, rr = (x.requires_grad_() for x in _pairs(4))
    for loss_type in ("sigmoid", "ipo"):
        assert torch.autograd.gradcheck(
            lambda a, b, kind=loss_type: dpo(a, b, rc, rr, 0.3, loss_type=kind).losses, (pc, pr)
        )
    assert torch.autograd.gradcheck(
        lambda a, b: bradley_terry(a, b, centering=0.1).losses, (pc, pr)
    )
    dpo(pc, pr, rc, rr, 0.3).losses.sum().backward()
    assert rc.grad is None
    assert rr.grad is None


def test_bad_arguments_are_refused() -> None:
    x = torch.zeros(2)
    with pytest.raises(ValueError, match="beta must be positive"):
        dpo(x, x, x, x, beta=0.0)
    with pytest.raises(ValueError, match="label_smoothing must be"):
        dpo(x, x, x, x, beta=0.1, label_smoothing=0.5)
    with pytest.raises(ValueError, match="no effect"):
        dpo(x, x, x, x, beta=0.1, label_smoothing=0.1, loss_type="ipo")
    with pytest.raises(ValueError, match="unknown DPO loss 'hinge'"):
        dpo(x, x, x, x, beta=0.1, loss_type="hinge")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rejected has shape"):
        bradley_terry(x, torch.zeros(1))
