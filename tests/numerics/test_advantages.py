"""Advantage estimators against their definitions, written as slow loops, and by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cluster.contracts.registry import ADVANTAGE_ESTIMATORS
from learner.algorithms.advantages import (
    ESTIMATORS,
    AdvantageInputs,
    Advantages,
    compute_advantages,
    discounted_returns,
    gae,
    grpo,
    rloo,
    terminal_rewards,
)

PerSequence = Callable[[Tensor, Tensor], Tensor]

HOLES = torch.tensor(
    [[1, 1, 1, 1, 1, 1], [1, 0, 0, 1, 1, 0], [0, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]],
    dtype=torch.bool,
)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _gae_by_double_sum(
    rewards: list[float], values: list[float], gamma: float, lam: float, bootstrap: float
) -> list[float]:
    """A_t = sum over k of (gamma lam)^k delta_{t+k}, on a sequence without holes."""
    after = [*values, bootstrap][1:]
    deltas = [r + gamma * n - v for r, n, v in zip(rewards, after, values, strict=True)]
    return [
        sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas)))
        for t in range(len(deltas))
    ]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.97, 0.0)])
@pytest.mark.parametrize("with_bootstrap", [False, True])
def test_gae_is_the_double_sum_over_set_positions(
    gamma: float, lam: float, with_bootstrap: bool
) -> None:
    rewards, values = _random(4, 6, seed=1), _random(4, 6, seed=2)
    bootstrap = _random(4, seed=3) if with_bootstrap else None
    rewards[~HOLES], values[~HOLES] = torch.nan, torch.nan
    advantages, returns = gae(rewards, values, HOLES, gamma, lam, bootstrap)
    for b in range(4):
        keep = HOLES[b]
        last = 0.0 if bootstrap is None else bootstrap[b].item()
        kept_values = values[b][keep].tolist()
        expected = _gae_by_double_sum(rewards[b][keep].tolist(), kept_values, gamma, lam, last)
        np.testing.assert_allclose(advantages[b][keep].numpy(), expected, atol=1e-12)
        np.testing.assert_allclose(
            returns[b][keep].numpy(), np.add(expected, kept_values), atol=1e-12
        )
    assert (advantages[~HOLES] == 0).all()
    assert (returns[~HOLES] == 0).all()


def test_gae_by_hand() -> None:
    # t=1: delta 1 + 0 - .5 = .5; t=0: delta 0 + .5 * .5 - 1 = -.75, A = -.75 + .25 * .5 = -.625.
    rewards = torch.tensor([[0.0, 7.0, 1.0]])
    values = torch.tensor([[1.0, 9.0, 0.5]])
    mask = torch.tensor([[1, 0, 1]])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[-0.625, 0.0, 0.5]]
    assert returns.tolist() == [[0.375, 0.0, 1.0]]
    # A bootstrap of 2 adds gamma * 2 = 1 to the last delta.
    advantages, _ = gae(rewards, values, mask, 0.5, 0.5, bootstrap=torch.tensor([2.0]))
    assert advantages.tolist() == [[-0.375, 0.0, 1.5]]


def test_a_perfect_critic_leaves_no_advantage() -> None:
    rewards = torch.tensor([[0.0, 0.0, 3.0]])
    values = torch.full((1, 3), 3.0)
    advantages, returns = gae(rewards, values, torch.ones(1, 3), 1.0, 0.95)
    assert advantages.tolist() == [[0.0, 0.0, 0.0]]
    assert returns.tolist() == [[3.0, 3.0, 3.0]]


def test_gae_does_not_depend_on_padding_width() -> None:
    rewards, values = _random(4, 6, seed=1), _random(4, 6, seed=2)
    wide = [torch.nn.functional.pad(x, (0, 5), value=4.0) for x in (rewards, values)]
    mask = torch.nn.functional.pad(HOLES, (0, 5))
    bootstrap = _random(4, seed=3)
    for narrow, padded in zip(
        gae(rewards, values, HOLES, 0.9, 0.8, bootstrap),
        gae(wide[0], wide[1], mask, 0.9, 0.8, bootstrap),
        strict=True,
    ):
        assert torch.equal(narrow, padded[:, :6])


def test_discounted_returns_by_hand() -> None:
    rewards = torch.tensor([[1.0, 50.0, 2.0, 4.0]])
    found = discounted_returns(rewards, torch.tensor([[1, 0, 1, 1]]), 0.5)
    assert found.tolist() == [[1 + 1 + 1, 0.0, 2 + 2, 4.0]]


def test_the_score_goes_to_the_last_set_token() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1]])
    kl = torch.tensor([[1.0, 2.0, 9.0, 9.0], [1.0, 9.0, -2.0, 9.0], [0.0, 1.0, 0.0, 4.0]])
    rewards = terminal_rewards(torch.tensor([10.0, -1.0, 5.0]), kl, mask, kl_coef=0.5)
    assert rewards.tolist() == [
        [-0.5, 9.0, 0.0, 0.0],
        [-0.5, 0.0, 0.0, 0.0],
        [0.0, -0.5, 0.0, 3.0],
    ]


def test_a_score_without_a_token_is_refused_and_an_empty_row_is_not() -> None:
    mask = torch.tensor([[1, 1], [0, 0]])
    kl = torch.ones(2, 2)
    assert terminal_rewards(torch.tensor([3.0, 0.0]), kl, mask, 1.0).tolist() == [[-1, 2], [0, 0]]
    with pytest.raises(ValueError, match=r"rows \[1\] have a score but no response token"):
        terminal_rewards(torch.tensor([3.0, 1.0]), kl, mask, 1.0)


GROUPS = torch.tensor([7, 3, 7, 7, 3, 11, 3])
SCORES = torch.tensor([1.0, 0.0, 2.0, 6.0, -1.0, 4.0, 4.0], dtype=torch.float64)


def test_grpo_and_rloo_against_numpy_group_by_group() -> None:
    scaled, centred = grpo(SCORES, GROUPS), grpo(SCORES, GROUPS, scale_by_std=False)
    left_out = rloo(SCORES, GROUPS)
    for group in (3, 7):
        member = group == GROUPS
        values = SCORES[member].numpy()
        deviation = values - values.mean()
        expected = deviation / (np.std(values, ddof=1) + 1e-6)
        np.testing.assert_allclose(scaled[member].numpy(), expected, atol=1e-12)
        np.testing.assert_allclose(centred[member].numpy(), deviation, atol=1e-12)
        others = [np.delete(values, i).mean() for i in range(len(values))]
        np.testing.assert_allclose(left_out[member].numpy(), values - others, atol=1e-12)


@pytest.mark.parametrize("estimator", [grpo, rloo])
def test_advantages_of_a_group_sum_to_zero(estimator: PerSequence) -> None:
    advantages = estimator(SCORES, GROUPS)
    for group in (3, 7):
        assert advantages[group == GROUPS].sum().item() == pytest.approx(0.0, abs=1e-12)


def test_a_group_of_one_keeps_its_score() -> None:
    alone = GROUPS == 11
    assert grpo(SCORES, GROUPS)[alone].item() == pytest.approx(4.0 / (1 + 1e-6), abs=1e-12)
    assert grpo(SCORES, GROUPS, scale_by_std=False)[alone].item() == 4.0
    assert rloo(SCORES, GROUPS)[alone].item() == 4.0


@pytest.mark.parametrize("score", [0.1, 1e6 / 3, -0.7])
def test_equal_scores_give_no_advantage_in_float32(score: float) -> None:
    # 1e-6 in the denominator turns any rounding of the mean into a made-up advantage.
    scores = torch.full((7,), score)
    groups = torch.zeros(7, dtype=torch.int64)
    assert grpo(scores, groups).abs().max() < 1e-3
    assert rloo(scores, groups).abs().max() < 1e-6


@pytest.mark.parametrize("estimator", [grpo, rloo])
def test_group_estimators_do_not_depend_on_row_order(estimator: PerSequence) -> None:
    order = torch.tensor([4, 0, 6, 2, 5, 1, 3])
    shuffled = estimator(SCORES[order], GROUPS[order])
    torch.testing.assert_close(shuffled, estimator(SCORES, GROUPS)[order])


def _inputs(rewards: Tensor, mask: Tensor, **more: Tensor) -> AdvantageInputs:
    given: dict[str, Any] = {
        "rewards": rewards,
        "mask": mask,
        "group_ids": torch.tensor([0, 0, 1, 1]),
        "scores": torch.zeros(4),
        "gamma": 0.9,
        "lam": 0.8,
    }
    return AdvantageInputs(**{**given, **more})


def _compute(name: str, inputs: AdvantageInputs, **more: Any) -> Advantages:
    """As a method does by definition."""
    whitens = ADVANTAGE_ESTIMATORS[name].whitens
    return compute_advantages(ESTIMATORS[name], inputs, **{"whitened": whitens, **more})


def test_every_estimator_can_be_called_in_one_way() -> None:
    mask = HOLES.clone()
    mask[3, :2] = True
    rewards, values = _random(4, 6, seed=4), _random(4, 6, seed=5)
    assert list(ESTIMATORS) == list(ADVANTAGE_ESTIMATORS)
    for name in ESTIMATORS:
        estimator = ADVANTAGE_ESTIMATORS[name]
        found = _compute(name, _inputs(rewards, mask, values=values))
        assert found.advantages.shape == (4, 6)
        assert (found.advantages[~mask] == 0).all()
        assert (found.returns is not None) == estimator.needs_values
        kept = found.advantages[mask].numpy()
        is_white = abs(kept.mean()) < 1e-9 and abs(np.std(kept, ddof=1) - 1) < 1e-6
        assert is_white == estimator.whitens, name


def test_whitening_can_be_overridden_and_leaves_returns_alone() -> None:
    rewards, values = _random(4, 6, seed=4), _random(4, 6, seed=5)
    inputs = _inputs(rewards, HOLES, values=values)
    raw, raw_returns = gae(rewards, values, HOLES, 0.9, 0.8)
    off = _compute("gae", inputs, whitened=False)
    on = _compute("gae", inputs)
    assert torch.equal(off.advantages, raw)
    assert not torch.allclose(on.advantages, raw)
    for found in (on, off):
        assert found.returns is not None
        assert torch.equal(found.returns, raw_returns)


def test_sequence_estimators_spread_the_summed_reward_over_the_response() -> None:
    mask = torch.tensor([[1, 0, 1], [1, 1, 0], [1, 1, 1], [0, 1, 0]])
    kl = torch.zeros(4, 3)
    kl[0, 0] = 2.0
    rewards = terminal_rewards(torch.tensor([4.0, 1.0, 5.0, 9.0]), kl, mask, kl_coef=0.5)
    found = _compute("rloo", _inputs(rewards, mask)).advantages
    # Totals 3 and 1, 5 and 9: leave-one-out differences +-2 and +-4.
    assert found.tolist() == [[2, 0, 2], [-2, -2, 0], [-4, -4, -4], [0, 4, 0]]


@pytest.mark.parametrize("name", ["reinforce++", "reinforce-baseline", "gae"])
def test_whitening_is_global_over_ranks(name: str) -> None:
    rewards, values = _random(4, 6, seed=4), _random(4, 6, seed=5)
    whole = _compute(name, _inputs(rewards, HOLES, values=values)).advantages
    halves = [
        AdvantageInputs(
            rewards=rewards[rows],
            mask=HOLES[rows],
            group_ids=torch.zeros(2, dtype=torch.int64),
            scores=torch.zeros(2),
            values=values[rows],
            gamma=0.9,
            lam=0.8,
        )
        for rows in (slice(0, 2), slice(2, 4))
    ]
    sums: list[Tensor] = []

    def remember(mine: Tensor) -> Tensor:
        sums.append(mine)
        return mine

    for half in halves:
        _compute(name, half, add_over_ranks=remember)
    total = sums[0] + sums[1]
    parts = [_compute(name, h, add_over_ranks=lambda _: total).advantages for h in halves]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-9, rtol=0)


def test_bad_requests_are_refused() -> None:
    rewards = torch.zeros(4, 6)
    with pytest.raises(ValueError, match="needs values"):
        _compute("gae", _inputs(rewards, HOLES))
    with pytest.raises(ValueError, match="rewards has shape"):
        _compute("rloo", _inputs(rewards[:, :5], HOLES))
    with pytest.raises(ValueError, match="group_ids has shape"):
        grpo(torch.zeros(4), torch.zeros(3, dtype=torch.int64))


def test_a_kl_in_the_reward_leaves_the_standard_deviation_to_the_scores() -> None:
    """Scores 1 and 3 have the standard deviation sqrt(2); KL penalties are centred, not divided."""
    mask = torch.ones(4, 2, dtype=torch.bool)
    penalties = torch.tensor([[-0.1, -0.1], [-0.3, -0.1], [0.0, -0.2], [0.0, 0.0]])
    scores = torch.tensor([1.0, 3.0, 5.0, 5.0])
    rewards = penalties.clone()
    rewards[:, -1] += scores
    inputs = _inputs(rewards, mask, scores=scores, penalties=penalties)
    found = ESTIMATORS["grpo"](inputs).advantages
    half = 1.0 / (2.0**0.5 + 1e-6)
    expected = torch.tensor([-half + 0.1, half - 0.1, -0.1, 0.1])
    torch.testing.assert_close(found, expected[:, None].expand(4, 2), atol=1e-6, rtol=0)
    dr = ESTIMATORS["grpo"](inputs, scale_by_std=False).advantages
    torch.testing.assert_close(dr[:, 0], torch.tensor([-0.9, 0.9, -0.1, 0.1]))
