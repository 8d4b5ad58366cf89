"""Digests by which an engine proves that the weights it computes with are the published ones.

Two kinds. `number_sum` depends on the numbers alone, not on their order: it is the same for a
published q, k and v and for the one tensor into which an engine fuses them. `fingerprint` depends
on every byte, and on where it lies: it compares two sets of weights of the same layout.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from cluster.contracts.errors import WeightMismatch
from cluster.weights.manifest import checksums

_CHUNK = {"cpu": 1 << 15}  # numbers at a time: their 64-bit images stay in a CPU's cache
_CHUNK_ELSEWHERE = 1 << 24  # bounds the extra memory on a device
_MULTIPLIER = 0x9E3779B97F4A7C15 - (1 << 64)  # odd (golden ratio), as a signed 64-bit number
_SHIFT = 29


def number_sum(tensors: Iterable[torch.Tensor]) -> int:
    """Sum modulo 2^64 of a 64-bit mix of each number, over all tensors, on their own devices.

    Equal for two sets that hold the same numbers, however they are cut, joined, padded with zeros
    or ordered; another bit in one number changes it. Numbers are compared as float32, which holds
    every bfloat16 and float16 exactly; -0.0 and 0.0 differ. Integers count by their own bits.
    """
    return sum(int(_mixed(tensor.detach())) for tensor in tensors) % (1 << 64)


def _mixed(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.reshape(-1)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for part in flat.split(_CHUNK.get(flat.device.type, _CHUNK_ELSEWHERE)):
        bits = part.float().view(torch.int32) if part.is_floating_point() else part
        # The multiplications spread a bit upwards, the shift brings it down again: without it the
        # sum of two changes could be nothing. 0 stays 0, so zeros of a padding do not count.
        mixed = bits.to(torch.int64) * _MULTIPLIER
        mixed ^= mixed >> _SHIFT
        total += mixed.mul_(_MULTIPLIER).sum()
    return total


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
