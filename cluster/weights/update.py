"""One version on its way out: buckets of tensors, hashed and sent while the next are gathered.

learner          add(bucket 0)   add(bucket 1)   …   close(canary) ──▶ WeightManifest
update's thread        └─ hash, put 0  └─ hash, put 1        └─ finish

`add` waits until the bucket before has been sent, so two exist at a time: the one that is sent and
the one that the learner gathers. Nobody can fetch a version before `close` returned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Any, Protocol

from cluster.contracts.records import Canary, TensorEntry, WeightManifest
from cluster.weights.manifest import entries_of


class Carrier(Protocol):
    """What a transport does with one version. Called by one thread at a time, in order."""

    def put(self, arrays: Mapping[str, Any]) -> None:
        """Copy or send a bucket; its arrays may be changed after the return."""
        ...

    def finish(self) -> Any:
        """Let receivers have the version; returns where they find it (`WeightManifest.locator`)."""
        ...

    def discard(self) -> None:
        """Keep nothing of the version. Also called after a `finish` that failed."""
        ...


class Nowhere:
    """A carrier that sends nothing: what comes of the update is its manifest."""

    def put(self, arrays: Mapping[str, Any]) -> None:
        """Nothing is sent."""

    def finish(self) -> None:
        """Nowhere."""

    def discard(self) -> None:
        """Nothing is held."""


class Update:
    """An update that is being published. Leaving its ``with`` block without ``close`` discards it.

    A bucket that could not be sent is reported by ``close``: until then the processes of a learner
    go on to gather together, and none waits for one that has left.
    """

    def __init__(self, version: int, transport: str, carrier: Carrier) -> None:
        self._version = version
        self._transport = transport
        self._carrier = carrier
        self._entries: list[TensorEntry] = []
        self._buckets = 0
        self._problem: BaseException | None = None
        self._sending: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, f"weights-{version}")
        self._closed = False

    def add(self, arrays: Mapping[str, Any], dtypes: Mapping[str, str]) -> None:
        """Send a bucket: host arrays (bfloat16 as uint16 views) or tensors, ``dtypes`` their torch
        names. They must not change before the next ``add`` or ``close`` returns."""
        self._wait()
        if self._problem is None and arrays:
            self._sending = self._thread.submit(self._send, self._buckets, arrays, dtypes)
            self._buckets += 1

    def close(self, canary: Canary) -> WeightManifest:
        """Wait for the last bucket and let receivers have the version.

        Raises what kept a bucket from being sent; ValueError when a dtype is unknown or does not
        fit the array that carries it, or a name came twice.
        """
        self._wait()
        if self._problem is not None:
            raise self._problem
        locator = self._thread.submit(self._carrier.finish).result()
        self._closed = True
        self._thread.shutdown()
        return WeightManifest(
            version=self._version,
            tensors=tuple(self._entries),
            canary=canary,
            transport=self._transport,
            locator=locator,
        )

    def _send(self, bucket: int, arrays: Mapping[str, Any], dtypes: Mapping[str, str]) -> None:
        known = {entry.name for entry in self._entries}
        if twice := known & arrays.keys():
            raise ValueError(f"{min(twice)}: published twice in version {self._version}")
        self._entries += entries_of(arrays, dtypes, bucket)
        self._carrier.put(arrays)

    def _wait(self) -> None:
        sending, self._sending = self._sending, None
        if sending is not None:
            self._problem = sending.exception()

    def __enter__(self) -> Update:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._closed:
            return
        with suppress(Exception):  # what is raised already says more
            self._wait()
        self._thread.shutdown()
        self._carrier.discard()


def buckets_of(arrays: Mapping[str, Any], limit_bytes: int) -> Iterator[dict[str, Any]]:
    """``arrays`` in their order, as many to a bucket as its limit takes; a larger one alone."""
    bucket: dict[str, Any] = {}
    used = 0
    for name, array in arrays.items():
        if bucket and used + array.nbytes > limit_bytes:
            yield bucket
            bucket, used = {}, 0
        bucket[name] = array
        used += array.nbytes
    if bucket:
        yield bucket
