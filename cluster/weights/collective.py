"""Weights from the learner's device to each worker's through a communicator: NCCL between GPUs,
gloo between processes without one.

Every worker has a communicator of two with the learner, made when it first asks, so that workers
come and go without anybody else noticing. The learner's side is a thread: training goes on.

    worker                        store (in the learner's process)          learner's thread
    asks          ───────────▶    queue of "<pair> <n> <version>"  ──────▶  packs nothing: sends the
    recv ◀─────────────────────── communicator of the pair ◀──────────────  snapshot of that version

The store is behind a gate that opens with a secret of the run, and every ask is signed with it; the
secret is in the manifest, which only Ray brings. The tensors themselves travel as torch.distributed
sends them, without encryption: the two ends learn each other's ports from the store.
"""

from __future__ import annotations

import hmac
import threading
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.contracts.errors import Retryable
from cluster.contracts.records import WeightManifest
from cluster.weights.device_buffer import SnapshotCarrier, Snapshots, layout, unpack
from cluster.weights.gate import LOOPBACK, Gate, new_secret, pass_gate, proof
from cluster.weights.manifest import buckets_in
from cluster.weights.stores import gloo_on, store_on
from cluster.weights.transports import PublisherOptions
from cluster.weights.update import Update

NAME = "collective"
TIMEOUT_S = 120.0
_STOP = "stop"
_SENT, _GONE = "sent", "gone"


