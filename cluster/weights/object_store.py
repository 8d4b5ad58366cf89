"""Weights through Ray's object store: one copy on each node, read without copying."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayError

from cluster.contracts.errors import Retryable, WeightMismatch
from cluster.contracts.records import Canary, WeightManifest
from cluster.weights.manifest import build_manifest
from cluster.weights.transports import PublisherOptions

NAME = "object_store"


class ObjectStorePublisher:
    """Keeps references to the versions that are retained: an object without one is freed."""

    on_device = False

    def __init__(self) -> None:
        self._alive: dict[int, Any] = {}

    def publish(
        self,
        arrays: Mapping[str, np.ndarray],
        dtypes: Mapping[str, str],
        version: int,
        canary: Canary,
    ) -> WeightManifest:
        """Copy ``arrays`` into the object store. They may be reused after the return."""
        # In one dict and so one object: a worker fetches an update with one request.
        plain = {name: np.asarray(array, order="C") for name, array in arrays.items()}
        ref = ray.put(plain)
        self._alive[version] = ref
        # In a list, so that Ray hands the reference on instead of fetching it for the controller.
        return build_manifest(plain, dtypes, version, canary, NAME, [ref])

    def retain(self, versions: Collection[int]) -> None:
        self._alive = {v: ref for v, ref in self._alive.items() if v in versions}

    def close(self) -> None:
        self._alive.clear()


class ObjectStoreReceiver:
    def __init__(self, timeout_s: float = 120.0) -> None:
        self._timeout_s = timeout_s

    def fetch(self, manifest: WeightManifest) -> dict[str, np.ndarray]:
        """Read-only arrays in shared memory, alive as long as they are referenced.

        Raises Retryable when they cannot be had (in time), WeightMismatch when it is no weights.
        """
        try:
            arrays = ray.get(manifest.locator[0], timeout=self._timeout_s)
        except GetTimeoutError:
            raise Retryable(
                f"weights of version {manifest.version} not in the object store within "
                f"{self._timeout_s:.0f} s"
            ) from None
        # Also when the learner's node is gone: its objects are lost with it, and a new learner
        # publishes anew.
        except RayError as problem:
            raise Retryable(f"weights of version {manifest.version} are lost: {problem}") from None
        if not isinstance(arrays, dict):
            raise WeightMismatch(f"version {manifest.version} holds a {type(arrays).__name__}")
        return arrays


def publisher(options: PublisherOptions) -> ObjectStorePublisher:
    return ObjectStorePublisher()


def receiver(device: str) -> ObjectStoreReceiver:
    return ObjectStoreReceiver()
