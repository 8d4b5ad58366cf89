"""Losses of a reward model by hand and against loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from learner.algorithms.loss_terms import LossTerms
from learner.algorithms.reward_loss import bradley_terry


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


def test_gradients_against_finite_differences_and_shapes() -> None:
    chosen, rejected = (x.requires_grad_() for x in _pairs(2))
    assert torch.autograd.gradcheck(
        lambda a, b: bradley_terry(a, b, centering=0.1).losses, (chosen, rejected)
    )
    with pytest.raises(ValueError, match="rejected has shape"):
        bradley_terry(torch.zeros(2), torch.zeros(1))
