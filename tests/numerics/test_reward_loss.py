"""Losses of a reward model: hand-worked numbers, loops, enumeration, finite differences."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from learner.algorithms.reward_loss import bradley_terry, plackett_luce, rao_kupper_tie


def _pairs(count: int, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(6, generator=generator, dtype=torch.float64) * 2 for _ in range(count))


def _softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_bradley_terry_by_hand() -> None:
    equal = bradley_terry(torch.tensor([1.0, -3.0]), torch.tensor([1.0, -3.0]))
    assert equal.tolist() == pytest.approx([math.log(2)] * 2)
    two, one = torch.tensor([2.0]), torch.tensor([1.0])
    assert bradley_terry(two, one).item() == pytest.approx(0.3132616875)
    # 0.9 * 0.3132616875 + 0.1 * 1.3132616875
    assert bradley_terry(two, one, label_smoothing=0.1).item() == pytest.approx(0.4132616875)


@pytest.mark.parametrize("centering", [0.0, 0.01])
@pytest.mark.parametrize("with_margin", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_bradley_terry_matches_a_loop(
    centering: float, with_margin: bool, smoothing: float
) -> None:
    chosen, rejected, margin = _pairs(3)
    given = margin if with_margin else None
    losses = bradley_terry(chosen, rejected, given, centering, smoothing)
    for i in range(6):
        c, r = chosen[i].item(), rejected[i].item()
        gap = c - r - (margin[i].item() if with_margin else 0.0)
        likelihood = (1 - smoothing) * _softplus(-gap) + smoothing * _softplus(gap)
        expected = likelihood + centering * (c + r) ** 2
        assert losses[i].item() == pytest.approx(expected, abs=1e-12)


def test_bradley_terry_sees_differences_only_and_centering_sees_the_sum() -> None:
    chosen, rejected = _pairs(2)
    plain = bradley_terry(chosen, rejected)
    torch.testing.assert_close(bradley_terry(chosen + 5, rejected + 5), plain)
    centred = bradley_terry(chosen + 5, rejected + 5, centering=0.1)
    torch.testing.assert_close(centred, plain + 0.1 * (chosen + rejected + 10).square())


def test_bradley_terry_stays_finite_far_out() -> None:
    chosen = torch.tensor([1e4, -1e4], requires_grad=True)
    losses = bradley_terry(chosen, -chosen.detach())
    assert losses.tolist() == pytest.approx([0.0, 2e4])
    losses.sum().backward()
    assert chosen.grad is not None
    assert chosen.grad.tolist() == pytest.approx([0.0, -1.0])


def test_rao_kupper_by_hand_and_as_a_distribution() -> None:
    # theta = 2 and equal scores: a win has 1 / (1 + 2), so a tie has the other third.
    zero = torch.zeros(1, dtype=torch.float64)
    assert rao_kupper_tie(zero, zero, math.log(2)).item() == pytest.approx(math.log(3))
    first, second = _pairs(2)
    for threshold in (0.1, 0.7):
        margin = torch.full_like(first, threshold)
        won = (-bradley_terry(first, second, margin)).exp()
        lost = (-bradley_terry(second, first, margin)).exp()
        tied = (-rao_kupper_tie(first, second, threshold)).exp()
        torch.testing.assert_close(won + lost + tied, torch.ones_like(first))
        torch.testing.assert_close(rao_kupper_tie(second, first, threshold), -tied.log())


def test_plackett_luce_by_hand_and_as_a_distribution() -> None:
    # exp(scores) = 3, 2, 1: 3/6 * 2/3 * 1/1 = 1/3.
    scores = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64).log()
    assert plackett_luce(scores, torch.ones(3).bool()).item() == pytest.approx(math.log(3))
    four = _pairs(1)[0][:4]
    orders = torch.stack([four[list(order)] for order in itertools.permutations(range(4))])
    total = (-plackett_luce(orders, torch.ones_like(orders).bool())).exp().sum()
    assert total.item() == pytest.approx(1.0)


def test_plackett_luce_of_two_is_bradley_terry_and_absent_places_do_not_count() -> None:
    chosen, rejected, junk = _pairs(3)
    scores = torch.stack([chosen, rejected, junk], dim=-1).requires_grad_()
    present = torch.tensor([True, True, False]).expand(6, 3)
    losses = plackett_luce(scores, present)
    torch.testing.assert_close(losses, bradley_terry(chosen, rejected))
    losses.sum().backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()
    assert not scores.grad[:, 2].any()
    members = torch.stack([scores, 2 * scores])  # further dimensions first
    assert plackett_luce(members, present.expand(2, 6, 3)).shape == (2, 6)


def test_gradients_against_finite_differences() -> None:
    first, second = (x.requires_grad_() for x in _pairs(2))
    assert torch.autograd.gradcheck(
        lambda a, b: bradley_terry(a, b, None, 0.1, 0.1), (first, second)
    )
    assert torch.autograd.gradcheck(lambda a, b: rao_kupper_tie(a, b, 0.4), (first, second))
    present = torch.tensor([[True, True, True], [True, True, False]])
    assert torch.autograd.gradcheck(lambda a: plackett_luce(a.view(2, 3), present), (first,))


def test_bad_arguments_are_refused() -> None:
    x = torch.zeros(2)
    with pytest.raises(ValueError, match="rejected has shape"):
        bradley_terry(x, torch.zeros(1))
    with pytest.raises(ValueError, match="label_smoothing must be"):
        bradley_terry(x, x, label_smoothing=0.5)
    with pytest.raises(ValueError, match="threshold must be positive"):
        rao_kupper_tie(x, x, 0.0)
    with pytest.raises(ValueError, match="present has shape"):
        plackett_luce(x, torch.ones(1).bool())
