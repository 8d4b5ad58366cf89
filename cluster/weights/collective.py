"""Weights from the learner's device to the workers' through communicators: NCCL between GPUs, gloo
between processes without one.

    worker                       store (in the learner's process)        learner's threads
    asks         ───────────▶    queue of signed asks           ──────▶  who asked for one version
                 ◀───────────    answer: the group, its rank    ◀──────  is one group
    receives     ◀═══════════════ bucket after bucket, by broadcast ════  sends its snapshot

A group holds exactly the workers that asked (`gathering`), so that workers come and go between two
versions. One that dies, stops or hangs in the middle breaks its group within ``weights.timeout_s``
divided by 4. The others leave it, ask again for what they lack, and get it in a group without the
one that is gone (`groups` keeps the deadlines).

Memory on the learner's device: one copy of the weights in the engine's number type, the snapshot,
so that training goes on while it is sent; two while a worker still takes the version before. On the
worker's device: two buckets.

The store is behind a gate that opens with a secret of the run, and every ask is signed with it; the
secret is in the manifest, which only Ray brings. The tensors themselves travel as torch.distributed
sends them, without encryption: the two ends learn each other's ports from the store.
"""

from __future__ import annotations

import hmac
import itertools
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.contracts.errors import Retryable, WeightMismatch
from cluster.contracts.records import TensorEntry, WeightManifest
from cluster.weights.device_buffer import layout, unpack
from cluster.weights.gate import LOOPBACK, Gate, new_secret, pass_gate, proof
from cluster.weights.gathering import Ask, Gathering, Round
from cluster.weights.groups import Broken, Group, backend_of
from cluster.weights.manifest import buckets_in
from cluster.weights.snapshots import Snapshot, SnapshotCarrier, Snapshots
from cluster.weights.stores import store_on
from cluster.weights.streams import beside, indexed
from cluster.weights.transports import PublisherOptions
from cluster.weights.update import Update

NAME = "collective"
TIMEOUT_S = 120.0
STALL_SHARE = 0.25  # of the deadline: after a broken group there is time for another one
CLOSE_S = 5.0  # for a thread that ends; one that hangs is left behind
IN_FLIGHT = 2  # buckets on their way at once
_STOP = "stop"


class CollectivePublisher:
    """Keeps the retained versions on the device and sends them to whoever asks.

    host: the only address it listens on; on a cluster, this node's address as others see it.
    timeout_s: `weights.timeout_s`.
    """

    on_device = True

    def __init__(self, host: str, timeout_s: float = TIMEOUT_S) -> None:
        self._host = host
        self._timeout = timedelta(seconds=timeout_s)
        self._secret = new_secret()
        self._store: Any = store_on(LOOPBACK, self._timeout)
        self._gate = Gate(host, self._secret, self._store.port)
        self._snapshots = Snapshots()
        self._sender = _Sender(self._store, self._secret, self._snapshots, host, timeout_s)

    def open(self, version: int) -> Update:
        locator = (self._host, self._gate.port, self._secret)
        return Update(version, NAME, SnapshotCarrier(self._snapshots, version, lambda _: locator))

    def retain(self, versions: Collection[int]) -> None:
        self._snapshots.retain(versions)

    def close(self) -> None:
        self._gate.close()
        self._sender.close()
        self._snapshots.clear()


