"""A request sent again is answered from the first time, so that retries cost and change nothing."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

from reward_service.batching import Job


class RequestMismatch(Exception):
    """The same request id was used for other items."""


class ReplyCache:
    """Jobs by request id, the least recently asked forgotten first; failed ones are not kept.

    A repeat that comes while the first is still being scored joins it, and its later deadline
    counts.
    """

    def __init__(self, size: int = 1024) -> None:
        self._size = size
        self._jobs: OrderedDict[str, tuple[bytes, Job]] = OrderedDict()
        self._lock = threading.Lock()

    def job(self, request_id: str, digest: bytes, deadline: float, start: Callable[[], Job]) -> Job:
        """The job of this id, begun with ``start`` if there is none that succeeded or may still."""
        with self._lock:
            known = self._jobs.get(request_id)
            if known is not None and _failed(known[1]):
                known = None
            if known is None:
                job = start()
                self._jobs[request_id] = (digest, job)
                self._forget_oldest()
                return job
            known_digest, job = known
            if known_digest != digest:
                raise RequestMismatch(f"request id {request_id!r} was used before with other items")
            self._jobs.move_to_end(request_id)
            job.deadline = max(job.deadline, deadline)
            return job

    def _forget_oldest(self) -> None:
        while len(self._jobs) > self._size:
            self._jobs.popitem(last=False)


def _failed(job: Job) -> bool:
    return job.future.done() and job.future.exception() is not None