class CollectivePublisher:
    """Keeps the retained versions on the device and serves them to whoever asks.

    host: the only address it listens on; on a cluster, this node's address as others see it.
    """

    on_device = True

    def __init__(self, host: str, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout = timedelta(seconds=timeout_s)
        self._host = host
        self._secret = new_secret()
        self._store: Any = store_on(LOOPBACK, self._timeout)
        self._gate = Gate(host, self._secret, self._store.port)
        self._asked: dict[int, int] = {}
        self._snapshots = Snapshots()
        self._pairs: dict[int, Any] = {}
        self._senders: dict[int, ThreadPoolExecutor] = {}
        self._thread = threading.Thread(target=self._serve, name="weights-server", daemon=True)
        self._thread.start()

    def open(self, version: int) -> Update:
        found = (self._host, self._gate.port, self._secret)
        return Update(version, NAME, SnapshotCarrier(self._snapshots, version, lambda _: found))

    def retain(self, versions: Collection[int]) -> None:
        self._snapshots.retain(versions)

    def close(self) -> None:
        self._gate.close()
        self._store.queue_push("asks", _signed(self._secret, _STOP))
        self._thread.join(TIMEOUT_S)
        for sender in self._senders.values():
            sender.shutdown(wait=True, cancel_futures=True)
        self._snapshots.clear()

    def _serve(self) -> None:
        store = self._store.clone()  # one that waits lets no other thread use it
        # The thread ends by an ask of our own, so it may wait for as long as the run takes.
        store.set_timeout(timedelta(days=365))
        while (ask := _opened(self._secret, store.queue_pop("asks"))) != _STOP:
            if ask is None:
                continue  # of nobody who knows the secret
            pair, number, version = map(int, ask.split())
            if number <= self._asked.get(pair, 0):
                continue  # sent a second time
            self._asked[pair] = number
            # A thread for each worker: one that has died holds up nobody else.
            sender = self._senders.setdefault(pair, ThreadPoolExecutor(1, f"weights-{pair}"))
            sender.submit(self._answer, f"answer/{pair}/{number}", pair, version)

    def _answer(self, key: str, pair: int, version: int) -> None:
        try:
            buffers = self._snapshots.of(version)
            self._store.set(key, _GONE if buffers is None else _SENT)
            for buffer in buffers or ():
                if pair not in self._pairs:
                    self._pairs[pair] = _communicator(
                        self._store.clone(), pair, 0, buffer.device, self._timeout, self._host
                    )
                self._pairs[pair].send([buffer], 1, 0).wait()
        except RuntimeError:
            # The worker is gone or did not listen: it learns so from its own deadline, and the pool
            # replaces it. Its successor makes a pair of its own.
            self._pairs.pop(pair, None)


class CollectiveReceiver:
    """One worker's end. device: where the weights are to arrive, "cpu" or "cuda:0"."""

    in_any_process = True

    def __init__(self, device: str = "cpu", timeout_s: float = TIMEOUT_S) -> None:
        self._device = torch.device(device)
        self._timeout = timedelta(seconds=timeout_s)
        self._address: tuple[str, int, bytes] | None = None
        self._own = ""  # this machine, as the learner sees it
        self._store: Any = None
        self._pair = 0
        self._asked = 0
        self._communicator: Any = None

    def fetch(self, manifest: WeightManifest, timeout_s: float) -> Iterator[dict[str, Tensor]]:
        """Tensors on the receiver's device. Retryable when the learner does not answer in time or
        has dropped the version."""
        whole = False
        try:
            yield from self._fetch(manifest)
            whole = True
        except (RuntimeError, OSError) as problem:  # torch.distributed's, and the gate's
            raise Retryable(
                f"weights of version {manifest.version} did not come through the communicator "
                f"within {self._timeout.total_seconds():.0f} s: {problem}"
            ) from None
        finally:
            if not whole:  # what is still on its way would be taken for the next update
                self._address = None

    def _fetch(self, manifest: WeightManifest) -> Iterator[dict[str, Tensor]]:
        if self._address != tuple(manifest.locator):
            self._connect(*manifest.locator)
        self._asked += 1
        key = f"answer/{self._pair}/{self._asked}"
        # One message, so that a worker that dies here leaves nothing that others would wait for.
        ask = f"{self._pair} {self._asked} {manifest.version}"
        self._store.queue_push("asks", _signed(manifest.locator[2], ask))
        self._store.wait([key], self._timeout)
        answer = self._store.get(key).decode()
        self._store.delete_key(key)
        if answer == _GONE:
            raise Retryable(f"the learner no longer holds weights of version {manifest.version}")
        if self._communicator is None:
            self._communicator = _communicator(
                self._store, self._pair, 1, self._device, self._timeout, self._own
            )
        for entries in buckets_in(manifest):
            _, total = layout(entry.nbytes for entry in entries)
            buffer = torch.empty(total, dtype=torch.uint8, device=self._device)
            self._communicator.recv([buffer], 0, 0).wait()
            yield unpack(buffer, entries)
            del buffer

    def _connect(self, host: str, port: int, secret: bytes) -> None:
        inner, self._own = pass_gate(host, port, secret)
        self._store = dist.TCPStore(
            LOOPBACK, inner, is_master=False, wait_for_workers=False, timeout=self._timeout
        )
        self._pair = self._store.add("pairs", 1)
        self._communicator = None
        self._address = (host, port, secret)


def publisher(options: PublisherOptions) -> CollectivePublisher:
    return CollectivePublisher(options.host)


def receiver(device: str) -> CollectiveReceiver:
    return CollectiveReceiver(device)


def _communicator(
    store: Any, pair: int, rank: int, device: torch.device, timeout: timedelta, host: str
) -> Any:
    """Two processes: the learner is rank 0, the worker rank 1. gloo listens on ``host`` only."""
    own = dist.PrefixStore(f"pair/{pair}", store)
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(own, rank, 2, options)
    return dist.ProcessGroupGloo(own, rank, 2, gloo_on(host, timeout))


def _signed(secret: bytes, ask: str) -> bytes:
    return proof(secret, ask.encode()).hex().encode() + b" " + ask.encode()


def _opened(secret: bytes, message: bytes) -> str | None:
    """The ask in a message, None when it is not signed with the secret."""
    signature, _, ask = message.partition(b" ")
    genuine = hmac.compare_digest(signature, proof(secret, ask).hex().encode())
    return ask.decode() if genuine else None
