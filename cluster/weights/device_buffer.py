"""All tensors of a bucket in one flat buffer, and a checksum that is computed where they lie.

For transports that never leave the device: one message instead of hundreds, and no copy to the host
only to hash it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from cluster.contracts.records import TensorEntry

ALIGNMENT = 256  # bytes; what CUDA's own allocator gives
_CHUNK = 1 << 20  # words hashed at a time: bounds the extra memory
_MULTIPLIER = 0x9E3779B97F4A7C15 - (1 << 64)  # odd (golden ratio), as a signed 64-bit number


def layout(sizes: Iterable[int]) -> tuple[list[int], int]:
    """(first byte of each tensor, bytes in all) for tensors of ``sizes`` bytes."""
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return starts, end


def pack(tensors: Mapping[str, Tensor], buffer: Tensor | None = None) -> Tensor:
    """Copy ``tensors`` into one uint8 buffer on their device (a new one, or ``buffer``)."""
    starts, total = layout(tensor.nbytes for tensor in tensors.values())
    if buffer is None or buffer.nbytes != total:
        device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
        buffer = torch.zeros(total, dtype=torch.uint8, device=device)
    for start, tensor in zip(starts, tensors.values(), strict=True):
        _view(buffer, start, tensor.dtype, tensor.shape, tensor.nbytes).copy_(tensor)
    return buffer


def unpack(buffer: Tensor, entries: Iterable[TensorEntry]) -> dict[str, Tensor]:
    """Views into ``buffer``, by name. Raises ValueError when the buffer has another size."""
    entries = list(entries)
    starts, total = layout(entry.nbytes for entry in entries)
    if buffer.nbytes != total:
        raise ValueError(f"a buffer of {buffer.nbytes} bytes, {total} announced")
    return {
        entry.name: _view(buffer, start, getattr(torch, entry.dtype), entry.shape, entry.nbytes)
        for start, entry in zip(starts, entries, strict=True)
    }


def _view(
    buffer: Tensor, start: int, dtype: torch.dtype, shape: Iterable[int], nbytes: int
) -> Tensor:
    return buffer[start : start + nbytes].view(dtype).view(tuple(shape))


def mixed_sums(tensors: Iterable[Tensor]) -> list[str]:
    """ "mix64:" and 16 hex digits for each tensor, computed on its device, fetched all at once.

    The sum over 32-bit words w_i (bytes, where the size is odd) of (w_i + 1) * m_i modulo 2^64 with
    odd m_i that differ: a changed word or two exchanged ones always change it. It guards against
    accidents of transport, as the checksums of host arrays do.
    """
    sums = [_mixed_sum(tensor) for tensor in tensors]
    if not sums:
        return []
    return [f"mix64:{number % (1 << 64):016x}" for number in torch.stack(sums).tolist()]


def _mixed_sum(tensor: Tensor) -> Tensor:
    flat = tensor.detach().contiguous().reshape(-1)
    words = flat.view(torch.uint8)
    if words.numel() % 4 == 0:
        words = words.view(torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    # In chunks, as int64 copies of all words at once would take twice the weights' memory.
    for start in range(0, words.numel(), _CHUNK):
        part = words[start : start + _CHUNK].to(torch.int64) + 1
        place = torch.arange(start, start + part.numel(), dtype=torch.int64, device=flat.device)
        total += (part * ((2 * place + 1) * _MULTIPLIER)).sum()
    return total
