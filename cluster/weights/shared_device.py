"""Weights between processes that share one GPU: the handle travels, the bytes stay (CUDA IPC).

On the CPU the same code passes a handle of shared memory: that is how its logic is tested.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor
from torch.multiprocessing import reductions

from cluster.contracts.errors import Retryable, WeightMismatch
from cluster.contracts.records import Canary, WeightManifest
from cluster.weights.device_buffer import pack, unpack
from cluster.weights.manifest import build_manifest
from cluster.weights.transports import PublisherOptions

NAME = "shared_device"


class SharedDevicePublisher:
    """Keeps the retained versions in device memory that other processes may map."""

    on_device = True

    def __init__(self) -> None:
        self._snapshots: dict[int, Tensor] = {}
        self._spare: Tensor | None = None

    def publish(
        self,
        arrays: Mapping[str, Tensor],
        dtypes: Mapping[str, str],
        version: int,
        canary: Canary,
    ) -> WeightManifest:
        """Take a snapshot on the device. ``arrays`` may be changed after the return."""
        spare, self._spare = self._spare, None
        snapshot = pack(arrays, spare)
        if snapshot.is_cuda:  # the other process reads on a stream of its own
            torch.cuda.current_stream(snapshot.device).synchronize()
        # Only when it is whole, so that no handle of a half written buffer can be handed out.
        self._snapshots[version] = snapshot
        return build_manifest(arrays, dtypes, version, canary, NAME, _handle(snapshot))

    def retain(self, versions: Collection[int]) -> None:
        """One of the buffers let go is written into next: no memory is asked for, and a receiver
        that has mapped it before knows it by its handle."""
        for version in [v for v in self._snapshots if v not in versions]:
            self._spare = self._snapshots.pop(version)

    def close(self) -> None:
        self._snapshots.clear()
        self._spare = None


class SharedDeviceReceiver:
    """Maps the publisher's memory; a buffer that was mapped before is recognised by its handle."""

    def __init__(self) -> None:
        self._mapped: OrderedDict[Any, Tensor] = OrderedDict()

    def fetch(self, manifest: WeightManifest) -> dict[str, Tensor]:
        """Views of the publisher's own memory: read them, never write.

        Raises Retryable when the memory is gone, WeightMismatch when it is not as announced.
        """
        handle = manifest.locator
        if handle not in self._mapped:
            try:
                self._mapped[handle] = _mapped(handle)
            except (RuntimeError, OSError, TypeError) as problem:
                raise Retryable(
                    f"weights of version {manifest.version} cannot be mapped: {problem}"
                ) from None
            # A mapping costs milliseconds, so old ones are kept; but each holds the publisher's
            # memory in place, which it could not free otherwise.
            while len(self._mapped) > 16:
                self._mapped.popitem(last=False)
        try:
            return unpack(self._mapped[handle], manifest.tensors)
        except (ValueError, RuntimeError, AttributeError) as problem:
            raise WeightMismatch(f"weights of version {manifest.version}: {problem}") from None


def publisher(options: PublisherOptions) -> SharedDevicePublisher:
    return SharedDevicePublisher()


def receiver(device: str) -> SharedDeviceReceiver:
    return SharedDeviceReceiver()


def _handle(snapshot: Tensor) -> tuple[Any, ...]:
    """What another process maps the same memory by: numbers and names, never the bytes."""
    if snapshot.is_cuda:
        return ("cuda", *reductions.reduce_tensor(snapshot)[1])
    multiprocessing.set_sharing_strategy("file_system")  # descriptors need a common parent
    return ("cpu", *reductions.reduce_storage(snapshot.untyped_storage())[1])


def _mapped(handle: tuple[Any, ...]) -> Tensor:
    kind, *parts = handle
    if kind == "cuda":
        return reductions.rebuild_cuda_tensor(*parts)
    storage = reductions.rebuild_storage_filename(*parts)
    return torch.empty(0, dtype=torch.uint8).set_(storage)
