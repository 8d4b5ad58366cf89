"""Transport name -> how to make its publisher and its receiver.

Imports are inside, so that only the transport in use is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from cluster.contracts.records import Canary, WeightManifest


class Publisher(Protocol):
    def publish(
        self,
        arrays: Mapping[str, np.ndarray],
        dtypes: Mapping[str, str],
        version: int,
        canary: Canary,
    ) -> WeightManifest: ...

    def close(self) -> None: ...


class Receiver(Protocol):
    def fetch(self, manifest: WeightManifest) -> dict[str, np.ndarray]: ...


def _object_store_publisher(directory: str) -> Publisher:
    from cluster.weights.object_store import ObjectStorePublisher

    return ObjectStorePublisher()


def _object_store_receiver() -> Receiver:
    from cluster.weights.object_store import ObjectStoreReceiver

    return ObjectStoreReceiver()


def _disk_publisher(directory: str) -> Publisher:
    from cluster.weights.disk import DiskPublisher

    return DiskPublisher(directory)


def _disk_receiver() -> Receiver:
    from cluster.weights.disk import DiskReceiver

    return DiskReceiver()


# The publisher's argument is a directory that learner and workers share; object_store ignores it.
TRANSPORTS: dict[str, tuple[Callable[[str], Publisher], Callable[[], Receiver]]] = {
    "object_store": (_object_store_publisher, _object_store_receiver),
    "disk": (_disk_publisher, _disk_receiver),
}
