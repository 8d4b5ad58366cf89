"""The rollout workers of a run: who holds which group, who is lost, who may serve.

A group is leased to one incarnation of one worker. When that is lost, its groups are leased again
with ``attempt + 1``; what the lost one may still send is refused by its incarnation. A worker
serves only after it holds the current weights, verified; a late joiner is no special case. A worker
whose weights do not verify is replaced once; when its successor cannot verify the same version
either, the run ends.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, cast

from cluster.contracts.errors import AccordError, Fatal, Retryable, WeightMismatch
from cluster.contracts.live import WorkerStatus
from cluster.contracts.protocols import Clock, WorkerHandle
from cluster.contracts.records import Assignment, GroupMeta, Harvest, SwapReport, WeightManifest
from cluster.loop.leases import CounterSums, LeaseBook
from cluster.loop.live import PoolFacts, WorkerFacts
from cluster.loop.members import Member, Members, Status
from cluster.loop.settings import PoolSettings
from cluster.loop.supervision import GiveUp, decide

EventLog = Callable[..., None]
Finished = tuple[Harvest, list[GroupMeta]]

# A worker that has nothing yet answers its harvest after a while. All of them together may do so
# this often a second, however many they are.
IDLE_ANSWERS_PER_S = 25
LONGEST_HARVEST_S = 60.0


class WorkerPool:
    """Drives workers through ``WorkerHandle``; knows nothing of Ray."""

    def __init__(
        self,
        factory: Callable[[int, int], WorkerHandle],
        settings: PoolSettings,
        clock: Clock,
        event: EventLog,
        on_swap: Callable[[str, SwapReport, float, float], None] = lambda *_: None,
    ) -> None:
        self._factory = factory
        self._settings = settings
        self._clock = clock
        self._event = event
        self._on_swap = on_swap  # worker's name, its report, when it was asked and when it was done
        self._book = LeaseBook(clock.now)
        self._members = Members(self._book)
        self._counters = CounterSums()
        self._waiting: list[Assignment] = []  # no serving worker to take them yet
        self._news: list[Finished | BaseException] = []
        self._on_news: Callable[[], None] = lambda: None
        self._manifest: WeightManifest | None = None
        self._first: asyncio.Future[WeightManifest] | None = None  # from the learner's start
        self._tasks: set[asyncio.Task[Any]] = set()
        self.restarts = 0
        self.joined = 0
        self.left = 0
        self.failed_swaps = 0
        self.score_failures = 0  # groups that could not be scored and were tried again

    # -- what the controller uses -----------------------------------------------------------------

    async def start(self, count: int, first: Awaitable[WeightManifest]) -> None:
        """Start ``count`` workers; returns when all serve.

        ``first``: the first published weights. Workers build their engines before they are there.
        """
        self._first = asyncio.ensure_future(first)
        await asyncio.gather(*(self._join(self._new()) for _ in range(count)))

    async def resize(self, count: int) -> None:
        """Add workers, or drain the newest ones, until ``count`` are wanted."""
        wanted = self._members.those("starting", "serving")
        if count > len(wanted):
            await asyncio.gather(*(self._try_join(self._new()) for _ in range(count - len(wanted))))
        for member in sorted(wanted, key=lambda m: -m.index)[: max(0, len(wanted) - count)]:
            if member.status == "starting":
                self._not_wanted(member)
                continue
            self._members.become(member, "draining")
            held = len(self._book.holder(member.index).leases)
            self._event("worker_draining", worker=member.name, leases=held)

    def submit(self, assignments: Sequence[Assignment]) -> None:
        """Lease each group to the serving worker with the fewest samples in hand, and send it.

        Returns at once: a worker that is slow to take its share holds up nobody else.
        """
        self._waiting.extend(assignments)
        self._place()

    def on_news(self, call: Callable[[], None]) -> None:
        """``call`` whenever ``take_finished`` has something to give."""
        self._on_news = call

    def take_finished(self) -> list[Finished]:
        """What has finished since the last call (groups of live leases only), in order of arrival.

        Raises what ended a worker for good.
        """
        news, self._news = self._news, []
        finished: list[Finished] = []
        for item in news:
            if isinstance(item, BaseException):
                raise item
            finished.append(item)
        return finished

    async def broadcast(self, manifest: WeightManifest) -> list[SwapReport]:
        """Bring every serving worker to ``manifest``; returns once all of them hold it."""
        self._manifest = manifest
        members = self._members.those("serving", "draining")
        reports = await asyncio.gather(*(self._swap(m, manifest) for m in members))
        return [report for report in reports if report is not None]

    async def stop(self) -> None:
        for member in self._members:
            self._members.become(member, "gone")
            if member.runner:
                member.runner.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(
            *(self._stop_quietly(m.handle) for m in self._members), return_exceptions=True
        )

    def count(self, *statuses: Status) -> int:
        return self._members.count(*statuses)

    @property
    def sent_version(self) -> int | None:
        """The version that workers hold or are being sent; one that joins now loads it."""
        return None if self._manifest is None else self._manifest.version

    @property
    def in_flight(self) -> int:
        """Groups leased or waiting for a worker."""
        return len(self._waiting) + self._book.leased

    def stats(self) -> dict[str, float]:
        """Workers' counters summed since the start (tokens, busy seconds, ...), the lost ones'
        included."""
        return dict(self._counters.totals)

    def facts(self) -> PoolFacts:
        """For a look at the run: what is known already, asked of nobody; O(workers)."""
        return PoolFacts(
            workers=[self._facts(m) for m in self._members if m.status != "gone"],
            unplaced=len(self._waiting),
            restarts=self.restarts,
            left=self.left,
            score_failures=self.score_failures,
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
            late_s=0.0 if age is None else age - self._harvest_s(),
            finished=member.finished,
            stats=member.stats,
        )

    def holding_s(self) -> float:
        """Seconds that workers held at least one group, summed over the workers."""
        return self._book.holding_s()

    # -- life of a member -------------------------------------------------------------------------

    async def _try_join(self, member: Member) -> None:
        """A worker that was asked for in addition and cannot start must not end the run."""
        try:
            await self._join(member)
        except (AccordError, TimeoutError) as problem:
            self._members.become(member, "gone")
            self._event("worker_not_joined", worker=member.name, cause=str(problem))
            await self._stop_quietly(member.handle)

    def _new(self) -> Member:
        return self._members.add(self._factory)

    async def _join(self, member: Member) -> None:
        try:
            await self._bring_up(member)
        except WeightMismatch as problem:
            await self._replace(member, problem)
        self.joined += member.status == "serving"

    async def _bring_up(self, member: Member) -> None:
        limit = self._settings.start_timeout_s
        try:
            info = await asyncio.wait_for(member.handle.start(), limit)
        except TimeoutError:  # a slow start would be as slow again: no restart
            raise Fatal(f"{member.name} was not ready within {limit:.0f} s") from None
        if self._manifest is None:
            assert self._first is not None
            self._manifest = await asyncio.shield(self._first)  # others wait for it, too
        # Not serving yet, so a broadcast passes this worker over, and must not be missed by it.
        while True:  # weights may move on while this worker loads them
            manifest = self._manifest
            try:
                await self._load(member, manifest)
            except Retryable:
                # The learner may have let go of a version that everybody else is past.
                if manifest is self._manifest:
                    raise
                continue
            if manifest is self._manifest:
                break
        if member.status != "starting":  # no longer wanted, or the run has ended meanwhile
            await self._stop_quietly(member.handle)
            return
        self._members.become(member, "serving")
        member.heard = self._clock.now()
        member.runner = asyncio.create_task(self._run(member), name=member.name)
        self._event("worker_serving", worker=member.name, version=member.version, **dict(info))
        self._place()

    async def _load(self, member: Member, manifest: WeightManifest) -> SwapReport:
        async with member.swap:  # a joiner may still be loading when the next broadcast comes
            limit = self._settings.weights_timeout_s
            try:
                async with asyncio.timeout(limit):
                    report = await member.handle.load_weights(manifest)
            except TimeoutError:
                raise Retryable(f"not on version {manifest.version} within {limit:.0f} s") from None
            except WeightMismatch:
                # Here, where it is known which version it was: a newer one may be on its way.
                member.mismatches[manifest.version] += 1
                raise
            member.version = report.version
            return report

    async def _swap(self, member: Member, manifest: WeightManifest) -> SwapReport | None:
        handle, began = member.handle, self._clock.now()
        try:
            report = await self._load(member, manifest)
        except (Retryable, WeightMismatch) as problem:
            self.failed_swaps += 1
            await self._lost(member, problem, handle)
            return None
        self._on_swap(handle.name, report, began, self._clock.now())
        return report

    async def _run(self, member: Member) -> None:
        """Collect one worker's results until it is drained, lost or gone."""
        last, handle = self._clock.now(), member.handle
        holder = self._book.holder(member.index)
        stall_s = self._settings.stall_timeout_s
        try:
            while member.status in ("serving", "draining"):
                wait_s = self._harvest_s()
                # A call that is not answered at all: the process hangs, or its machine is gone.
                async with asyncio.timeout(wait_s + stall_s):
                    harvest = await handle.harvest(wait_s)
                member.heard, member.stats = self._clock.now(), harvest.stats
                if harvest.groups or not holder.leases:
                    last = self._clock.now()
                # It answers, but what it holds does not come: a hung engine behind a live process.
                elif self._clock.now() - last > stall_s:
                    raise Retryable(
                        f"finished none of {len(holder.leases)} groups in {stall_s:.0f} s"
                    )
                self._receive(member, harvest)
                if member.status == "draining" and not holder.leases:
                    await self._retire(member)
        except (Retryable, WeightMismatch, TimeoutError) as problem:
            await self._lost(member, problem, handle)
        except Exception as problem:  # the supervised boundary: ends the run, with its cause
            self._tell(problem)

    def _harvest_s(self) -> float:
        shared = len(self._members) / IDLE_ANSWERS_PER_S
        return max(self._settings.harvest_s, min(LONGEST_HARVEST_S, shared))

    def _tell(self, item: Finished | BaseException) -> None:
        self._news.append(item)
        self._on_news()

    def _receive(self, member: Member, harvest: Harvest) -> None:
        self._counters.report(member.index, harvest.incarnation, harvest.stats)
        done: list[GroupMeta] = []
        again: list[Assignment] = []
        for meta in harvest.groups:
            lease = self._book.take(member.index, meta.group_id, meta.attempt)
            # Taken for lost and leased again meanwhile: training on both would count it twice.
            if lease is None:
                self._event("stale_result_refused", group=meta.group_id, worker=member.name)
            elif meta.failure is not None and meta.retryable:
                self.score_failures += 1
                self._event("group_retried", group=meta.group_id, cause=meta.failure)
                if lease.attempt + 1 >= self._settings.max_attempts:
                    raise Fatal(
                        f"group {meta.group_id} failed {lease.attempt + 1} times: {meta.failure}"
                    )
                again.append(replace(lease, attempt=lease.attempt + 1))
            else:
                done.append(meta)
        if done:
            member.finished += len(done)
            self._tell((harvest, done))
        if again:
            self.submit(again)

    def _not_wanted(self, member: Member) -> None:
        """One that is starting is stopped by whoever starts it, as soon as it could serve."""
        self._members.become(member, "gone")
        if member.runner is not None:  # it had served before it was lost
            self.left += 1
            self._event("worker_left", worker=member.name, cause="lost before")

    async def _retire(self, member: Member) -> None:
        self._members.become(member, "gone")
        self.left += 1
        self._event("worker_left", worker=member.name)
        await self._stop_quietly(member.handle)

    async def _lost(self, member: Member, problem: BaseException, handle: WorkerHandle) -> None:
        """Release the leases at once, then restart (or give up, which ends the run).

        ``handle``: whose failure it is. That of an incarnation already replaced changes nothing.
        """
        # Harvest, submit and swap of one dead process each report it; the first is enough.
        if member.status in ("starting", "gone") or member.handle is not handle:
            return
        leaving = member.status == "draining"
        self._members.become(member, "gone" if leaving else "starting")
        member.version, member.heard, member.stats = -1, None, {}
        if member.runner and member.runner is not asyncio.current_task():
            member.runner.cancel()
        # Before the restart, so that the other workers have them while this one starts again.
        orphans = [replace(a, attempt=a.attempt + 1) for a in self._book.take_all(member.index)]
        self.submit(orphans)
        if leaving:
            self.left += 1
            self._event("worker_left", worker=member.name, cause=str(problem))
            await self._stop_quietly(member.handle)
            return
        # On its own, so that nobody (a broadcast, say) waits for a worker that is starting again.
        self._background(self._replace(member, problem, requeued=len(orphans)))

    async def _replace(self, member: Member, problem: BaseException, requeued: int = 0) -> None:
        cause = str(problem) or "no answer in time"
        member.losses.append(self._clock.now())
        self._event("worker_lost", worker=member.name, cause=cause, requeued=requeued)
        repeated = (
            isinstance(problem, WeightMismatch) and max(member.mismatches.values(), default=0) > 1
        )
        # Ended before its successor starts: both would want the same cores or GPU.
        await self._stop_quietly(member.handle)
        if repeated:
            raise Fatal(f"{member.name}, replaced, still does not verify: {cause}")
        decision = decide(
            member.losses, self._clock.now(), max_restarts=self._settings.max_restarts
        )
        if isinstance(decision, GiveUp):
            self._members.become(member, "gone")
            raise Fatal(f"{member.name}: {decision.reason}; last cause: {cause}")
        await self._clock.sleep(decision.after_s)
        if member.status != "starting":  # no longer wanted
            return
        # Another incarnation is another seed: the same one would sample the same completions again.
        member.handle = self._factory(member.index, member.handle.incarnation + 1)
        self.restarts += 1
        try:
            await self._bring_up(member)
        except (Retryable, WeightMismatch) as again:
            await self._replace(member, again)

    def _place(self) -> None:
        """Give waiting groups to serving workers, fewest samples in hand first."""
        shares: dict[int, list[Assignment]] = {}
        given = 0
        for assignment in self._waiting:
            index = self._book.give(assignment)
            if index is None:  # nobody serves; who joins next calls this again
                break
            shares.setdefault(index, []).append(assignment)
            given += 1
        del self._waiting[:given]
        for index, share in shares.items():
            member = self._members[index]
            self._background(self._send(member, member.handle, share))

    async def _send(self, member: Member, handle: WorkerHandle, share: list[Assignment]) -> None:
        try:
            await handle.submit(share)
        except Retryable as problem:
            await self._lost(member, problem, handle)

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._surface)

    def _surface(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (problem := task.exception()):
            self._tell(problem)

    async def _stop_quietly(self, handle: WorkerHandle) -> None:
        # It may already be dead: that is often why it is stopped.
        with contextlib.suppress(AccordError, TimeoutError):
            await asyncio.wait_for(handle.stop(), 5.0)
