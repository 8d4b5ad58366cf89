"""AdamW whose moments lie on the host or in eight bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from learner.compute import lean_adamw
from learner.compute.lean_adamw import LeanAdamW, in_float32
from learner.compute.optimizer import make_optimizer

STEPS = 30
Trained = tuple[list[torch.nn.Parameter], torch.optim.Optimizer]


def train(steps: int = STEPS, start: dict[str, Any] | None = None, **how: bool) -> Trained:
    """A noisy pull of a matrix and a vector towards a target."""
    draw = torch.Generator().manual_seed(0)
    matrix, target = (torch.randn(96, 256, generator=draw) * 0.02 for _ in range(2))
    params = [torch.nn.Parameter(matrix.clone()), torch.nn.Parameter(torch.ones(64))]
    optimizer = make_optimizer(params, 1e-3, (0.9, 0.95), 1e-8, 0.1, **how)
    if start is not None:
        optimizer.load_state_dict(start)
    for step in range(steps):
        noise = torch.randn(96, 256, generator=torch.Generator().manual_seed(step)) * 0.01
        params[0].grad = params[0].detach() - target + noise
        params[1].grad = params[1].detach() * 0.1
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("piece", [1 << 24, 1024])
def test_moments_on_the_host_change_nothing(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(lean_adamw, "_PIECE", piece)
    expected, _ = train()
    params, optimizer = train(on_host=True)
    assert isinstance(optimizer, LeanAdamW)
    for ours, theirs in zip(params, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-7)
    assert float(optimizer.state[params[0]]["step"]) == STEPS


def test_the_moments_of_one_kind_of_adamw_go_on_in_another() -> None:
    half, half_state = train(10)
    for kind in ({}, {"on_host": True}):
        _, again = train(0, half_state.state_dict(), **kind)
        for ours, theirs in zip(again.state.values(), half_state.state.values(), strict=True):
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert len(half) == 2


@pytest.mark.torchao
@pytest.mark.parametrize("how", [{}, {"on_host": True}])
@pytest.mark.parametrize("piece", [1 << 24, 1024])
def test_moments_in_eight_bits_lead_almost_to_the_same_place(
    monkeypatch: pytest.MonkeyPatch, how: dict[str, bool], piece: int
) -> None:
    monkeypatch.setattr(lean_adamw, "_PIECE", piece)
    start, expected = train(0)[0][0], train()[0]
    params, optimizer = train(eight_bits=True, **how)
    moved = float((expected[0] - start).detach().norm())
    # Measured: 1.4 %.
    assert float((params[0] - expected[0]).detach().norm()) < 0.03 * moved
    assert torch.allclose(params[1], expected[1], atol=1e-7)  # too small to be rounded
    state = optimizer.state[params[0]]
    assert _bytes(state["exp_avg"]) + _bytes(state["exp_avg_sq"]) < 2.1 * params[0].numel()


@pytest.mark.torchao
def test_a_moment_that_was_rounded_once_is_not_changed_by_a_checkpoint_in_float32() -> None:
    _, optimizer = train(eight_bits=True)
    saved = optimizer.state_dict()
    plain = {
        key: {name: in_float32(value).clone() for name, value in row.items()}
        for key, row in saved["state"].items()
    }
    groups = saved["param_groups"]
    _, again = train(0, {"state": plain, "param_groups": groups}, eight_bits=True)
    for ours, theirs in zip(again.state.values(), optimizer.state.values(), strict=True):
        for name, value in theirs.items():
            assert torch.equal(in_float32(ours[name]), in_float32(value)), name


def _bytes(moment: Any) -> int:
    parts: list[Tensor] = [moment.codes, moment.scale]
    return sum(part.nbytes for part in parts)
