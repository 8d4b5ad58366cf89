"""Weights between processes that share one GPU: the handle travels, the bytes stay (CUDA IPC).

On the CPU the same code passes a handle of shared memory: that is how its logic is tested.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor
from torch.multiprocessing import reductions

from cluster.contracts.errors import Retryable, UserError, WeightMismatch
from cluster.contracts.records import WeightManifest
from cluster.weights.device_buffer import unpack
from cluster.weights.manifest import buckets_in
from cluster.weights.snapshots import Snapshot, SnapshotCarrier, Snapshots
from cluster.weights.streams import indexed
from cluster.weights.transports import PublisherOptions
from cluster.weights.update import Update

NAME = "shared_device"
_MAPPED_VERSIONS = 4


class SharedDevicePublisher:
    """Keeps the retained versions in device memory that other processes may map."""

    on_device = True

    def __init__(self) -> None:
        self._snapshots = Snapshots()

    def open(self, version: int) -> Update:
        return Update(version, NAME, SnapshotCarrier(self._snapshots, version, _locator))

    def retain(self, versions: Collection[int]) -> None:
        self._snapshots.retain(versions)

    def close(self) -> None:
        self._snapshots.clear()


class SharedDeviceReceiver:
    """Maps the publisher's memory; a buffer that was mapped before is recognised by its handle."""

    in_any_process = True

    def __init__(self, device: str = "cpu") -> None:
        self._device = torch.device(device)
        self._mapped: OrderedDict[Any, Tensor] = OrderedDict()

    def fetch(self, manifest: WeightManifest, timeout_s: float) -> Iterator[dict[str, Tensor]]:
        """Views of the publisher's own memory: read them, never write. Retryable when the memory
        is gone. Raises UserError when the publisher's memory is another GPU's."""
        theirs, handles = manifest.locator
        require_same(theirs, gpu_of(indexed(self._device)))
        for handle, entries in zip(handles, buckets_in(manifest), strict=True):
            which = f"bucket {entries[0].bucket + 1} of {manifest.buckets}"
            try:
                yield unpack(self._buffer(handle, manifest, which), entries)
            except (ValueError, RuntimeError, AttributeError) as problem:
                raise WeightMismatch(
                    f"weights of version {manifest.version}, {which}: {problem}"
                ) from None

    def _buffer(self, handle: Any, manifest: WeightManifest, which: str) -> Tensor:
        if handle not in self._mapped:
            try:
                self._mapped[handle] = _mapped(handle)
            except (RuntimeError, OSError, TypeError) as problem:
                raise Retryable(
                    f"{which} of the weights of version {manifest.version} cannot be mapped: "
                    f"{problem}"
                ) from None
            # A mapping costs milliseconds, so old ones are kept; but each holds the publisher's
            # memory in place, which it could not free otherwise.
            while len(self._mapped) > _MAPPED_VERSIONS * manifest.buckets:
                self._mapped.popitem(last=False)
        return self._mapped[handle]


def publisher(options: PublisherOptions) -> SharedDevicePublisher:
    return SharedDevicePublisher()


def receiver(device: str) -> SharedDeviceReceiver:
    return SharedDeviceReceiver(device)


def gpu_of(device: torch.device) -> str | None:
    """What tells the GPU from all others, whatever its number is here; None without one."""
    if device.type != "cuda":
        return None
    return str(torch.cuda.get_device_properties(device).uuid)


def require_same(learner: str | None, worker: str | None) -> None:
    """Raise UserError unless both compute on one GPU, or both on none."""
    if learner == worker:
        return
    here, there = (f"GPU {uuid}" if uuid else "a CPU" for uuid in (worker, learner))
    raise UserError(
        f"the learner's weights are on {there}, and this worker computes on {here}: they share no "
        "memory",
        where="weights.transport = 'shared_device'",
        fix="let Ray put both on one GPU (learner.gpus + rollout.workers * rollout.gpus at most 1, "
        "on a machine with one GPU), or set weights.transport = 'collective'",
    )


def _locator(snapshot: Snapshot) -> tuple[str | None, tuple[Any, ...]]:
    # A handle carries an event only the first time it is opened, so the copies end here. This is
    # the update's own thread: neither training nor decoding waits.
    if snapshot.ready is not None:
        snapshot.ready.synchronize()
    return gpu_of(snapshot.device), tuple(map(_handle, snapshot.buckets))


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
