"""Masked reductions against numpy on the kept values, and aggregation by hand."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch

from learner.algorithms.masked import (
    Aggregation,
    aggregate,
    last_valid_index,
    masked_mean,
    masked_sum,
    masked_var,
    moment_sums,
    moments_from_sums,
    whiten,
)

MASK = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 0, 0, 0], [0, 1, 0, 1, 1]], dtype=torch.bool)


def _values() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, 5, generator=generator, dtype=torch.float64) * 3 + 1
    return x.masked_fill(~MASK, torch.nan)


@pytest.mark.parametrize("mask", [MASK, MASK.float()])
def test_reductions_match_numpy_and_ignore_nan_in_padding(mask: torch.Tensor) -> None:
    x = _values()
    kept = x[MASK].numpy()
    assert masked_sum(x, mask).item() == pytest.approx(kept.sum(), abs=1e-12)
    assert masked_mean(x, mask).item() == pytest.approx(kept.mean(), abs=1e-12)
    assert masked_var(x, mask).item() == pytest.approx(np.var(kept, ddof=1), abs=1e-12)
    rows = [x[i][MASK[i]].mean().item() for i in range(3)]
    assert masked_mean(x, mask, dim=1).tolist() == pytest.approx(rows)


def test_gradient_of_a_masked_sum_is_the_mask_even_beside_nan() -> None:
    x = _values().requires_grad_()
    masked_sum(x, MASK).backward()
    torch.testing.assert_close(x.grad, MASK.double(), atol=0, rtol=0)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten_uses_the_bessel_corrected_variance(shift_mean: bool) -> None:
    x = _values()
    kept = x[MASK].numpy()
    expected = (kept - kept.mean()) / np.sqrt(np.var(kept, ddof=1) + 1e-8)
    expected = expected if shift_mean else expected + kept.mean()
    whitened = whiten(x, MASK, shift_mean=shift_mean)
    np.testing.assert_allclose(whitened[MASK].numpy(), expected, atol=1e-12)
    assert (whitened[~MASK] == 0).all()


def test_whitening_by_hand() -> None:
    # Mean 2, squared deviations 1 + 1 + 0 over n - 1 = 2: variance 1.
    x = torch.tensor([[1.0, 99.0, 3.0, 2.0]])
    mask = torch.tensor([[1, 0, 1, 1]])
    assert whiten(x, mask).tolist()[0] == pytest.approx([-1.0, 0.0, 1.0, 0.0])
    assert whiten(x + 10, mask, shift_mean=False).tolist()[0] == pytest.approx([11, 0, 13, 12])


def test_moments_added_over_parts_whiten_like_the_whole() -> None:
    x = _values().float() + 1000.0  # a mean far from zero: sums of squares must not lose digits
    sums = sum((moment_sums(x[i : i + 1], MASK[i : i + 1]) for i in range(3)), torch.zeros(3))
    sums = sums + moment_sums(x[:1], torch.zeros_like(MASK[:1]))  # a rank with nothing but padding
    moments = moments_from_sums(sums)
    assert moments[1].item() == pytest.approx(masked_var(x.double(), MASK).item(), rel=1e-9)
    parts = [whiten(x[i : i + 1], MASK[i : i + 1], moments=moments) for i in range(3)]
    torch.testing.assert_close(torch.cat(parts), whiten(x, MASK), atol=1e-4, rtol=1e-4)


def test_a_single_value_whitens_to_zero_and_nothing_stays_nothing() -> None:
    x = torch.tensor([[5.0, 7.0]])
    assert whiten(x, torch.tensor([[0, 1]])).tolist() == [[0.0, 0.0]]
    assert whiten(x, torch.tensor([[0, 1]]), shift_mean=False).tolist() == [[0.0, 7.0]]
    assert whiten(x, torch.zeros(1, 2)).tolist() == [[0.0, 0.0]]
    mean, var = moments_from_sums(torch.zeros(3, dtype=torch.float64))
    assert (mean.item(), var.item()) == (0.0, 0.0)


def test_last_valid_index_skips_trailing_padding_and_holes() -> None:
    mask = torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
    assert last_valid_index(mask).tolist() == [2, 3, 0, 0]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        # Rows sum to 6 (2 tokens) and 12 (3 tokens).
        ("token-mean", 18 / 5),
        ("seq-mean-token-mean", (3 + 4) / 2),
        ("seq-mean-token-sum", 18 / 2),
        ("seq-mean-token-sum-norm", 18 / 2 / 8),
    ],
)
def test_aggregation_by_hand(mode: Aggregation, expected: float) -> None:
    losses = torch.tensor([[2.0, 50.0, 4.0], [3.0, 4.0, 5.0]])
    mask = torch.tensor([[1, 0, 1], [1, 1, 1]])
    denominator = 5 if mode == "token-mean" else 2
    assert aggregate(losses, mask, mode, denominator, 8).item() == pytest.approx(expected)


def test_aggregation_refuses_what_has_no_meaning() -> None:
    losses, mask = torch.ones(2, 3), torch.ones(2, 3)
    with pytest.raises(ValueError, match="positive"):
        aggregate(losses, mask, "token-mean", 0)
    with pytest.raises(ValueError, match="max_length"):
        aggregate(losses, mask, "seq-mean-token-sum-norm", 2)
    with pytest.raises(ValueError, match="unknown aggregation 'mean'"):
        aggregate(losses, mask, "mean", 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"losses has shape \(3,\) where \(3, 3\)"):
        aggregate(torch.ones(3), torch.ones(3, 3), "token-mean", 3)


def test_a_part_without_tokens_adds_zero_and_keeps_the_graph() -> None:
    losses = torch.ones(2, 3, requires_grad=True)
    for mode in get_args(Aggregation):
        loss = aggregate(losses * 2, torch.zeros(2, 3), mode, 7, max_length=4)
        assert loss.item() == 0.0
        loss.backward()
    torch.testing.assert_close(losses.grad, torch.zeros(2, 3), atol=0, rtol=0)
