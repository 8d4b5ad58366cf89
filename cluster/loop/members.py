"""The workers of a run as the pool knows them: each one's process, status and history.

A worker's life:  starting -> serving -> (draining ->) gone
                   ^   ^          |
                   |   +-- lost --+
                   |              | too often
                   +-- broken <---+    (it is tried again when its losses are forgiven)
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from cluster.contracts.protocols import WorkerHandle
from cluster.loop.leases import LeaseBook
from cluster.loop.supervision import Loss

Status = Literal["starting", "serving", "draining", "broken", "gone"]


@dataclass(slots=True)
class Member:
    """One worker over all its incarnations; ``handle`` is the process it has now."""

    index: int
    handle: WorkerHandle
    status: Status = "starting"
    version: int = -1  # of the weights it holds; -1: none that were verified
    node: str = ""  # of the machine it runs on, as its start said
    waits_for: str = ""  # while it starts: what for, for a person
    losses: list[Loss] = field(default_factory=list)
    mismatches: Counter[int] = field(default_factory=Counter)  # by version that did not verify
    refused: BaseException | None = None  # why it could not start the last time
    served: bool = False  # at least once
    bringing: asyncio.Task[None] | None = None  # makes it serve
    runner: asyncio.Task[None] | None = None  # collects its results
    heard: float | None = None  # when its process last answered; None: it has not begun to serve
    stats: Mapping[str, float] = field(default_factory=dict)  # its counters, as it last told them
    finished: int = 0  # groups it handed back, with scores
    swap: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def name(self) -> str:
        return self.handle.name


class Members:
    """All that there ever were, in order. Nothing else changes a status, so that the counts and
    the lease book, which gives groups to serving members only, always agree with it."""

    def __init__(self, book: LeaseBook, changed: Callable[[], None] = lambda: None) -> None:
        self._book = book
        self._changed = changed  # called after every change of a status
        self._all: list[Member] = []
        self._counts: Counter[Status] = Counter()

    def __iter__(self) -> Iterator[Member]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, index: int) -> Member:
        return self._all[index]

    def add(self, factory: Callable[[int, int], WorkerHandle]) -> Member:
        """A new member, whose first process begins to start."""
        index = len(self._all)
        member = Member(index=index, handle=factory(index, 0))
        self._all.append(member)
        self._counts[member.status] += 1
        return member

    def become(self, member: Member, status: Status) -> None:
        self._counts[member.status] -= 1
        self._counts[status] += 1
        member.status = status
        if status == "serving":
            self._book.open(member.index)
        else:
            self._book.close(member.index)
        self._changed()

    def those(self, *statuses: Status) -> list[Member]:
        return [member for member in self._all if member.status in statuses]

    def count(self, *statuses: Status) -> int:
        """Costs the same with any number of members."""
        return sum(self._counts[status] for status in statuses)
