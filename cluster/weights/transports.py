"""How the two ends of a weight transport are made from its name, and what each must do.

A built-in transport is the module of its name beside this one, with `publisher(options)` and
`receiver(device)`; a plugin's is what it has registered.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.contracts.records import Canary, WeightManifest
from cluster.contracts.registry import WEIGHT_TRANSPORTS
from cluster.weights.update import Update, buckets_of


class Publisher(Protocol):
    """``on_device``: takes torch tensors where they lie; else host arrays."""

    on_device: bool

    def open(self, version: int) -> Update:
        """Begin to publish a version, which may have been begun or published before."""
        ...

    def retain(self, versions: Collection[int]) -> None:
        """Let go of all versions but these; called before the next one is opened."""
        ...

    def close(self) -> None: ...


class Receiver(Protocol):
    """A receiver of which every process of a divided engine may have one of its own says so by
    ``in_any_process = True``; what others receive, one process receives and shares."""

    def fetch(self, manifest: WeightManifest, timeout_s: float) -> Iterator[Mapping[str, Any]]:
        """The buckets of an update in order; each may be dropped before the next is asked for.

        Raises Retryable when one cannot be had, or not within ``timeout_s`` after the first was
        asked for; WeightMismatch when it is not as announced. Names, shapes and checksums are the
        caller's to check (``cluster.weights.intake``).
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PublisherOptions:
    """directory: shared by learner and workers. host: this node as the workers see it. timeout_s:
    `weights.timeout_s`."""

    directory: str = "weights"
    host: str = "127.0.0.1"
    timeout_s: float = 120.0


def make_publisher(word: str, options: PublisherOptions) -> Publisher:
    """The learner's end of the transport that `weights.transport` names."""
    # The registry first: it also says, in one message, when there is no such transport.
    plugin = WEIGHT_TRANSPORTS[word].publisher
    made: Publisher = (plugin or _module(word).publisher)(options)
    return made


def make_receiver(word: str, device: str) -> Receiver:
    """A worker's end. device: the one the engine computes on; host transports ignore it."""
    plugin = WEIGHT_TRANSPORTS[word].receiver
    made: Receiver = (plugin or _module(word).receiver)(device)
    return made


def publish(
    publisher: Publisher,
    arrays: Mapping[str, Any],
    dtypes: Mapping[str, str],
    version: int,
    canary: Canary,
    bucket_bytes: int = 64 << 20,
) -> WeightManifest:
    """Publish arrays that are all there already. Raises as ``Update.close`` does."""
    with publisher.open(version) as update:
        for bucket in buckets_of(arrays, bucket_bytes):
            update.add(bucket, {name: dtypes[name] for name in bucket})
        return update.close(canary)


def _module(word: str) -> Any:
    """Imported here, so that only the transport in use is loaded (torch, ray)."""
    # The word is one of the registry, so nothing but these modules can be imported by it.
    return importlib.import_module(f"cluster.weights.{word}")
