"""Direct preference losses: hand-worked numbers, plain-Python references, finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from learner.algorithms.loss_terms import MetricParts
from learner.algorithms.preference_loss import (
    dpo,
    ipo,
    kto,
    kto_reference_point,
    orpo,
    reward_metrics,
    simpo,
)
from learner.algorithms.reward_loss import bradley_terry

GOOD = torch.tensor([True, False, True, False, True, False])


def _pairs(count: int, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(6, generator=generator, dtype=torch.float64) * 2 for _ in range(count))


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def one(x: float) -> Tensor:
    return torch.tensor([x], dtype=torch.float64)


def test_by_hand() -> None:
    # h = 1 - (-2) = 3, beta = 1/3: -log sigmoid(1).
    assert dpo(one(1), one(-2), 1 / 3).item() == pytest.approx(0.3132616875182228)
    # s = 0.25: 0.75 * 0.3132616875 + 0.25 * 1.3132616875.
    assert dpo(one(1), one(-2), 1 / 3, 0.25).item() == pytest.approx(0.5632616875182228)
    # (3 - 1/(2 * 0.25))^2 = 1.
    assert ipo(one(1), one(-2), 0.25).item() == pytest.approx(1.0)
    # 2 * (-0.5 + 1.5) - 1 = 1: -log sigmoid(1).
    assert simpo(one(-0.5), one(-1.5), 2.0, 1.0).item() == pytest.approx(0.3132616875182228)
    # P = 3/4 and 1/4: odds 3 and 1/3, so log sigmoid(log 9) = log 0.9; 0.5 weighs it.
    expected = -math.log(0.75) - 0.5 * math.log(0.9)
    assert orpo(one(math.log(0.75)), one(math.log(0.25)), 0.5).item() == pytest.approx(expected)
    # good: r = 3, z = 1, beta = 1/2: 1 - sigmoid(1); bad: 2 (1 - sigmoid(1/2 (1 - 3))).
    values = kto(torch.tensor([3.0, 3.0]), torch.tensor([True, False]), 1.0, 0.5, 1.0, 2.0)
    assert values.tolist() == pytest.approx([0.2689414213699951, 2 * 0.7310585786300049])
    assert kto_reference_point(torch.tensor([1.0, 2.0, -0.6])) == pytest.approx(0.8)
    assert kto_reference_point(torch.tensor([1.0, -2.0])) == 0.0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_against_plain_python(smoothing: float) -> None:
    chosen, rejected = _pairs(2)
    logs = [-x.abs() - 0.01 for x in (chosen, rejected)]
    for i in range(6):
        h = (chosen[i] - rejected[i]).item()
        d = 0.3 * h
        wanted = -(1 - smoothing) * math.log(_sigmoid(d)) - smoothing * math.log(_sigmoid(-d))
        assert dpo(chosen, rejected, 0.3, smoothing)[i].item() == pytest.approx(wanted, abs=1e-12)
        assert ipo(chosen, rejected, 0.3)[i].item() == pytest.approx((h - 1 / 0.6) ** 2, abs=1e-12)
        d = 0.3 * h - 0.7
        wanted = -(1 - smoothing) * math.log(_sigmoid(d)) - smoothing * math.log(_sigmoid(-d))
        found = simpo(chosen, rejected, 0.3, 0.7, smoothing)[i].item()
        assert found == pytest.approx(wanted, abs=1e-12)
        p, q = (math.exp(log[i].item()) for log in logs)
        ratio = (p / (1 - p)) / (q / (1 - q))
        wanted = -math.log(p) - 0.3 * math.log(_sigmoid(math.log(ratio)))
        assert orpo(*logs, 0.3)[i].item() == pytest.approx(wanted, abs=1e-12)
        r = chosen[i].item()
        value = _sigmoid(0.3 * (r - 0.4)) if GOOD[i] else _sigmoid(0.3 * (0.4 - r))
        weight = 1.5 if GOOD[i] else 0.5
        wanted = weight - weight * value  # lambda_y - v(x, y)
        assert kto(chosen, GOOD, 0.4, 0.3, 1.5, 0.5)[i].item() == pytest.approx(wanted, abs=1e-12)


def test_identities_between_losses() -> None:
    chosen, rejected = _pairs(2)
    torch.testing.assert_close(
        dpo(chosen, rejected, 0.3), bradley_terry(0.3 * chosen, 0.3 * rejected)
    )
    torch.testing.assert_close(dpo(chosen, rejected, 0.3), simpo(chosen, rejected, 0.3, 0.0))
    assert dpo(chosen, chosen, 0.1, 0.2).tolist() == pytest.approx([math.log(2)] * 6)
    # What the config says of label smoothing with IPO: it would only rescale beta.
    s, beta = 0.2, 0.3
    smoothed = (1 - s) * ipo(chosen, rejected, beta) + s * ipo(rejected, chosen, beta)
    rescaled = ipo(chosen, rejected, beta / (1 - 2 * s))
    difference = smoothed - rescaled
    torch.testing.assert_close(difference, difference[:1].expand(6))
    # A completion as probable as the reference point's is worth half its weight, good or bad.
    assert kto(one(0.7), torch.tensor([True]), 0.7, 0.1).item() == pytest.approx(0.5)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "dpo": lambda a, b: dpo(a, b, 0.3, 0.1),
    "ipo": lambda a, b: ipo(a, b, 0.3),
    "simpo": lambda a, b: simpo(a, b, 2.0, 0.5, 0.1),
    "orpo": lambda a, b: orpo(-a.abs() - 0.01, -b.abs() - 0.01, 0.3),
    "kto": lambda a, b: kto(a, GOOD, 0.4, 0.3, 1.5) + kto(b, ~GOOD, 0.4, 0.3),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_against_finite_differences(name: str) -> None:
    chosen, rejected = (x.requires_grad_() for x in _pairs(2))
    assert torch.autograd.gradcheck(LOSSES[name], (chosen, rejected))


@pytest.mark.parametrize("name", LOSSES)
def test_far_out_values_stay_finite(name: str) -> None:
    chosen = torch.tensor([1e4, -1e4, 0.0, -1e-9, 80.0, -80.0], requires_grad=True)
    losses = LOSSES[name](chosen, -chosen.detach())
    losses.sum().backward()
    assert losses.isfinite().all()
    assert chosen.grad is not None
    assert chosen.grad.isfinite().all()


def test_orpo_near_certainty() -> None:
    logp = torch.tensor([0.0, -1e-7, -50.0], requires_grad=True)
    losses = orpo(logp, torch.full((3,), -1.0), 0.1)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert logp.grad is not None
    assert logp.grad.isfinite().all()


def _mean(metrics: MetricParts, name: str) -> float:
    total, count = metrics[name]
    return (total / count).item()


def test_reward_metrics_count_what_there_is() -> None:
    chosen, rejected = torch.tensor([2.0, 5.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 4.0, 1.0])
    has_chosen = torch.tensor([True, True, False, True])
    has_rejected = torch.tensor([True, False, True, True])
    metrics = reward_metrics(chosen, rejected, has_chosen, has_rejected)
    assert _mean(metrics, "rewards/chosen") == pytest.approx(8 / 3)
    assert _mean(metrics, "rewards/rejected") == pytest.approx(2.0)
    assert _mean(metrics, "rewards/accuracies") == pytest.approx(0.5)  # the last one is a tie
    assert _mean(metrics, "rewards/margins") == pytest.approx(0.5)


def test_bad_arguments_are_refused() -> None:
    x, good = torch.zeros(2), torch.tensor([True, False])
    for call in (
        lambda: dpo(x, x, 0.0),
        lambda: ipo(x, x, 0.0),
        lambda: orpo(x, x, -1.0),
        lambda: kto(x, good, 0.0, 0.0),
    ):
        with pytest.raises(ValueError, match="beta must be positive"):
            call()
    with pytest.raises(ValueError, match="label_smoothing must be"):
        dpo(x, x, 0.1, 0.5)
    with pytest.raises(ValueError, match="rejected has shape"):
        ipo(x, torch.zeros(1), 0.1)
    with pytest.raises(ValueError, match="no mismatched completions"):
        kto_reference_point(torch.zeros(0))
