"""Rounding to 8 bits, by hand. That an engine computes with it is shown with vLLM itself."""

from __future__ import annotations

import pytest
import torch

from actors.engines import eight_bits
from cluster.contracts.errors import UserError


def test_a_row_by_hand() -> None:
    matrix = torch.tensor([[127.0, -63.5, 0.4], [0.0, 0.0, 0.0], [-1e-3, 5e-4, 1e-3]])
    numbers, scales = eight_bits.quantised(matrix, "int8")
    assert numbers.dtype == torch.int8
    assert scales.shape == (3, 1)
    assert scales.dtype == torch.float32
    assert numbers[0].tolist() == [127, -64, 0]
    assert numbers[1].tolist() == [0, 0, 0]
    assert numbers[2].tolist() == [-127, 64, 127]


@pytest.mark.parametrize(("kind", "step"), [("int8", 1 / 127), ("fp8", 32 / 448)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_number_is_within_half_a_step(kind: str, step: float, dtype: torch.dtype) -> None:
    matrix = torch.randn(40, 300, generator=torch.Generator().manual_seed(1)).to(dtype)
    numbers, scales = eight_bits.quantised(matrix, kind)
    apart = (numbers.float() * scales - matrix.float()).abs()
    largest = matrix.float().abs().amax(1, keepdim=True)
    assert bool((apart <= 0.5001 * step * largest).all())


def test_matrices_become_two_tensors_and_the_rest_stays() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    rounded = eight_bits.matrices(model, head="1")
    assert rounded == {"0.weight"}
    stored = dict(eight_bits.as_stored(model.named_parameters(), "int8", rounded))
    assert list(stored) == ["0.weight", "0.weight_scale", "0.bias", "1.weight", "1.bias"]
    assert stored["0.weight"].dtype == torch.int8
    assert stored["1.weight"] is model[1].weight


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(UserError, match="has no linear layers"):
        eight_bits.matrices(torch.nn.Sequential(torch.nn.Conv1d(2, 2, 1)), head="")
