"""Transport name -> how to make its publisher and its receiver.

Imports are inside, so that only the transport in use is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.contracts.records import Canary, WeightManifest


class Publisher(Protocol):
    """``on_device``: takes torch tensors where they lie; else host arrays."""

    on_device: bool

    def publish(
        self, arrays: Mapping[str, Any], dtypes: Mapping[str, str], version: int, canary: Canary
    ) -> WeightManifest: ...

    def close(self) -> None: ...


class Receiver(Protocol):
    def fetch(self, manifest: WeightManifest) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PublisherOptions:
    """directory: shared by learner and workers. host: this node as the workers see it.

    keep: how many versions stay available. The learner may be ``staleness.bound + 1`` versions
    ahead of the slowest worker, so bound + 2 is what never takes one away that is being read.
    """

    directory: str = "weights"
    host: str = "127.0.0.1"
    keep: int = 2


def _object_store_publisher(options: PublisherOptions) -> Publisher:
    from cluster.weights.object_store import ObjectStorePublisher

    return ObjectStorePublisher(options.keep)


def _object_store_receiver(device: str) -> Receiver:
    from cluster.weights.object_store import ObjectStoreReceiver

    return ObjectStoreReceiver()


def _disk_publisher(options: PublisherOptions) -> Publisher:
    from cluster.weights.disk import DiskPublisher

    return DiskPublisher(options.directory, options.keep)


def _disk_receiver(device: str) -> Receiver:
    from cluster.weights.disk import DiskReceiver

    return DiskReceiver()


def _collective_publisher(options: PublisherOptions) -> Publisher:
    from cluster.weights.collective import CollectivePublisher

    return CollectivePublisher(options.host, options.keep)


def _collective_receiver(device: str) -> Receiver:
    from cluster.weights.collective import CollectiveReceiver

    return CollectiveReceiver(device)


def _shared_device_publisher(options: PublisherOptions) -> Publisher:
    from cluster.weights.shared_device import SharedDevicePublisher

    return SharedDevicePublisher(options.keep)


def _shared_device_receiver(device: str) -> Receiver:
    from cluster.weights.shared_device import SharedDeviceReceiver

    return SharedDeviceReceiver()


# The receiver's argument is the device the engine computes on; host transports ignore it.
TRANSPORTS: dict[str, tuple[Callable[[PublisherOptions], Publisher], Callable[[str], Receiver]]] = {
    "object_store": (_object_store_publisher, _object_store_receiver),
    "disk": (_disk_publisher, _disk_receiver),
    "collective": (_collective_publisher, _collective_receiver),
    "shared_device": (_shared_device_publisher, _shared_device_receiver),
}