class _Sender:
    """The learner's threads: one that reads the asks, one for each round."""

    def __init__(
        self, store: Any, secret: bytes, snapshots: Snapshots, host: str, timeout_s: float
    ) -> None:
        self._store, self._secret, self._snapshots, self._host = store, secret, snapshots, host
        self._stall_s = timeout_s * STALL_SHARE
        self._groups: dict[tuple[int, ...], tuple[int, Group]] = {}
        self._numbers = itertools.count(1)
        self._gathering = Gathering()
        self._changed = threading.Condition()
        self._closed = False
        self._threads = [
            threading.Thread(target=target, name=f"weights-{name}", daemon=True)
            for target, name in ((self._listen, "asks"), (self._dispatch, "rounds"))
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._store.queue_push("asks", _signed(self._secret, _STOP))
        with self._changed:
            self._closed = True
            self._changed.notify()
            self._gathering.give_up()
        for thread in self._threads:
            thread.join(CLOSE_S)
        for _, group in self._groups.values():
            group.leave(CLOSE_S)

    def _listen(self) -> None:
        store = self._store.clone()  # one that waits lets no other thread use it
        # The thread ends by an ask of our own, so it may wait for as long as the run takes.
        store.set_timeout(timedelta(days=365))
        while (message := _opened(self._secret, store.queue_pop("asks"))) != _STOP:
            if message is None:
                continue  # of nobody who knows the secret
            with self._changed:
                self._gathering.ask(Ask(**json.loads(message)), time.monotonic())
                self._changed.notify()

    def _dispatch(self) -> None:
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                for one in self._gathering.due(now):
                    thread = threading.Thread(
                        target=self._send, args=(one,), name="weights-round", daemon=True
                    )
                    thread.start()
                    self._threads = [t for t in self._threads if t.is_alive()] + [thread]
                self._changed.wait(self._gathering.wakes(now))

    def _send(self, one: Round) -> None:
        store, whole = self._store.clone(), False
        try:
            with self._snapshots.reading(one.version) as snapshot:
                if snapshot is None:
                    for ask in one.asks:
                        store.set(_answer_key(ask.member, ask.number), json.dumps(None))
                else:
                    self._send_buckets(one, store, snapshot)
            whole = True
        except (Broken, RuntimeError):
            # Who is still there asks again, for what it lacks; who is not is replaced by the pool.
            number, group = self._groups.pop(one.members, (0, None))
            if number:
                with suppress(RuntimeError):
                    store.set(_broken_key(number), "1")
            if group is not None:
                group.leave()
        finally:
            with self._changed:
                self._gathering.ended(one, whole)
                self._changed.notify()

    def _send_buckets(self, one: Round, store: Any, snapshot: Snapshot) -> None:
        group = self._group(one, store, snapshot.device)
        with beside(snapshot.device, after=snapshot.ready):
            flying: deque[Any] = deque()
            for bucket in snapshot.buckets[one.first :]:
                if len(flying) == IN_FLIGHT:
                    group.finish(flying.popleft())
                flying.append(group.begin(bucket))
            while flying:
                group.finish(flying.popleft())

    def _group(self, one: Round, store: Any, device: torch.device) -> Group:
        """That of these members: the one they used last, or a new one."""
        number, known = self._groups.get(one.members, (0, None))
        again = known is not None and all(ask.group == number for ask in one.asks)
        if not again:
            with self._changed:
                for members in [m for m in self._groups if set(m) & set(one.members)]:
                    self._groups.pop(members)[1].leave()
            number = next(self._numbers)
        for rank, ask in enumerate(one.asks, 1):
            answer = _Answer(group=number, rank=rank, size=1 + len(one.asks), first=one.first)
            store.set(_answer_key(ask.member, ask.number), json.dumps(asdict(answer)))

        def given_up() -> bool:
            return one.broken or bool(store.check([_broken_key(number)]))

        if again and known is not None:
            known.given_up = given_up
            return known
        made = _made(
            store, number, 0, 1 + len(one.asks), device, self._stall_s, self._host, given_up
        )
        self._groups[one.members] = (number, made)
        return made


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """The group that will bring the buckets from ``first`` on, and the asker's place in it."""

    group: int
    rank: int
    size: int
    first: int


class CollectiveReceiver:
    """One worker's end. device: where the weights are to arrive, "cpu" or "cuda:0"."""

    in_any_process = True

    def __init__(self, device: str = "cpu") -> None:
        self._device = torch.device(device)
        self._address: tuple[str, int, bytes] | None = None
        self._own = ""  # this machine, as the learner sees it
        self._store: Any = None
        self._watch: Any = None  # a connection of its own: one that waits lets nobody else use it
        self._member = 0
        self._asked = 0
        self._busy_s = 0.0  # loading the last update took
        self._group: Group | None = None
        self._group_number = 0

    def fetch(self, manifest: WeightManifest, timeout_s: float) -> Iterator[dict[str, Tensor]]:
        """Tensors on the receiver's device, each bucket in memory of its own.

        On a GPU read them on the stream of `beside`: it is the one whose memory they are, so that
        what is let go is written to again only behind what has read it.
        """
        deadline = time.monotonic() + timeout_s
        try:
            yield from self._fetch(manifest, timeout_s, deadline)
        except (RuntimeError, OSError) as problem:  # torch.distributed's, and the gate's
            self._leave()
            self._address = None
            raise Retryable(
                f"weights of version {manifest.version} did not come through the communicator "
                f"within {timeout_s:.0f} s: {problem}"
            ) from None

    def _fetch(
        self, manifest: WeightManifest, timeout_s: float, deadline: float
    ) -> Iterator[dict[str, Tensor]]:
        self._device = indexed(self._device)  # not before: the engine sets up its GPU itself
        if self._address != tuple(manifest.locator):
            self._leave()
            host, port, secret = manifest.locator
            self._connect(host, port, secret, timeout_s)
        buckets = buckets_in(manifest)
        sizes = [layout(entry.nbytes for entry in entries)[1] for entries in buckets]
        done, busy_s = 0, 0.0
        while done < len(buckets):
            try:
                for number, buffer in self._round(manifest, done, sizes, deadline):
                    if number < done:
                        continue  # another member lacked it
                    done = number + 1
                    given = time.monotonic()
                    yield _views(buffer, buckets[number], manifest)
                    del buffer  # or it would stay alive while the next one comes
                    busy_s += time.monotonic() - given
            except Broken as problem:
                self._leave()
                if time.monotonic() > deadline:
                    raise RuntimeError(str(problem)) from None
            except GeneratorExit:
                self._leave()
                raise
        self._busy_s = busy_s

    def _round(
        self,
        manifest: WeightManifest,
        done: int,
        sizes: Sequence[int],
        deadline: float,
    ) -> Iterator[tuple[int, Tensor]]:
        """The numbers and bytes of the buckets as they come. Raises Broken."""
        answer = self._ask(manifest, done, deadline)
        group = self._join(answer, deadline)
        for number in range(answer.first, len(sizes)):
            # Of its own: whoever takes it may keep it, and what hangs in a group that broke may
            # still write to the buffer that it was given.
            with beside(self._device):
                buffer = torch.empty(sizes[number], dtype=torch.uint8, device=self._device)
                group.finish(group.begin(buffer))
            yield number, buffer
            del buffer

    def _ask(self, manifest: WeightManifest, first: int, deadline: float) -> _Answer:
        self._asked += 1
        ask = Ask(
            member=self._member,
            number=self._asked,
            version=manifest.version,
            first=first,
            group=self._group_number,
            busy_s=self._busy_s,
        )
        # One message, so that a worker that dies here leaves nothing that others would wait for.
        self._store.queue_push("asks", _signed(manifest.locator[2], json.dumps(asdict(ask))))
        key = _answer_key(ask.member, ask.number)
        self._store.wait([key], timedelta(seconds=max(0.01, deadline - time.monotonic())))
        answer = json.loads(self._store.get(key))
        self._store.delete_key(key)
        if answer is None:
            raise Retryable(f"the learner no longer holds weights of version {manifest.version}")
        return _Answer(**answer)

    def _join(self, answer: _Answer, deadline: float) -> Group:
        watch, number = self._watch, answer.group

        def given_up() -> bool:
            return time.monotonic() > deadline or bool(watch.check([_broken_key(number)]))

        if self._group is None or self._group_number != number:
            self._leave()
            stall_s = max(0.1, deadline - time.monotonic())
            self._group_number = number
            self._group = _made(
                self._store,
                number,
                answer.rank,
                answer.size,
                self._device,
                stall_s,
                self._own,
                given_up,
            )
        self._group.given_up = given_up
        return self._group

    def _leave(self) -> None:
        """Give up the group, and say so: the others need not find out by waiting."""
        if self._group_number:
            with suppress(RuntimeError):
                self._watch.set(_broken_key(self._group_number), "1")
        if self._group is not None:
            self._group.leave()
        self._group, self._group_number = None, 0

    def _connect(self, host: str, port: int, secret: bytes, timeout_s: float) -> None:
        def store() -> Any:
            inner, self._own = pass_gate(host, port, secret)
            return dist.TCPStore(
                LOOPBACK,
                inner,
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=timeout_s),
            )

        self._store, self._watch = store(), store()
        self._member = self._store.add("members", 1)
        self._asked = 0
        self._address = (host, port, secret)


