"""Versions of the weights that a learner keeps on its device, in buckets, for others to read.

One copy of the weights in the engine's number type for each version kept: that is what lets
training go on while it is read. The buffers of a version that is let go are written to next: no
memory is asked for, and a receiver that has mapped one before knows it by its handle.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cluster.weights.device_buffer import layout, pack
from cluster.weights.streams import mark


@dataclass(slots=True)
class Snapshot:
    """ready: an event behind the copies; None on a CPU, where they are done."""

    buckets: list[Tensor] = field(default_factory=list)
    ready: Any = None

    @property
    def device(self) -> torch.device:
        return self.buckets[0].device


class Snapshots:
    """Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[int, Snapshot] = {}
        self._readers: dict[int, int] = {}
        self._spare: list[Tensor] = []

    def keep(self, version: int, snapshot: Snapshot) -> None:
        """From now on it is the version; what is left over of older ones is freed."""
        with self._lock:
            self._held[version] = snapshot
            self._spare.clear()

    def retain(self, versions: Collection[int]) -> None:
        """Let go of the others. What nobody reads now is written to next."""
        with self._lock:
            for version in [v for v in self._held if v not in versions]:
                gone = self._held.pop(version)
                if not self._readers.get(version):
                    self._spare += gone.buckets

    @contextmanager
    def reading(self, version: int) -> Iterator[Snapshot | None]:
        """The version, None when it is not held. Its memory stays as it is within."""
        with self._lock:
            snapshot = self._held.get(version)
            self._readers[version] = self._readers.get(version, 0) + 1
        try:
            yield snapshot
        finally:
            with self._lock:
                self._readers[version] -= 1
                if not self._readers[version]:
                    del self._readers[version]

    def buffer(self, nbytes: int) -> Tensor | None:
        """One of that size that nobody needs any more, or None."""
        with self._lock:
            for place, spare in enumerate(self._spare):
                if spare.nbytes == nbytes:
                    return self._spare.pop(place)
        return None

    def clear(self) -> None:
        with self._lock:
            self._held.clear()
            self._spare.clear()

    def give_back(self, buckets: list[Tensor]) -> None:
        """Buffers of a version that came to nothing."""
        with self._lock:
            self._spare += buckets


class SnapshotCarrier:
    """Takes one version, bucket by bucket (`cluster.weights.update.Carrier`).

    locate: what a receiver finds the snapshot by.
    """

    def __init__(
        self, snapshots: Snapshots, version: int, locate: Callable[[Snapshot], Any]
    ) -> None:
        self._snapshots, self._version, self._locate = snapshots, version, locate
        self._snapshot = Snapshot()

    def put(self, arrays: Mapping[str, Any]) -> None:
        """Copied on the stream that trains, behind what made the tensors and before what changes
        them; a device copies its own memory in milliseconds."""
        _, total = layout(tensor.nbytes for tensor in arrays.values())
        self._snapshot.buckets.append(pack(arrays, self._snapshots.buffer(total)))

    def finish(self) -> Any:
        self._snapshot.ready = mark(self._snapshot.device)
        locator = self._locate(self._snapshot)
        # Only now that it is whole can anybody find it.
        self._snapshots.keep(self._version, self._snapshot)
        return locator

    def discard(self) -> None:
        self._snapshots.give_back(self._snapshot.buckets)
