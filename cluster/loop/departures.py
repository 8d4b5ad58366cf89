"""How workers leave: drained because fewer are wanted or their node goes, or lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from cluster.contracts.protocols import WorkerHandle
from cluster.loop.dispatch import Dispatch
from cluster.loop.leases import LeaseBook
from cluster.loop.members import Member, Members
from cluster.loop.recruiting import EventLog, Recruiter


class Departures:
    """``left``: how many are gone for good. ``place``: gives waiting groups to other workers."""

    def __init__(
        self,
        members: Members,
        book: LeaseBook,
        dispatch: Dispatch,
        recruiter: Recruiter,
        event: EventLog,
        place: Callable[[], None],
    ) -> None:
        self._members = members
        self._book = book
        self._dispatch = dispatch
        self._recruiter = recruiter
        self._event = event
        self._place = place
        self.left = 0

    def dismiss(self, member: Member) -> None:
        """One that serves finishes what it holds first; any other is ended at once."""
        if member.status == "serving":
            self._begin_drain(member)
        else:
            self._not_wanted(member)

    def _begin_drain(self, member: Member) -> None:
        self._members.become(member, "draining")
        held = len(self._book.holder(member.index).leases)
        self._event("worker_draining", worker=member.name, leases=held)

    def _not_wanted(self, member: Member) -> None:
        self._recruiter.leave(member)
        if member.served:  # it had served before it was lost
            self.left += 1
            self._event("worker_left", worker=member.name, cause="lost before")

    async def retire(self, member: Member) -> None:
        """A drained one has finished what it held."""
        self._members.become(member, "gone")
        self.left += 1
        self._event("worker_left", worker=member.name)
        await self._recruiter.stop_quietly(member.handle)

    async def lost(
        self,
        member: Member,
        problem: BaseException,
        handle: WorkerHandle,
        *,
        generating: bool = False,
    ) -> None:
        """Release the leases at once, then have the worker replaced.

        ``handle``: whose failure it is. That of an incarnation already replaced changes nothing.
        ``generating``: what it had in hand may be what has killed it.
        """
        # Harvest, submit and swap of one dead process each report it; the first is enough.
        if member.status not in ("serving", "draining") or member.handle is not handle:
            return
        leaving = member.status == "draining"
        self._members.become(member, "gone" if leaving else "starting")
        member.version, member.heard, member.stats = -1, None, {}
        if member.runner and member.runner is not asyncio.current_task():
            member.runner.cancel()
        # Before the restart, so that the other workers have them while this one starts again.
        requeued, killed = self._dispatch.release(member.index, problem if generating else None)
        self._place()
        if leaving:
            self.left += 1
            self._event("worker_left", worker=member.name, cause=str(problem))
            await self._recruiter.stop_quietly(member.handle)
            return
        self._recruiter.note_loss(member, problem, requeued)
        self._recruiter.replace(member, problem, blameless=killed)
