"""A worker's way in for weights: one bucket is fetched while the one before is checked and loaded.

Two buckets exist at a time, however large the model is.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import Any

from cluster.contracts.errors import Fatal, Retryable
from cluster.contracts.records import WeightManifest
from cluster.weights.manifest import verified
from cluster.weights.transports import Receiver

Bucket = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Source:
    """Where another process of the same worker can fetch an update for itself."""

    manifest: WeightManifest
    timeout_s: float


class Intake:
    """Takes updates from one receiver, one after the other.

    timeout_s: how long all buckets of an update may take together.
    """

    def __init__(self, receiver: Receiver, timeout_s: float) -> None:
        self._receiver = receiver
        self._timeout_s = timeout_s
        # One thread: a fetch that was given up ends before the next one begins.
        self._thread = ThreadPoolExecutor(1, "weights-fetch")

    def take(self, manifest: WeightManifest) -> Incoming:
        return Incoming(self._receiver, self._thread, manifest, self._timeout_s)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


class Incoming:
    """The tensors (name, array) of one update, to be gone through once.

    Going through them raises Retryable, which says which bucket did not come, and WeightMismatch
    for what is not as announced.
    """

    def __init__(
        self,
        receiver: Receiver,
        thread: ThreadPoolExecutor,
        manifest: WeightManifest,
        timeout_s: float,
    ) -> None:
        self._receiver, self._thread = receiver, thread
        self._manifest, self._timeout_s = manifest, timeout_s
        self._whole = False
        self.fetch_s = 0.0  # waited for buckets
        self.verify_s = 0.0  # checked them

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        buckets = self._fetched()
        checked = verified(self._manifest, buckets)
        try:
            while (bucket := self._timed(checked)) is not None:
                yield from bucket.items()
                del bucket
        finally:
            buckets.close()
        self._whole = True

    @property
    def source(self) -> Source | None:
        """None where only this process can read the transport."""
        anywhere = getattr(self._receiver, "in_any_process", False)
        return Source(self._manifest, self._timeout_s) if anywhere else None

    def taken_elsewhere(self) -> None:
        """Other processes have gone through all of it."""
        self._whole = True

    def require_whole(self) -> None:
        """Raise Fatal unless every tensor was taken, and so was checked."""
        if not self._whole:
            raise Fatal(f"the engine left tensors of version {self._manifest.version} unread")

    def _timed(self, checked: Iterator[Bucket]) -> Bucket | None:
        began, waited = time.perf_counter(), self.fetch_s
        bucket = next(checked, None)
        self.verify_s += time.perf_counter() - began - (self.fetch_s - waited)
        return bucket

    def _fetched(self) -> Generator[Bucket, None, None]:
        source = iter(self._receiver.fetch(self._manifest, self._timeout_s))
        deadline = time.monotonic() + self._timeout_s
        coming = self._thread.submit(next, source, None)
        number = 0
        try:
            while (bucket := self._next(coming, number, deadline)) is not None:
                number += 1
                coming = self._thread.submit(next, source, None)
                yield bucket
                del bucket
        finally:
            # On its own thread, after what is in progress there.
            if callable(close := getattr(source, "close", None)):
                self._thread.submit(close)

    def _next(self, coming: Future[Bucket | None], number: int, deadline: float) -> Bucket | None:
        began = time.perf_counter()
        try:
            return coming.result(max(0.0, deadline - time.monotonic()))
        except FutureTimeout:
            if coming.done():  # the receiver itself raised a TimeoutError
                raise
            raise Retryable(
                f"bucket {number + 1} of {self._manifest.buckets} of the weights of version "
                f"{self._manifest.version} did not come within {self._timeout_s:.0f} s"
            ) from None
        finally:
            self.fetch_s += time.perf_counter() - began
