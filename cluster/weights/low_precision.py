"""Weights of a frozen base in 8 or 4 bits, and the numbers that they then stand for.

8bit: int8 with a scale for each row (torchao's weight-only quantisation). 4bit: NF4 of QLoRA
(Dettmers et al. 2023, arXiv:2305.14314), blocks of 64 numbers, whose scales are int8 themselves.

Learner and workers quantise the same weights by the same function, so that a worker merges an
adapter into the numbers that the learner computed with.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cluster.contracts.errors import UserError

Precision = Literal["full", "8bit", "4bit"]

_BLOCK = 64
_SCALES = (256, 64, 16, 4, 1)  # scales that share a scale of their own; the most that fit


@torch.no_grad()
def quantised(weight: Tensor, precision: Precision) -> Tensor:
    """[out, in] in bfloat16 or float32 -> a tensor that `torch.nn.functional.linear` takes in its
    place, with gradients of the input. Raises UserError for a shape that has no 4-bit form, and
    without torchao."""
    if precision == "full":
        return weight
    with _quiet():
        try:
            return _int8(weight) if precision == "8bit" else _nf4(weight)
        except ImportError as problem:
            raise UserError(
                f"a base in {precision} needs torchao, which is not installed",
                where="lora.base",
                fix="uv pip install --no-deps -r requirements/quantised.txt, or set "
                "lora.base = 'full'",
            ) from problem


@torch.no_grad()
def plain(tensor: Tensor) -> Tensor:
    """The numbers that a quantised tensor stands for, in its own type; another one as it is."""
    if hasattr(tensor, "get_original_weight"):  # NF4
        return tensor.get_original_weight()
    if type(tensor).__module__.startswith("torchao."):
        return tensor.dequantize()
    return tensor


def round_trip(weight: Tensor, precision: Precision) -> Tensor:
    """What `weight` becomes by being held in `precision`."""
    return plain(quantised(weight, precision))


def pieces(tensor: Tensor) -> list[Tensor]:
    """The tensors with memory of their own that a quantised one is made of; another one itself."""
    if not type(tensor).__module__.startswith("torchao."):
        return [tensor]
    held: Any = tensor
    names, _ = held.__tensor_flatten__()
    return [piece for name in names for piece in pieces(getattr(held, name))]


def held_bytes(tensor: Tensor) -> int:
    """Bytes that the tensor takes, with the scales of a quantised one."""
    return sum(piece.numel() * piece.element_size() for piece in pieces(tensor))


def _int8(weight: Tensor) -> Tensor:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    # torchao quantises modules; this one lends it the weight.
    holder = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    holder.weight = nn.Parameter(weight.detach(), requires_grad=False)
    quantize_(holder, Int8WeightOnlyConfig())
    return holder.weight.data


def _nf4(weight: Tensor) -> Tensor:
    from torchao.quantization import to_nf4

    blocks, rest = divmod(weight.numel(), _BLOCK)
    if rest:
        raise UserError(
            f"a weight of shape {tuple(weight.shape)} does not divide into blocks of {_BLOCK} "
            "numbers, so it has no 4-bit form",
            where="lora.base",
            fix="set lora.base = '8bit'",
        )
    shared = next(count for count in _SCALES if blocks % count == 0)
    tensor: Any = to_nf4(weight.detach(), block_size=_BLOCK, scaler_block_size=shared)
    return tensor


@contextmanager
def _quiet() -> Iterator[None]:
    """torchao warns of kernels that were made for other machines."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)
