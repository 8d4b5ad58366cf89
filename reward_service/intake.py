"""How requests come into memory: few at a time, and together they take a bounded part of it.

gRPC by itself reads a message whole before it asks who sent it, and as many at a time as there are
threads. Here a message is read when its sender is known and when there is room for what it becomes.
"""

from __future__ import annotations

import ctypes
import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError

from reward_service import wire
from reward_service.batching import Overloaded
from reward_service.proto import reward_pb2 as pb
from reward_service.source import ScoreItem

READERS = 2
READ_S = 20.0  # for one message to arrive; who sends more slowly would keep the others waiting
ROOM_BYTES = 32 * 2**20  # of all requests that are being scored or wait for it

M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # <malloc.h>


def return_freed_memory() -> None:
    """From now on this process gives a large message's memory back to the system when it is done
    with it. The C library would keep it, in a heap of its own for every thread that had one."""
    with suppress(OSError, AttributeError):  # another C library, which has no such call
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 128 * 1024)
        mallopt(M_ARENA_MAX, 2)


class Room:
    """A number of bytes that is lent. Thread-safe."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._lent = 0
        self._changed = threading.Condition()

    def take(self, amount: int, timeout_s: float) -> Loan:
        """Waits for room; who asks for more than there is gets it when nobody else has any. Raises
        Overloaded when the time is over."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._fits(amount), timeout_s):
                raise Overloaded(
                    f"requests of {self._lent >> 20} MiB are waiting, the limit is "
                    f"{self._size >> 20} MiB"
                )
            self._lent += amount
        return Loan(self, amount)

    def _fits(self, amount: int) -> bool:
        return self._lent == 0 or self._lent + amount <= self._size

    def give_back(self, amount: int) -> None:
        with self._changed:
            self._lent -= amount
            self._changed.notify_all()


@dataclass(slots=True)
class Loan:
    room: Room
    amount: int

    def end(self) -> None:
        """Idempotent."""
        amount, self.amount = self.amount, 0
        if amount:
            self.room.give_back(amount)


@dataclass(frozen=True, slots=True)
class Read:
    """A request in memory. ``loan`` is the reader's to end; ``digest``: of the bytes as sent."""

    request_id: str
    items: list[ScoreItem]
    digest: bytes
    loan: Loan


class Intake:
    def __init__(self, readers: int = READERS, room: int = ROOM_BYTES) -> None:
        self._readers = threading.BoundedSemaphore(readers)
        self._room = Room(room)

    def read(self, messages: Iterator[bytes], context: Any, timeout_s: float) -> Read:
        """The one message of a call. Raises Overloaded when there is no room in time, and
        wire.BadRequest for what breaks the protocol."""
        end = time.monotonic() + timeout_s
        if not self._readers.acquire(timeout=timeout_s):
            raise Overloaded("too many requests are being read")
        try:
            data = _next(messages, context)
            request = _parsed(data)
            wire.check_request(request)
            loan = self._room.take(
                wire.memory_of(request, len(data)), max(0.0, end - time.monotonic())
            )
            try:
                items = wire.decode_request(request)
                return Read(request.request_id, items, hashlib.sha256(data).digest(), loan)
            except BaseException:
                loan.end()
                raise
        finally:
            self._readers.release()


def _next(messages: Iterator[bytes], context: Any) -> bytes:
    watch = threading.Timer(READ_S, context.cancel)
    watch.daemon = True
    watch.start()
    try:
        return next(messages)
    except StopIteration:
        raise wire.BadRequest("the call carries no message") from None
    finally:
        watch.cancel()


def _parsed(data: bytes) -> pb.ScoreRequest:
    try:
        return pb.ScoreRequest.FromString(data)
    except DecodeError as problem:
        raise wire.BadRequest(f"not a ScoreRequest: {problem}") from None
