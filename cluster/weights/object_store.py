"""Weights through Ray's object store: one copy on each node, read without copying.

Each bucket is an object of its own, so that a worker holds two of them at a time, not a model.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayError

from cluster.contracts.errors import Retryable, WeightMismatch
from cluster.contracts.records import WeightManifest
from cluster.weights.transports import PublisherOptions
from cluster.weights.update import Update

NAME = "object_store"


class ObjectStorePublisher:
    """Keeps references to the versions that are retained: an object without one is freed."""

    on_device = False

    def __init__(self) -> None:
        self._alive: dict[int, list[Any]] = {}

    def open(self, version: int) -> Update:
        return Update(version, NAME, _Objects(self._alive, version))

    def retain(self, versions: Collection[int]) -> None:
        for version in [v for v in self._alive if v not in versions]:
            del self._alive[version]

    def close(self) -> None:
        self._alive.clear()


class _Objects:
    """The carrier of one version."""

    def __init__(self, alive: dict[int, list[Any]], version: int) -> None:
        self._alive, self._version = alive, version
        self._references: list[Any] = []

    def put(self, arrays: Mapping[str, Any]) -> None:
        # In one dict and so one object: a worker fetches a bucket with one request.
        plain = {name: np.asarray(array, order="C") for name, array in arrays.items()}
        self._references.append(ray.put(plain))

    def finish(self) -> list[Any]:
        self._alive[self._version] = self._references
        # In a list, so that Ray hands the references on instead of fetching them for the
        # controller.
        return list(self._references)

    def discard(self) -> None:
        self._references.clear()


class ObjectStoreReceiver:
    def fetch(self, manifest: WeightManifest, timeout_s: float) -> Iterator[dict[str, np.ndarray]]:
        """Read-only arrays in shared memory, alive as long as they are referenced."""
        deadline = time.monotonic() + timeout_s
        for number, reference in enumerate(manifest.locator, 1):
            which = f"bucket {number} of {len(manifest.locator)} of version {manifest.version}"
            try:
                arrays = ray.get(reference, timeout=max(0.0, deadline - time.monotonic()))
            except GetTimeoutError:
                raise Retryable(
                    f"{which} was not in the object store within {timeout_s:.0f} s"
                ) from None
            # Also when the learner's node is gone: its objects are lost with it, and a new learner
            # publishes anew.
            except RayError as problem:
                raise Retryable(f"{which} is lost: {problem}") from None
            if not isinstance(arrays, dict):
                raise WeightMismatch(f"{which} holds a {type(arrays).__name__}")
            yield arrays
            del arrays  # or it would stay alive while the next one is waited for


def publisher(options: PublisherOptions) -> ObjectStorePublisher:
    return ObjectStorePublisher()


def receiver(device: str) -> ObjectStoreReceiver:
    return ObjectStoreReceiver()
