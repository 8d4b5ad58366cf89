"""Takes a run off nodes that are about to go: workers are drained, the others' work is saved."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from cluster.machine.draining import LeavingNode, leaving_nodes
from cluster.machine.event_loop import in_own_thread

LOOK_S = 3.0
RESERVE_S = 5.0  # of a node's deadline, so that leases pass on before it goes
LONGEST_S = 600.0  # for a worker to finish what it holds where no deadline was set


class Drained(Protocol):
    """The pool: ``who`` is a worker or a node id; returns how many workers left."""

    async def drain(self, who: str, deadline_s: float) -> int: ...


class LeavingWatch:
    """``home(node)``: which of learner and reward service run there. ``save``: asks for a
    checkpoint after the step under way."""

    def __init__(
        self,
        pool: Drained,
        event: Callable[..., None],
        home: Callable[[LeavingNode], Sequence[str]],
        save: Callable[[], None],
        leaving: Callable[[], Sequence[LeavingNode]] = leaving_nodes,
    ) -> None:
        self._pool = pool
        self._event = event
        self._home = home
        self._save = save
        self._leaving = leaving
        self._seen: set[str] = set()
        self._drains: set[asyncio.Task[Any]] = set()

    async def run(self) -> None:
        """Until cancelled. A head that does not answer is the business of others."""
        while True:
            try:
                for node in await in_own_thread(self._leaving):
                    if node.id not in self._seen:
                        self._seen.add(node.id)
                        self._take_off(node)
            except Exception as problem:  # watching must not end a run
                self._event("leaving_nodes_unknown", cause=repr(problem))
                return
            await asyncio.sleep(LOOK_S)

    def _take_off(self, node: LeavingNode) -> None:
        roles = list(self._home(node))
        left = node.seconds_left
        self._event(
            "node_leaves",
            node=node.name,
            seconds_left=round(left, 1) if left < LONGEST_S else None,
            roles=roles,
        )
        if roles:
            self._save()
        deadline = max(1.0, min(left - RESERVE_S, LONGEST_S))
        task = asyncio.ensure_future(self._pool.drain(node.id, deadline))
        self._drains.add(task)
        task.add_done_callback(self._drains.discard)
