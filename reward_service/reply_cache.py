"""A request sent again is answered from the first time, so that retries cost and change nothing."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.contracts.records import Score
from reward_service.batching import Job

SCORE_BYTES, PART_BYTES = 700, 200  # of Python's objects, names and numbers included


class RequestMismatch(Exception):
    """The same request id was used for other items."""


@dataclass(slots=True)
class _Entry:
    digest: bytes
    job: Job
    size: int = 0  # of its reply, once there is one


class ReplyCache:
    """Jobs by request id, the least recently asked forgotten first; failed ones are not kept.

    A repeat that comes while the first is still being scored joins it, and its later deadline
    counts. ``size`` bounds their number, ``most_bytes`` what their replies take together.
    """

    def __init__(self, size: int = 1024, most_bytes: int = 16 * 2**20) -> None:
        self._size = size
        self._most_bytes = most_bytes
        self._bytes = 0
        self._jobs: OrderedDict[str, _Entry] = OrderedDict()
        self._lock = threading.RLock()  # a job may be done at once, and is counted then

    def job(self, request_id: str, digest: bytes, deadline: float, start: Callable[[], Job]) -> Job:
        """The job of this id, begun with ``start`` if there is none that succeeded or may still."""
        with self._lock:
            known = self._jobs.get(request_id)
            if known is not None and _failed(known.job):
                self._forget(request_id)
                known = None
            if known is None:
                job = start()
                self._jobs[request_id] = entry = _Entry(digest, job)
                job.future.add_done_callback(lambda _: self._count(request_id, entry))
                self._forget_oldest()
                return job
            if known.digest != digest:
                raise RequestMismatch(f"request id {request_id!r} was used before with other items")
            self._jobs.move_to_end(request_id)
            known.job.deadline = max(known.job.deadline, deadline)
            return known.job

    def _count(self, request_id: str, entry: _Entry) -> None:
        with self._lock:
            if self._jobs.get(request_id) is entry and not _failed(entry.job):
                entry.size = sum(map(_bytes_of, entry.job.future.result()))
                self._bytes += entry.size
                self._forget_oldest()

    def _forget_oldest(self) -> None:
        while len(self._jobs) > self._size or self._bytes > self._most_bytes:
            self._forget(next(iter(self._jobs)))

    def _forget(self, request_id: str) -> None:
        self._bytes -= self._jobs.pop(request_id).size


def _bytes_of(score: Score) -> int:
    names: list[Any] = [*score.parts, *score.vetoes]
    return SCORE_BYTES + sum(PART_BYTES + len(name) for name in names)


def _failed(job: Job) -> bool:
    return job.future.done() and job.future.exception() is not None
