"""Host tensors on their way to a GPU: through pinned memory, so that neither the host nor the
engine waits for a copy.

A copy from ordinary (pageable) memory is synchronous: the driver first moves the bytes into pinned
memory of its own (`non_blocking` in `torch.Tensor.copy_` has no effect on it). Two buffers of ours
take turns, so that one is filled while the other is read. Not run on CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from cluster.contracts.devices import PINNED_STAGING
from cluster.weights.streams import mark

_BUFFERS = 2


def _pinned(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


class PinnedCopies:
    """Keeps its buffers, which grow to the largest tensor seen: pinning memory takes long."""

    def __init__(
        self,
        device: torch.device,
        allocate: Callable[[int], Tensor] = _pinned,
        mark_copied: Callable[[torch.device], Any] = mark,
    ) -> None:
        self.device = device
        self._allocate = allocate
        self._mark = mark_copied
        self._buffers: list[Tensor | None] = [None] * _BUFFERS
        self._copied: list[Any] = [None] * _BUFFERS
        self._turn = 0

    def on_device(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same tensors where the engine computes, copied on the current stream. Those that lie
        on a device already, and all of them on a CPU, are handed on as they are."""
        for name, tensor in tensors:
            here = tensor.device.type == "cpu" and PINNED_STAGING.on(self.device)
            yield name, self._copy(tensor) if here else tensor

    def _copy(self, tensor: Tensor) -> Tensor:
        turn, self._turn = self._turn, (self._turn + 1) % _BUFFERS
        if (copied := self._copied[turn]) is not None:
            copied.synchronize()  # the copy before the last may still read this buffer
        held = self._buffers[turn]
        if held is None or held.nbytes < tensor.nbytes:
            held = self._buffers[turn] = self._allocate(tensor.nbytes)
        view = held[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        view.copy_(tensor)
        found = view.to(self.device, non_blocking=True)
        self._copied[turn] = self._mark(self.device)
        return found
