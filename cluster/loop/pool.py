"""The rollout workers of a run: who holds which group, who is lost, who may serve.

A group is leased to one incarnation of one worker. When that is lost, its groups are leased again
with ``attempt + 1``; what the lost one may still send is refused by its incarnation. A worker
serves only after it holds the current weights, verified; a late joiner is no special case.

How many workers there are to be is a wish (``resize``), which ``recruiting`` pursues for as long as
it takes. While fewer than ``min_workers`` serve, groups wait.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, cast

from cluster.contracts.deadlines import within
from cluster.contracts.errors import (
    Fault,
    MachineLost,
    Retryable,
    WeightMismatch,
    WeightsAway,
)
from cluster.contracts.live import WorkerStatus
from cluster.contracts.protocols import Clock, WorkerHandle
from cluster.contracts.records import Assignment, GroupMeta, Harvest, SwapReport, WeightManifest
from cluster.loop.beside import Sampled, Wanted, sample_beside
from cluster.loop.departures import Departures
from cluster.loop.dispatch import Dispatch
from cluster.loop.harvesting import Harvesting
from cluster.loop.leases import LeaseBook
from cluster.loop.live import PoolFacts, WorkerFacts
from cluster.loop.members import Member, Members, Status
from cluster.loop.recruiting import EventLog, Recruiter
from cluster.loop.settings import PoolSettings
from cluster.loop.shortage import Shortage

Finished = tuple[Harvest, list[GroupMeta]]


class WorkerPool:
    """Drives workers through ``WorkerHandle``; knows nothing of Ray."""

    def __init__(
        self,
        factory: Callable[[int, int], WorkerHandle],
        settings: PoolSettings,
        clock: Clock,
        event: EventLog,
        on_swap: Callable[[str, SwapReport, float, float], None] = lambda *_: None,
        set_aside: Mapping[str, str] | None = None,
    ) -> None:
        """``set_aside``: ids of prompts that no worker is given any more, with the cause."""
        self._settings = settings
        self._clock = clock
        self._event = event
        self._on_swap = on_swap  # worker's name, its report, when it was asked and when it was done
        self._book = LeaseBook(clock.now, settings.most_samples)
        self._members = Members(self._book, self._look_at_the_count)
        self._recruiter = Recruiter(
            factory, settings, clock, event, self._members, self._serve, self._end
        )
        self._shortage = Shortage(
            self._members,
            lambda: self._recruiter.least,
            settings.workers_timeout_s,
            clock,
            event,
            self._end,
        )
        self._dispatch = Dispatch(
            self._book,
            clock.now,
            event,
            self._left_out,
            set_aside or {},
            settings.max_attempts,
        )
        self._departures = Departures(
            self._members, self._book, self._dispatch, self._recruiter, event, self._place
        )
        self._harvesting = Harvesting(
            settings,
            clock,
            event,
            self._members,
            self._book,
            self._dispatch,
            self._recruiter.faults,
            finished=self._finished,
            again=self.submit,
            retire=self._departures.retire,
            lost=self._departures.lost,
            end=self._end,
        )
        self._news: list[Finished] = []
        self._on_news: Callable[[], None] = lambda: None
        self._problem: BaseException | None = None  # what ended the pool
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self.failed_swaps = 0

    # -- what the controller uses -----------------------------------------------------------------

    def weights_come_from(self, source: Callable[[], Awaitable[None]]) -> None:
        """``source`` answers while the learner is there; asked when a worker cannot get weights."""
        self._recruiter.weights.source = source

    def weights_lost(self) -> None:
        """The learner that published the current weights is lost."""
        self._recruiter.weights.lost()

    async def start(self, count: int, first: Awaitable[WeightManifest]) -> None:
        """Start ``count`` workers. Returns when all serve, or when ``min_workers`` do and the
        others have failed once or waited for ``start_timeout_s``: those come later.

        ``first``: the first published weights. Workers build their engines before they are there.
        Raises what kept all of them from starting.
        """
        self._recruiter.weights.first = asyncio.ensure_future(first)
        await self.resize(count)
        try:
            tried = self._until(
                lambda: all(m.served or m.refused or m.status != "starting" for m in self._members)
            )
            await within(self._settings.start_timeout_s, tried)
        except TimeoutError:
            pass
        await self._until(lambda: self.count("serving") >= self._recruiter.least)

    async def resize(self, count: int) -> None:
        """Want ``count`` workers from now on; returns at once. Those that are too many and serve
        are drained; the others of them are ended."""
        self._recruiter.wanted = count
        have = self._members.those("broken", "starting", "serving")
        for _ in range(count - len(have)):
            self._recruiter.add()
        # Last those that serve, and of these last the oldest.
        order: list[Status] = ["broken", "starting", "serving"]
        have.sort(key=lambda member: (order.index(member.status), -member.index))
        for member in have[: max(0, len(have) - count)]:
            self._departures.dismiss(member)
        self._look_at_the_count()

    async def drain(self, who: str, deadline_s: float) -> int:
        """End the members named ``who`` or running on the node ``who``, after they have finished
        what they hold; what they hold after ``deadline_s`` seconds goes to others. As many workers
        as before stay wanted, so others are started in their place. Returns how many it were."""
        leaving = [
            member
            for member in self._members.those("starting", "serving")
            if who in (member.name, member.node)
        ]
        for member in leaving:
            self._departures.dismiss(member)
        await self.resize(self._recruiter.wanted)
        gone = self._until(lambda: all(m.status == "gone" for m in leaving))
        try:
            await asyncio.wait_for(gone, deadline_s)
        except TimeoutError:
            for member in leaving:
                late = MachineLost(f"not drained within {deadline_s:.0f} s")
                await self._departures.lost(member, late, member.handle)
        return len(leaving)

    def submit(self, assignments: Sequence[Assignment]) -> None:
        """Lease each group to the serving worker with the fewest samples to decode, and send it. A
        group waits while all of them have enough.

        Returns at once: a worker that is slow to take its share holds up nobody else.
        """
        self._dispatch.add(assignments)
        self._place()

    def on_news(self, call: Callable[[], None]) -> None:
        """``call`` whenever ``take_finished`` has something to give."""
        self._on_news = call

    def take_finished(self) -> list[Finished]:
        """What has finished since the last call (groups of live leases only), in order of arrival.

        Raises what ended the pool: WorkersGone when too few workers serve and nothing else is
        wrong.
        """
        if self._problem is not None:
            raise self._problem
        finished, self._news = self._news, []
        return finished

    async def broadcast(self, manifest: WeightManifest) -> list[SwapReport]:
        """Bring every serving worker to ``manifest``; returns once all of them hold it, and every
        joiner that cannot keep up (``current_weights``). Raises WeightsAway when the learner is
        gone before some of them have it."""
        self._recruiter.weights.manifest = manifest
        members = [
            m for m in self._members.those("serving", "draining") if m.version < manifest.version
        ]
        answers = await asyncio.gather(*(self._swap(m, manifest) for m in members))
        await self._recruiter.weights.joined()
        if away := next((a for a in answers if isinstance(a, WeightsAway)), None):
            raise away
        return [report for report in answers if isinstance(report, SwapReport)]

    async def sample(self, wanted: Wanted) -> Sampled:
        """Completions that nothing is trained on, from the serving workers beside their groups."""
        return await sample_beside(self._members, wanted, self.wanted)

    async def stop(self) -> None:
        self._shortage.stop()
        tasks = [*self._tasks]
        for member in self._members:
            self._members.become(member, "gone")
            tasks += [task for task in (member.runner, member.bringing) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        stopping = (self._recruiter.stop_quietly(member.handle) for member in self._members)
        await asyncio.gather(*stopping, return_exceptions=True)

    def count(self, *statuses: Status) -> int:
        return self._members.count(*statuses)

    @property
    def wanted(self) -> int:
        """How many workers there are to be."""
        return self._recruiter.wanted

    @property
    def restarts(self) -> int:
        return self._recruiter.restarts

    @property
    def joined(self) -> int:
        return self._recruiter.joined

    @property
    def left(self) -> int:
        """Workers that are gone for good."""
        return self._departures.left

    @property
    def faults(self) -> Counter[Fault]:
        """What has gone wrong so far, by class; the controller adds what it meets itself."""
        return self._recruiter.faults

    @property
    def sent_version(self) -> int | None:
        """The version that workers hold or are being sent; one that joins now loads it."""
        manifest = self._recruiter.weights.manifest
        return None if manifest is None else manifest.version

    @property
    def leased(self) -> int:
        """Groups that workers hold."""
        return self._book.leased

    @property
    def in_flight(self) -> int:
        """Groups leased or waiting for a worker."""
        return self._dispatch.waiting + self._book.leased

    @property
    def unread(self) -> int:
        """Finished groups that ``take_finished`` has not given out yet."""
        return sum(len(groups) for _, groups in self._news)

    def take_durations(self) -> list[float]:
        """Seconds from lease to result of each group that has come since the last call."""
        took_s, self._book.took_s = self._book.took_s, []
        return took_s

    def stats(self) -> dict[str, float]:
        """Workers' counters summed since the start (tokens, busy seconds, ...), the lost ones'
        included."""
        return dict(self._harvesting.counters.totals)

    def facts(self) -> PoolFacts:
        """For a look at the run: what is known already, asked of nobody; O(workers)."""
        return PoolFacts(
            workers=[self._facts(m) for m in self._members if m.status != "gone"],
            unplaced=self._dispatch.waiting,
            restarts=self.restarts,
            left=self.left,
            score_failures=self.faults["reward"],
            wanted=self.wanted,
        )

    def _facts(self, member: Member) -> WorkerFacts:
        age = None if member.heard is None else self._clock.now() - member.heard
        return WorkerFacts(
            name=member.name,
            incarnation=member.handle.incarnation,
            status=cast(WorkerStatus, member.status),
            version=member.version,
            groups=len(self._book.holder(member.index).leases),
            heard_s_ago=age,
            late_s=0.0 if age is None else age - self._harvesting.patience_s(),
            finished=member.finished,
            stats=member.stats,
        )

    def handles(self) -> list[WorkerHandle]:
        """Of every process that there is."""
        return [member.handle for member in self._members if member.status != "gone"]

    def holding_s(self) -> float:
        """Seconds that workers held at least one group, summed over the workers."""
        return self._book.holding_s()

    # -- how many serve ---------------------------------------------------------------------------

    def _serve(self, member: Member) -> None:
        member.heard = self._clock.now()
        member.runner = asyncio.create_task(self._harvesting.run(member), name=member.name)
        self._place()

    def _look_at_the_count(self) -> None:
        """After every change: who waits for a count looks again."""
        self._changed.set()
        self._shortage.look()

    async def _until(self, reached: Callable[[], bool]) -> None:
        """Wait for a state of the members. Raises what ended the pool meanwhile."""
        while True:
            self._changed.clear()
            if self._problem is not None:
                raise self._problem
            if reached():
                return
            await self._changed.wait()

    def _end(self, problem: BaseException) -> None:
        self._problem = self._problem or problem
        self._changed.set()
        self._on_news()

    # -- life of a member -------------------------------------------------------------------------

    async def _swap(
        self, member: Member, manifest: WeightManifest
    ) -> SwapReport | WeightsAway | None:
        handle, began = member.handle, self._clock.now()
        try:
            report = await self._recruiter.weights.load(member, manifest)
        except WeightsAway as problem:
            return problem
        except (Retryable, WeightMismatch) as problem:
            self.failed_swaps += 1
            await self._departures.lost(member, problem, handle)
            return None
        self._on_swap(handle.name, report, began, self._clock.now())
        return report

    def _left_out(self, meta: GroupMeta) -> None:
        self.faults["prompt"] += 1
        self._finished(Harvest(worker="", incarnation=0, groups=(meta,), payload=None), [meta])

    def _finished(self, harvest: Harvest, groups: list[GroupMeta]) -> None:
        self._news.append((harvest, groups))
        self._on_news()

    def _place(self) -> None:
        """Give waiting groups to serving workers, fewest samples to decode first."""
        if self.count("serving") < self._recruiter.least:
            return
        shares = self._dispatch.shares(lambda: [m.index for m in self._members.those("serving")])
        for index, share in shares.items():
            member = self._members[index]
            self._background(self._send(member, member.handle, share))

    async def _send(self, member: Member, handle: WorkerHandle, share: list[Assignment]) -> None:
        try:
            await handle.submit(share)
        except Retryable as problem:
            await self._departures.lost(member, problem, handle)

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._surface)

    def _surface(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (problem := task.exception()):
            self._end(problem)
