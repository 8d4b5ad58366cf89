"""Digests by which an engine proves that the weights it computes with are the published ones.

Two kinds. `number_sum` depends on the numbers alone, not on their order: it is the same for a
published q, k and v and for the one tensor into which an engine fuses them. `fingerprint` depends
on every byte, and on where it lies: it compares two sets of weights of the same layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from cluster.contracts.devices import NUMBERS_HASHED
from cluster.contracts.errors import WeightMismatch
from cluster.weights.manifest import checksums

_SQUARE, _PLAIN = 0x9E3779B97F4A7C14, 0xC2B2AE3D27D4EB4F  # even and odd, see `number_sum`


def number_sum(tensors: Iterable[torch.Tensor]) -> int:
    """Sum modulo 2^64 of x * (a * x + b) over the bits x of all numbers, computed where they lie.

    Equal for two sets that hold the same numbers, however they are cut, joined, padded with zeros
    or ordered. With a even and b odd, another bit in one number always changes it: the difference
    is (x - y) * (a * (x + y) + b), and the second factor is odd.
    Numbers count as float32, which holds every bfloat16 and float16 exactly.
    """
    total = 0
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        for part in flat.split(NUMBERS_HASHED.on(flat.device)):
            wide = _wide_bits(part)
            plain = int(wide.sum())
            wide *= wide
            total += _SQUARE * int(wide.sum()) + _PLAIN * plain
    return total % (1 << 64)


class NumberSum:
    """The `number_sum` of tensors that are gone through once."""

    def __init__(self) -> None:
        self.total = 0

    def of(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The same tensors, each added up before it is handed on."""
        for name, tensor in tensors:
            self.total = (self.total + number_sum([tensor])) % (1 << 64)
            yield name, tensor


def _wide_bits(part: torch.Tensor) -> Any:
    """The bits of each number as an int64 in fresh memory; numpy's on a CPU, where it is twice as
    fast as torch's."""
    bits = part.float().view(torch.int32) if part.is_floating_point() else part
    return (
        bits.numpy().astype(np.int64)
        if bits.device.type == "cpu"
        else bits.to(torch.int64, copy=True)
    )


def fingerprint(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Name -> checksum of the tensor's bytes in order, computed where it lies."""
    held: dict[str, Any] = {}
    for name, tensor in tensors.items():
        flat = tensor.detach().reshape(-1)
        if flat.device.type == "cpu":  # numpy has no bfloat16; the bytes will do
            held[name] = flat.contiguous().view(torch.uint8).numpy()
        else:
            held[name] = flat
    return checksums(held)


def differing(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """Names whose digests differ, or that only one of the two has, in order."""
    names = expected.keys() | found.keys()
    return sorted(name for name in names if expected.get(name) != found.get(name))


def require_none_wrong(wrong: list[str], engine: str, version: int) -> None:
    """Raise WeightMismatch, naming some, unless `wrong` (names of tensors in force) is empty."""
    if wrong:
        raise WeightMismatch(
            f"{engine} was to serve version {version}, but {len(wrong)} of the tensors it computes "
            f"with are not of that version: {', '.join(wrong[:3])}"
        )
