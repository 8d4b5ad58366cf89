"""Weights in 8 bits: what becomes of an update, and how a Hugging Face config says so.

Rows (output channels) are scaled by their largest number: round to nearest, symmetric. That is the
W8A8 layout of "compressed-tensors", which vLLM reads; activations are scaled token by token as they
come.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from cluster.contracts.errors import UserError

TYPES = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}
"""Number type of the matrices, and its largest number."""
SCALE = "_scale"  # vLLM's name of the scales: the weight's, with this at the end
Named = Iterable[tuple[str, Tensor]]


def quantization_config(kind: str, head: str) -> dict[str, Any]:
    """The `quantization_config` of a Hugging Face config, as "compressed-tensors" writes it.

    head: name of the output layer, which stays as it is: its errors would go straight into the
    probabilities.
    """
    numbers = "int" if kind == "int8" else "float"
    common = {"num_bits": 8, "type": numbers, "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**common, "strategy": "channel", "dynamic": False},
        "input_activations": {**common, "strategy": "token", "dynamic": True},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if kind == "int8" else "float-quantized",
        "quantization_status": "compressed",
        "ignore": [head],
        "config_groups": {"group_0": group},
    }


def matrices(model: torch.nn.Module, head: str) -> frozenset[str]:
    """Names of the weights that are rounded, of a Hugging Face model (which may lie on meta).

    Raises UserError where the model has none: its layers are of a kind of their own.
    """
    found = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != head
    }
    if not found:
        raise UserError(
            f"{type(model).__name__} has no linear layers that an engine could hold in 8 bits",
            where="rollout.quantization",
            fix="set rollout.quantization = 'none'",
        )
    return frozenset(found)


def as_stored(
    tensors: Iterable[tuple[str, Tensor]], kind: str, rounded: frozenset[str]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an update as the engine stores them, one after the other."""
    for name, tensor in tensors:
        if name not in rounded:
            yield name, tensor
            continue
        numbers, scales = quantised(tensor, kind)
        yield name, numbers
        yield name + SCALE, scales


def quantised(matrix: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """([out, in] in 8 bits, [out, 1] float32 scales): ``numbers * scales`` is the matrix, each
    number to within half a step of its row."""
    dtype, largest = TYPES[kind]
    exact = matrix.float()
    # A row of zeros has no scale; any will do.
    scales = (exact.abs().amax(1, keepdim=True) / largest).clamp_min(
        torch.finfo(torch.float32).tiny
    )
    numbers = (exact / scales).clamp(-largest, largest)
    return (numbers.round() if dtype == torch.int8 else numbers).to(dtype), scales
