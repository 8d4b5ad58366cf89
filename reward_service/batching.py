"""Micro-batching: requests of many clients are scored together, by one thread.

``BatchQueue`` decides (no thread, the time is an argument); ``Coalescer`` waits and scores.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from cluster.contracts.errors import RewardFailure
from cluster.contracts.records import Score
from reward_service.source import ScoreItem

ScoreItems = Callable[[Sequence[ScoreItem]], list[Score]]


class Overloaded(Exception):
    """More is waiting than the queue may hold; the caller should come back later."""


class DeadlinePassed(Exception):
    """Nobody waits for this work any more, so it was not scored."""


@dataclass(eq=False, slots=True)
class Job:
    """One request. ``deadline`` (monotonic seconds) moves back when the client asks again."""

    items: Sequence[ScoreItem]
    deadline: float
    future: Future[list[Score]] = field(default_factory=Future)

    def settle(self, outcome: list[Score] | Exception) -> None:
        """Answer who waits, and let go of the items: the reply may be kept for long."""
        self.items = ()
        if isinstance(outcome, Exception):
            self.future.set_exception(outcome)
        else:
            self.future.set_result(outcome)


class BatchQueue:
    """First in, first out. A batch is due when full or when its oldest job waited long enough."""

    def __init__(self, max_batch: int, max_wait_s: float, max_pending: int) -> None:
        self._max_batch = max_batch
        self._max_wait_s = max_wait_s
        self._max_pending = max_pending
        self._jobs: deque[tuple[float, Job]] = deque()
        self.pending = 0

    def add(self, job: Job, now: float) -> None:
        """Raises Overloaded; a job alone is always taken, whatever its size."""
        if self._jobs and self.pending + len(job.items) > self._max_pending:
            raise Overloaded(f"{self.pending} items are waiting, the limit is {self._max_pending}")
        self._jobs.append((now, job))
        self.pending += len(job.items)

    def wait_s(self, now: float) -> float | None:
        """Seconds until a batch is due (0: now); None when nothing waits."""
        if not self._jobs:
            return None
        if self.pending >= self._max_batch:
            return 0.0
        return max(0.0, self._jobs[0][0] + self._max_wait_s - now)

    def take(self, now: float) -> tuple[list[Job], list[Job]]:
        """(jobs of the next batch, jobs whose deadline passed). A job is never split, so one that
        is larger than a batch comes alone."""
        batch: list[Job] = []
        expired: list[Job] = []
        size = 0
        while self._jobs:
            job = self._jobs[0][1]
            alive = job.deadline > now
            if alive and batch and size + len(job.items) > self._max_batch:
                break
            self._jobs.popleft()
            self.pending -= len(job.items)
            if alive:
                batch.append(job)
                size += len(job.items)
            else:
                expired.append(job)
        return batch, expired

    def drain(self) -> list[Job]:
        jobs = [job for _, job in self._jobs]
        self._jobs.clear()
        self.pending = 0
        return jobs


class Coalescer:
    """Owns the scoring thread. An error hits only its own request: when a batch of several fails,
    each is scored again alone (not for a RewardFailure, which is nobody's own and takes time)."""

    def __init__(
        self,
        score: ScoreItems,
        *,
        max_batch: int,
        max_wait_s: float,
        max_pending: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._score = score
        self._max_batch = max_batch
        self._clock = clock
        self._queue = BatchQueue(max_batch, max_wait_s, max_pending or 64 * max_batch)
        self._changed = threading.Condition()
        self._closed = False
        self.batches = 0
        self.items = 0
        self._thread = threading.Thread(target=self._run, name="accord-scoring", daemon=True)
        self._thread.start()

    def submit(self, items: Sequence[ScoreItem], deadline: float) -> Job:
        """Queue one request; its future gets the scores, a scorer's error or DeadlinePassed."""
        job = Job(items, deadline)
        with self._changed:
            if self._closed:
                raise Overloaded("the service is shutting down")
            self._queue.add(job, self._clock())
            self._changed.notify()
        return job

    def close(self, timeout_s: float = 10.0) -> bool:
        """Fail what waits, let the batch being scored finish; False when it did not in time."""
        with self._changed:
            self._closed = True
            waiting = self._queue.drain()
            self._changed.notify()
        for job in waiting:
            job.settle(Overloaded("the service is shutting down"))
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closed:
                    wait = self._queue.wait_s(self._clock())
                    if wait is not None and wait <= 0:
                        break
                    self._changed.wait(wait)
                if self._closed:
                    return
                batch, expired = self._queue.take(self._clock())
            for job in expired:
                job.settle(DeadlinePassed("its deadline passed before it was scored"))
            if batch:
                self._score_jobs(batch)

    def _score_jobs(self, jobs: Sequence[Job]) -> None:
        items = [item for job in jobs for item in job.items]
        self.batches += 1
        self.items += len(items)
        try:
            scores = self._score_in_chunks(items)
        except BaseException as error:  # handed on to whoever asked; this thread must live on
            if len(jobs) == 1 or isinstance(error, RewardFailure):
                for job in jobs:
                    job.settle(_plain_exception(error))
                return
            for job in jobs:
                self._score_jobs([job])
            return
        start = 0
        for job in jobs:
            end = start + len(job.items)
            job.settle(scores[start:end])
            start = end

    def _score_in_chunks(self, items: Sequence[ScoreItem]) -> list[Score]:
        scores: list[Score] = []
        for start in range(0, len(items), self._max_batch):
            chunk = items[start : start + self._max_batch]
            answer = self._score(chunk)
            if len(answer) != len(chunk):
                raise RuntimeError(f"the scorer gave {len(answer)} scores for {len(chunk)} items")
            scores += answer
        return scores


def _plain_exception(error: BaseException) -> Exception:
    return error if isinstance(error, Exception) else RuntimeError(repr(error))
