"""Value loss and explained variance against loops and numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from learner.algorithms.loss_terms import MetricParts
from learner.algorithms.value_loss import clipped_value_loss, explained_variance

MASK = torch.tensor([[1, 0, 1, 1], [0, 1, 1, 0]], dtype=torch.bool)


def _case() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(9)
    return tuple(
        torch.randn(2, 4, generator=generator, dtype=torch.float64).masked_fill(~MASK, torch.nan)
        for _ in range(3)
    )


def _mean(metrics: MetricParts, name: str) -> float:
    total, count = metrics[name]
    return (total / count).item()


@pytest.mark.parametrize("clip", [None, 0.2])
def test_value_loss_matches_a_loop(clip: float | None) -> None:
    values, old, returns = _case()
    terms = clipped_value_loss(values, old, returns, MASK, clip)
    decided = 0
    for b, t in MASK.nonzero().tolist():
        v, o, r = (x[b, t].item() for x in (values, old, returns))
        loss = 0.5 * (v - r) ** 2
        if clip is not None:
            moved = 0.5 * (o + min(max(v - o, -clip), clip) - r) ** 2
            decided += moved > loss
            loss = max(loss, moved)
        assert terms.losses[b, t].item() == pytest.approx(loss, abs=1e-12)
    assert (terms.losses[~MASK] == 0).all()
    assert terms.metrics["clipfrac"][0].item() == decided
    assert (decided > 0) == (clip is not None)


def test_value_loss_by_hand() -> None:
    # Value 1 may move by .2 from old 0. Return 1: the clipped error .8 counts, without gradient.
    values = torch.tensor([[1.0, 1.0, 0.1]], requires_grad=True)
    terms = clipped_value_loss(
        values, torch.zeros(1, 3), torch.tensor([[1.0, -1.0, 1.0]]), torch.ones(1, 3)
    )
    assert terms.losses[0].tolist() == pytest.approx([0.32, 2.0, 0.405])
    terms.losses.sum().backward()
    assert values.grad is not None
    assert values.grad[0].tolist() == pytest.approx([0.0, 2.0, -0.9])
    assert _mean(terms.metrics, "clipfrac") == pytest.approx(1 / 3)


def test_gradcheck_and_no_gradient_elsewhere() -> None:
    values, old, returns = (x.nan_to_num(0.0).requires_grad_() for x in _case())
    assert torch.autograd.gradcheck(
        lambda v: clipped_value_loss(v, old, returns, MASK).losses, values
    )
    clipped_value_loss(values, old, returns, MASK).losses.sum().backward()
    assert old.grad is None
    assert returns.grad is None


def test_explained_variance_from_merged_parts_matches_numpy() -> None:
    values, old, returns = _case()
    returns = returns + 50.0
    values = returns * 0.8 + values * 0.1
    rows = [
        clipped_value_loss(values[[b]], old[[b]], returns[[b]], MASK[[b]]).metrics for b in (0, 1)
    ]
    means = [
        sum(r[name][0].item() for r in rows) / sum(r[name][1].item() for r in rows)
        for name in ("return", "return_sq", "error", "error_sq")
    ]
    r, v = returns[MASK].numpy(), values[MASK].numpy()
    assert explained_variance(*means) == pytest.approx(1 - np.var(r - v) / np.var(r), abs=1e-9)


def test_explained_variance_of_perfect_useless_and_constant() -> None:
    assert explained_variance(0.0, 4.0, 0.0, 0.0) == 1.0
    assert explained_variance(1.0, 5.0, 0.0, 4.0) == 0.0
    assert math.isnan(explained_variance(3.0, 9.0, 0.0, 1.0))
    assert math.isnan(explained_variance(0.0, 0.0, 0.0, 0.0))
