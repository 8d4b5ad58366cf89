"""Which worker is given which group, and what becomes of a group whose worker is lost."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from cluster.contracts.errors import EngineFailure, Fatal, Unexpected, WorkerDied
from cluster.contracts.records import Assignment, GroupMeta
from cluster.loop.leases import LeaseBook
from cluster.loop.supervision import WINDOW_S
from cluster.loop.suspects import Suspects

MOST_SET_ASIDE = 3  # prompts within ``WINDOW_S``
KILLS = (EngineFailure, WorkerDied, Unexpected)  # losses that a prompt may have caused


class Dispatch:
    """Groups that wait, those that are leased, and those whose prompt may kill.

    ``set_aside``: ids of prompts that no worker is given, with the cause; ``left_out`` is called
    with each group that is not given out because of it.
    """

    def __init__(
        self,
        book: LeaseBook,
        now: Callable[[], float],
        event: Callable[..., None],
        left_out: Callable[[GroupMeta], None],
        set_aside: Mapping[str, str],
        most_scorings: int,
    ) -> None:
        self._book = book
        self._now = now
        self._event = event
        self._left_out = left_out
        self._set_aside = dict(set_aside)
        self._most_scorings = most_scorings
        self._waiting: list[tuple[int, int, Assignment]] = []  # a heap: the oldest group first
        self._suspects = Suspects()
        self._convicted: list[float] = []  # when
        self._late: set[int] = set()  # groups that were not finished in time, once
        self._failed_scorings: Counter[int] = Counter()  # by group, until it is finished

    @property
    def waiting(self) -> int:
        """Groups that no worker has."""
        return len(self._waiting) + len(self._suspects.waiting)

    def add(self, assignments: Sequence[Assignment]) -> None:
        """Have these groups wait for a worker."""
        for assignment in assignments:
            if (cause := self._set_aside.get(assignment.prompt.id)) is not None:
                self._suspects.clear(assignment.group_id)
                self._left_out(_left_out_meta(assignment, cause))
            elif assignment.group_id in self._suspects:
                self._suspects.waiting.append(assignment)
            else:
                key = (assignment.group_id, assignment.attempt)
                heapq.heappush(self._waiting, (*key, assignment))

    def shares(self, serving: Callable[[], Sequence[int]]) -> dict[int, list[Assignment]]:
        """Lease what waits, the oldest group first, to the workers that serve, fewest samples to
        decode first; by worker."""
        shares: dict[int, list[Assignment]] = {}
        workers = serving() if self._suspects.waiting else ()  # not asked for each group
        while (turn := self._suspects.next_for(workers)) is not None:
            worker, assignment = turn
            self._book.give_to(worker, assignment)
            shares.setdefault(worker, []).append(assignment)
        while self._waiting:
            assignment = self._waiting[0][-1]
            taker = self._book.give(assignment)
            if taker is None:  # nobody is free: whoever joins or finishes some asks again
                break
            heapq.heappop(self._waiting)
            shares.setdefault(taker, []).append(assignment)
        return shares

    def take(self, worker: int, meta: GroupMeta) -> Assignment | None:
        """End the lease of a group that has come; None when this worker does not hold it."""
        lease = self._book.take(worker, meta.group_id, meta.attempt)
        if lease is not None:
            self._suspects.clear(meta.group_id)
            if not meta.late:
                self._late.discard(meta.group_id)
            if not meta.retryable:
                self._failed_scorings.pop(meta.group_id, None)
        return lease

    def score_again(self, lease: Assignment, cause: str) -> Assignment:
        """The group anew, to be added again. Raises Fatal the last time. Worker losses have a count
        of their own: they say nothing of the reward service."""
        group = lease.group_id
        self._failed_scorings[group] += 1
        self._event("group_retried", group=group, cause=cause)
        if (times := self._failed_scorings[group]) >= self._most_scorings:
            raise Fatal(f"group {group} failed {times} times: {cause}")
        return replace(lease, attempt=lease.attempt + 1)

    def once_more(self, lease: Assignment, cause: str) -> Assignment:
        """A group that was not finished in time, anew, to be added again. The second time its
        prompt is set aside, so that it is left out then. Raises Fatal when this comes to many."""
        if lease.group_id not in self._late:
            self._late.add(lease.group_id)
            self._event("group_late", group=lease.group_id, cause=cause)
        else:
            self._late.remove(lease.group_id)
            if not self._may_convict():
                raise Fatal(
                    f"more than {MOST_SET_ASIDE} prompts were too late twice within "
                    f"{WINDOW_S:.0f} s: {cause}. Either the engines are too slow for this limit, "
                    "or they do not finish what they begin"
                )
            self._convict(lease, f"it was too late twice; the last time, {cause}")
        return replace(lease, attempt=lease.attempt + 1)

    def release(self, worker: int, problem: BaseException | None) -> tuple[int, bool]:
        """A worker is lost: what it held waits again. Returns how many groups that were, and
        whether a prompt is known to have killed it.

        ``problem``: what it died of, if what it had in hand can have caused that.
        """
        orphans = [replace(a, attempt=a.attempt + 1) for a in self._book.take_all(worker)]
        killed = isinstance(problem, KILLS) and self._blame(orphans, problem)
        for orphan in orphans:
            self._suspects.given_back(orphan.group_id)
        self.add(orphans)
        return len(orphans), killed

    def _blame(self, held: Sequence[Assignment], problem: BaseException) -> bool:
        """Set aside the prompt that has killed the worker; False while it is not known which."""
        if not self._may_convict():  # then it is something else that kills workers
            return False
        guilty = self._suspects.blame(held)
        if guilty is None:
            return False
        self._convict(guilty, f"it killed two workers that had it in hand; the last one: {problem}")
        return True

    def _may_convict(self) -> bool:
        now = self._now()
        self._convicted = [at for at in self._convicted if now - at <= WINDOW_S]
        return len(self._convicted) < MOST_SET_ASIDE

    def _convict(self, guilty: Assignment, cause: str) -> None:
        """Give the prompt to no worker any more."""
        self._convicted.append(self._now())
        prompt = guilty.prompt
        self._set_aside[prompt.id] = cause
        detail = {"prompt": prompt.id, "where": prompt.where, "group": guilty.group_id}
        self._event("prompt_set_aside", **detail, cause=cause)


def _left_out_meta(assignment: Assignment, cause: str) -> GroupMeta:
    return GroupMeta(
        group_id=assignment.group_id,
        attempt=assignment.attempt,
        samples=0,
        prompt_tokens=len(assignment.prompt.token_ids),
        response_tokens=0,
        version_min=-1,
        version_max=-1,
        failure=cause,
    )
