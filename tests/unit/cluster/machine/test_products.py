"""Measuring matrix products leaves torch as it was, and says what it measured."""

from __future__ import annotations

import time

import pytest
import torch

from cluster.machine.products import LARGEST, Products, measure_products


def test_each_type_has_a_speed_and_torch_is_as_before() -> None:
    before = (torch.get_num_threads(), torch.get_float32_matmul_precision())
    found = measure_products(24, 40, 4000)
    assert (found.rows, found.inner, found.outer) == (24, 40, LARGEST)
    assert found.float32 > 0
    assert found.bfloat16 > 0
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == before
    assert not torch.is_inference_mode_enabled()


def test_a_shape_is_measured_once() -> None:
    assert measure_products(24, 40, 48) is measure_products(24, 40, 48)


def test_the_gain_is_that_of_the_slower_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A type that takes half of the time is twice as fast, whatever the machine does meanwhile."""
    ticks, type_of_call = [0.0], []
    linear = torch.nn.functional.linear

    def slow(x: torch.Tensor, weight: torch.Tensor, *bias: torch.Tensor) -> torch.Tensor:
        type_of_call.append(weight.dtype)
        ticks[0] += 0.002 if weight.dtype == torch.float32 else 0.001
        return linear(x, weight, *bias)

    monkeypatch.setattr(time, "thread_time", lambda: ticks[0])
    monkeypatch.setattr(torch.nn.functional, "linear", slow)
    found = measure_products(16, 24, 32)
    assert found.gain == pytest.approx(2.0)
    assert found.float32 == pytest.approx(2e-9 * 16 * 24 * 32 / 0.002)
    assert set(type_of_call) == {torch.float32, torch.bfloat16}


def test_it_is_said_in_one_line() -> None:
    found = Products(rows=64, inner=128, outer=384, float32=98.4, bfloat16=190.2)
    assert found.describe() == (
        "bfloat16 is 1.93 times as fast on a core ([64, 128] x [128, 384]: 190 GFLOP/s, 98 in "
        "float32)"
    )