def publisher(options: PublisherOptions) -> CollectivePublisher:
    return CollectivePublisher(options.host, options.timeout_s)


def receiver(device: str) -> CollectiveReceiver:
    return CollectiveReceiver(device)


def _made(
    store: Any,
    number: int,
    rank: int,
    size: int,
    device: torch.device,
    stall_s: float,
    host: str,
    given_up: Callable[[], bool],
) -> Group:
    own = dist.PrefixStore(f"group/{number}", store)
    return Group(
        lambda: backend_of(own, rank, size, device, stall_s, host), device, stall_s, given_up
    )


def _views(
    buffer: Tensor, entries: list[TensorEntry], manifest: WeightManifest
) -> dict[str, Tensor]:
    try:
        return unpack(buffer, entries)
    except (ValueError, RuntimeError, AttributeError) as problem:
        raise WeightMismatch(f"weights of version {manifest.version}: {problem}") from None


def _answer_key(member: int, number: int) -> str:
    return f"answer/{member}/{number}"


def _broken_key(group: int) -> str:
    return f"broken/{group}"


def _signed(secret: bytes, ask: str) -> bytes:
    return proof(secret, ask.encode()).hex().encode() + b" " + ask.encode()


def _opened(secret: bytes, message: bytes) -> str | None:
    """The ask in a message, None when it is not signed with the secret."""
    signature, _, ask = message.partition(b" ")
    genuine = hmac.compare_digest(signature, proof(secret, ask).hex().encode())
    return ask.decode() if genuine else None
