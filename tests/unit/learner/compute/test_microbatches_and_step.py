"""Microbatches, padding, schedules, and the one optimiser step."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from cluster.contracts.errors import Fatal
from cluster.contracts.metrics import mean
from learner.compute.microbatches import pad_array, pad_rows, plan_microbatches, token_row
from learner.compute.optimizer import lr_factor, make_optimizer, set_lr
from learner.compute.optimizer_step import SkipCounter, optimiser_step


def test_every_row_is_planned_once_within_the_budget() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 60, size=200).tolist()
    plan = plan_microbatches(lengths, 100)
    assert sorted(i for part in plan for i in part) == list(range(200))
    for part in plan:
        assert len(part) * max(lengths[i] for i in part) <= 100
    padded = sum(len(part) * max(lengths[i] for i in part) for part in plan)
    assert padded < 1.15 * sum(lengths)


def test_a_row_over_the_budget_is_alone() -> None:
    assert plan_microbatches([5, 500, 6], 12) == [[1], [2, 0]]
    assert plan_microbatches([], 12) == []


def test_padding_is_right_and_positions_count_real_tokens() -> None:
    rows = pad_rows([token_row([7, 8, 9], [True, False, True]), token_row([5], [True])], pad_id=3)
    assert rows.input_ids.tolist() == [[7, 8, 9], [5, 3, 3]]
    assert rows.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert rows.position_ids.tolist() == [[0, 1, 2], [0, 0, 0]]
    # Nothing predicts a first token.
    assert rows.loss_mask.tolist() == [[False, False, True], [False, False, False]]


def test_numbers_of_a_response_stand_at_its_tokens() -> None:
    values = [np.array([1.0, 2.0]), np.array([3.0])]
    placed = pad_array(values, 4, 0.0, torch.float32, starts=[1, 3])
    assert placed.tolist() == [[0, 1, 2, 0], [0, 0, 0, 3]]
    with pytest.raises(ValueError, match="over the width"):
        pad_array(values, 2, 0.0, torch.float32, starts=[1, 0])


def test_schedules() -> None:
    assert [lr_factor("constant", s, 10, 4) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert [lr_factor("linear", s, 4, 0) for s in range(4)] == [1.0, 0.75, 0.5, 0.25]
    assert lr_factor("cosine", 5, 10, 0) == pytest.approx(0.5)
    assert lr_factor("cosine", 0, 10, 0) == 1.0
    assert lr_factor("linear", 99, 4, 0) == 0.25
    with pytest.raises(ValueError, match="unknown schedule"):
        lr_factor("square", 1, 2, 0)  # type: ignore[arg-type]


def test_norms_and_biases_do_not_decay_and_tied_weights_count_once() -> None:
    layer = nn.Linear(3, 2)
    optimizer = make_optimizer([*layer.parameters(), layer.weight], 0.1, (0.9, 0.99), 1e-8, 0.5)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1]
    assert set_lr(optimizer, 0.5) == pytest.approx(0.05)


def quadratic(weight: nn.Parameter, targets: list[float], scale: float = 1.0):  # type: ignore[no-untyped-def]
    def call(target: float):  # type: ignore[no-untyped-def]
        loss = scale * (weight - target).square().sum() / len(targets)
        return loss, [mean("m", target, 1)]

    return [lambda target=target: call(target) for target in targets]


def step_on(weight: nn.Parameter, calls, skips: SkipCounter, clip: float = 1e9):  # type: ignore[no-untyped-def]
    optimizer = torch.optim.SGD([weight], lr=0.1)
    return optimiser_step(optimizer, [weight], calls, clip, skips)


def test_a_step_adds_up_microbatches_and_clips() -> None:
    weight = nn.Parameter(torch.zeros(1))
    outcome = step_on(weight, quadratic(weight, [1.0, 3.0]), SkipCounter())
    assert outcome.grad_norm == pytest.approx(4.0)  # 2 * (0 - 2)
    assert outcome.loss == pytest.approx(5.0)
    assert weight.item() == pytest.approx(0.4)
    assert [m.value for m in outcome.metrics] == [2.0]
    clipped = nn.Parameter(torch.zeros(1))
    step_on(clipped, quadratic(clipped, [1.0, 3.0]), SkipCounter(), clip=1.0)
    assert clipped.item() == pytest.approx(0.1, rel=1e-4)
    assert weight.grad is None


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing_and_the_third_is_fatal(scale: float) -> None:
    weight, skips = nn.Parameter(torch.ones(1)), SkipCounter()
    bad = quadratic(weight, [0.0], scale)
    assert "loss is" in str(step_on(weight, bad, skips).skipped)
    step_on(weight, quadratic(weight, [0.0]), skips)
    moved = weight.item()
    assert moved != 1.0
    step_on(weight, bad, skips)
    step_on(weight, bad, skips)
    assert weight.item() == moved
    with pytest.raises(Fatal, match="3 optimiser steps in a row"):
        step_on(weight, bad, skips)
    assert skips.total == 4


def test_a_finite_loss_with_a_gradient_that_is_not_finite_is_skipped() -> None:
    weight, skips = nn.Parameter(torch.zeros(1)), SkipCounter()
    outcome = step_on(weight, [lambda: (weight.sqrt().sum(), [])], skips)
    assert "gradient norm" in str(outcome.skipped)
    assert weight.item() == 0.0
