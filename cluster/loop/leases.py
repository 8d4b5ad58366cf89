"""Which worker holds which group, and who has the least to do: O(log workers) a group.

Plain accounting of the pool: no asyncio, no clock of its own.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cluster.contracts.records import Assignment

# Counters a worker reports since its own start; what else it reports is a gauge.
COUNTERS = frozenset(
    ("generated_tokens", "busy_s", "wait_s", "cpu_s", "score_s", "swaps", "swap_pause_s")
)


@dataclass(slots=True)
class Holder:
    """What one worker has in hand. ``open``: whether it may be given more. ``sampled``: how many
    of its ``samples`` are finished, though their groups are not."""

    open: bool = False
    samples: int = 0
    sampled: int = 0
    leases: dict[int, Assignment] = field(default_factory=dict)
    since: dict[int, float] = field(default_factory=dict)  # when each lease began

    @property
    def load(self) -> int:
        """Samples that it has to decode."""
        return max(0, self.samples - self.sampled)


class LeaseBook:
    """Leases of all workers, found by fewest samples to decode, then by lowest worker number.

    ``most``: a worker that has so many samples to decode is given no more. What it cannot decode
    yet is better kept: an older group may come back from a lost worker, a faster worker may be free
    first, and newer weights may be there by then. None: no limit.

    The heap keeps an entry for every load an open worker has had; entries that are no longer so
    are passed over when they come up, and cleared out when they outnumber the workers.
    """

    def __init__(self, now: Callable[[], float], most: int | None = None) -> None:
        self._now = now
        self._most = most
        self._holders: dict[int, Holder] = {}
        self._heap: list[tuple[int, int]] = []  # (samples to decode, worker number)
        self._holding = 0  # open workers with a lease
        self._holding_s = 0.0
        self._since = 0.0
        self.leased = 0
        self.took_s: list[float] = []  # how long each lease lasted that has ended with an answer

    def holder(self, index: int) -> Holder:
        return self._holders.setdefault(index, Holder())

    def open(self, index: int) -> None:
        """From now on this worker may be given groups."""
        self.holder(index).open = True
        self._offer(index)

    def close(self, index: int) -> None:
        """No more groups for this worker; it keeps what it has."""
        self.holder(index).open = False

    def give(self, assignment: Assignment) -> int | None:
        """Lease a group to the open worker with the fewest samples to decode; None without one that
        may be given more."""
        index = self._lightest()
        if index is None:
            return None
        holder = self._lease(index, assignment)
        # `_lightest` left this worker's entry on top: replaced in one operation, not two.
        heapq.heapreplace(self._heap, (holder.load, index))
        return index

    def give_to(self, index: int, assignment: Assignment) -> None:
        """Lease a group to this open worker, whatever it holds."""
        self._lease(index, assignment)
        self._offer(index)

    def _lease(self, index: int, assignment: Assignment) -> Holder:
        holder = self._holders[index]
        if not holder.leases:
            self._count_holding(1)
        holder.leases[assignment.group_id] = assignment
        holder.since[assignment.group_id] = self._now()
        holder.samples += assignment.samples
        self.leased += 1
        return holder

    def take(self, index: int, group_id: int, attempt: int = 0) -> Assignment | None:
        """End a lease; None when this worker does not hold the group, or for another attempt."""
        holder = self._holders[index]
        assignment = holder.leases.get(group_id)
        if assignment is None or assignment.attempt != attempt:
            return None
        del holder.leases[group_id]
        self.took_s.append(self._now() - holder.since.pop(group_id))
        holder.samples -= assignment.samples
        self.leased -= 1
        if not holder.leases:
            self._count_holding(-1)
        self._offer(index)
        return assignment

    def progress(self, index: int, sampled: int) -> None:
        """So many of the worker's samples are finished, of groups that it still holds."""
        holder = self._holders[index]
        if sampled != holder.sampled:
            holder.sampled = sampled
            self._offer(index)

    def take_all(self, index: int) -> list[Assignment]:
        """End all leases of a worker, in the order they were given, and close it."""
        holder = self.holder(index)
        taken = list(holder.leases.values())
        if taken:
            self._count_holding(-1)
        self.leased -= len(taken)
        self._holders[index] = Holder()  # its entries in the heap are outdated by that
        return taken

    def holding_s(self) -> float:
        """Seconds that workers held at least one group, summed over the workers."""
        self._count_holding(0)
        return self._holding_s

    def _count_holding(self, change: int) -> None:
        now = self._now()
        self._holding_s += self._holding * (now - self._since)
        self._since = now
        self._holding += change

    def _offer(self, index: int) -> None:
        holder = self._holders[index]
        if holder.open:
            heapq.heappush(self._heap, (holder.load, index))
            if len(self._heap) > 4 * len(self._holders) + 64:
                self._heap = [(h.load, i) for i, h in self._holders.items() if h.open]
                heapq.heapify(self._heap)

    def _lightest(self) -> int | None:
        """The worker on top of the heap, once outdated entries are gone from there; None where even
        that one has enough."""
        while self._heap:
            load, index = self._heap[0]
            holder = self._holders[index]
            if holder.open and holder.load == load:
                return index if self._most is None or load < self._most else None
            heapq.heappop(self._heap)
        return None


class CounterSums:
    """Workers' counters added up, kept with each report: O(counters), whatever the workers.

    A worker that was restarted counts from zero again; what it had counted before stays in.
    """

    def __init__(self) -> None:
        self.totals: dict[str, float] = {}
        self._last: dict[int, tuple[int, Mapping[str, float]]] = {}

    def report(self, index: int, incarnation: int, stats: Mapping[str, float]) -> None:
        last_incarnation, before = self._last.get(index, (incarnation, {}))
        if last_incarnation != incarnation:
            before = {}  # another process: it counts from zero
        for name, value in stats.items():
            if name in COUNTERS:
                self.totals[name] = self.totals.get(name, 0.0) + value - before.get(name, 0.0)
        self._last[index] = (incarnation, stats)
