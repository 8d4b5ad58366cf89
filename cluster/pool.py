"""The rollout workers of a run: who holds which group, who is lost, who may serve.

A worker's life:  starting -> loading weights -> serving -> (draining ->) gone
                     ^                              |
                     +------ lost (restart) --------+

A group is leased to one incarnation of one worker. When that is lost, its groups are leased again
with ``attempt + 1``; what the lost one may still send is refused by its incarnation. A worker
serves only after it holds the current weights, verified; a late joiner is no special case. A worker
whose weights do not verify is replaced once; when its successor cannot verify the same version
either, the run ends.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from cluster.contracts.errors import AccordError, Fatal, Retryable, WeightMismatch
from cluster.contracts.protocols import Clock, WorkerHandle
from cluster.contracts.records import Assignment, GroupMeta, Harvest, SwapReport, WeightManifest
from cluster.supervision import GiveUp, decide

Status = Literal["starting", "serving", "draining", "gone"]
EventLog = Callable[..., None]


@dataclass(slots=True)
class _Member:
    index: int
    handle: WorkerHandle
    status: Status = "starting"
    version: int = -1
    leases: dict[int, Assignment] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    mismatched: set[int] = field(default_factory=set)  # versions that did not verify here
    runner: asyncio.Task[None] | None = None
    stats: Mapping[str, float] = field(default_factory=dict)
    swap: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSettings:
    start_timeout_s: float
    stall_timeout_s: float
    weights_timeout_s: float
    max_restarts: int
    max_attempts: int = 3  # of one group, over lost workers and failed scoring
    harvest_s: float = 1.0


class WorkerPool:
    """Drives workers through ``WorkerHandle``; knows nothing of Ray."""

    def __init__(
        self,
        factory: Callable[[int, int], WorkerHandle],
        settings: PoolSettings,
        clock: Clock,
        event: EventLog,
    ) -> None:
        self._factory = factory
        self._settings = settings
        self._clock = clock
        self._event = event
        self._members: dict[int, _Member] = {}
        self._waiting: list[Assignment] = []  # no serving worker to take them yet
        self._harvests: asyncio.Queue[tuple[Harvest, list[GroupMeta]] | BaseException] = (
            asyncio.Queue()
        )
        self._manifest: WeightManifest | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._next_index = 0
        self.restarts = 0
        self.joined = 0
        self.left = 0

    # -- what the controller uses -----------------------------------------------------------------

    async def start(self, count: int, manifest: WeightManifest) -> None:
        """Start ``count`` workers and bring them to ``manifest``; returns when all serve."""
        self._manifest = manifest
        await asyncio.gather(*(self._join() for _ in range(count)))

    async def resize(self, count: int) -> None:
        """Add workers, or drain the newest ones, until ``count`` are wanted."""
        wanted = [m for m in self._members.values() if m.status in ("starting", "serving")]
        if count > len(wanted):
            await asyncio.gather(*(self._try_join() for _ in range(count - len(wanted))))
        for member in sorted(wanted, key=lambda m: -m.index)[: max(0, len(wanted) - count)]:
            member.status = "draining"
            self._event("worker_draining", worker=member.handle.name, leases=len(member.leases))

    async def submit(self, assignments: Sequence[Assignment]) -> None:
        """Lease each group to the serving worker with the fewest samples in hand."""
        self._waiting.extend(assignments)
        await self._place()

    async def next_harvest(self) -> tuple[Harvest, list[GroupMeta]]:
        """The next finished groups (of live leases only). Raises what ended a worker for good."""
        item = await self._harvests.get()
        if isinstance(item, BaseException):
            raise item
        return item

    async def broadcast(self, manifest: WeightManifest) -> list[SwapReport]:
        """Bring every serving worker to ``manifest``; returns once all of them hold it."""
        self._manifest = manifest
        members = [m for m in self._members.values() if m.status in ("serving", "draining")]
        reports = await asyncio.gather(*(self._swap(m, manifest) for m in members))
        return [report for report in reports if report is not None]

    async def stop(self) -> None:
        for member in self._members.values():
            member.status = "gone"
            if member.runner:
                member.runner.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(
            *(self._stop_quietly(m.handle) for m in self._members.values()), return_exceptions=True
        )

    def held_version(self) -> int | None:
        """The oldest version a serving worker holds; None while nobody serves."""
        versions = [
            m.version for m in self._members.values() if m.status in ("serving", "draining")
        ]
        return min(versions, default=None)

    def count(self, *statuses: Status) -> int:
        return sum(m.status in statuses for m in self._members.values())

    @property
    def in_flight(self) -> int:
        return len(self._waiting) + sum(len(m.leases) for m in self._members.values())

    def stats(self) -> dict[str, float]:
        """Workers' counters summed (tokens, busy seconds, ...)."""
        summed: dict[str, float] = {}
        for member in self._members.values():
            for name, value in member.stats.items():
                summed[name] = summed.get(name, 0.0) + value
        return summed

    # -- life of a member -------------------------------------------------------------------------

    async def _try_join(self) -> None:
        """A worker that was asked for in addition and cannot start must not end the run."""
        index = self._next_index
        try:
            await self._join()
        except (AccordError, TimeoutError) as problem:
            member = self._members[index]
            member.status = "gone"
            self._event("worker_not_joined", worker=member.handle.name, cause=str(problem))
            await self._stop_quietly(member.handle)

    async def _join(self) -> None:
        index = self._next_index
        self._next_index += 1
        member = _Member(index=index, handle=self._factory(index, 0))
        self._members[index] = member
        try:
            await self._bring_up(member)
        except WeightMismatch as problem:
            await self._replace(member, problem)
        self.joined += 1

    async def _bring_up(self, member: _Member) -> None:
        limit = self._settings.start_timeout_s
        try:
            info = await asyncio.wait_for(member.handle.start(), limit)
        except TimeoutError:
            raise Fatal(f"{member.handle.name} was not ready within {limit:.0f} s") from None
        while True:  # weights may move on while this worker loads them
            manifest = self._manifest
            assert manifest is not None
            await self._load(member, manifest)
            if manifest is self._manifest:
                break
        member.status = "serving"
        member.runner = asyncio.create_task(self._run(member), name=member.handle.name)
        self._event(
            "worker_serving", worker=member.handle.name, version=member.version, **dict(info)
        )
        await self._place()

    async def _load(self, member: _Member, manifest: WeightManifest) -> SwapReport:
        async with member.swap:
            limit = self._settings.weights_timeout_s
            try:
                report = await asyncio.wait_for(member.handle.load_weights(manifest), limit)
            except TimeoutError:
                raise Retryable(f"not on version {manifest.version} within {limit:.0f} s") from None
            member.version = report.version
            return report

    async def _swap(self, member: _Member, manifest: WeightManifest) -> SwapReport | None:
        try:
            return await self._load(member, manifest)
        except (Retryable, WeightMismatch) as problem:
            await self._lost(member, problem)
            return None

    async def _run(self, member: _Member) -> None:
        """Collect one worker's results until it is drained, lost or gone."""
        last = self._clock.now()
        try:
            while member.status in ("serving", "draining"):
                harvest = await asyncio.wait_for(
                    member.handle.harvest(self._settings.harvest_s),
                    self._settings.harvest_s + self._settings.stall_timeout_s,
                )
                if harvest.groups or not member.leases:
                    last = self._clock.now()
                elif self._clock.now() - last > self._settings.stall_timeout_s:
                    raise Retryable(
                        f"finished none of {len(member.leases)} groups in "
                        f"{self._settings.stall_timeout_s:.0f} s"
                    )
                await self._receive(member, harvest)
                if member.status == "draining" and not member.leases:
                    await self._retire(member)
        except (Retryable, WeightMismatch, TimeoutError) as problem:
            await self._lost(member, problem)
        except Exception as problem:  # the supervised boundary: ends the run, with its cause
            self._harvests.put_nowait(problem)

    async def _receive(self, member: _Member, harvest: Harvest) -> None:
        member.stats = harvest.stats
        done: list[GroupMeta] = []
        again: list[Assignment] = []
        for meta in harvest.groups:
            lease = member.leases.pop(meta.group_id, None)
            if lease is None or lease.attempt != meta.attempt:
                self._event("stale_result_refused", group=meta.group_id, worker=member.handle.name)
            elif meta.failure is not None and meta.retryable:
                self._event("group_retried", group=meta.group_id, cause=meta.failure)
                if lease.attempt + 1 >= self._settings.max_attempts:
                    raise Fatal(
                        f"group {meta.group_id} failed {lease.attempt + 1} times: {meta.failure}"
                    )
                again.append(replace(lease, attempt=lease.attempt + 1))
            else:
                done.append(meta)
        if done:
            self._harvests.put_nowait((harvest, done))
        if again:
            await self.submit(again)

    async def _retire(self, member: _Member) -> None:
        member.status = "gone"
        self.left += 1
        self._event("worker_left", worker=member.handle.name)
        await self._stop_quietly(member.handle)

    async def _lost(self, member: _Member, problem: BaseException) -> None:
        """Release the leases at once, then restart (or give up, which ends the run)."""
        if member.status in ("starting", "gone"):
            return
        leaving = member.status == "draining"
        member.status = "gone" if leaving else "starting"
        member.version = -1
        if member.runner and member.runner is not asyncio.current_task():
            member.runner.cancel()
        orphans = [replace(a, attempt=a.attempt + 1) for a in member.leases.values()]
        member.leases.clear()
        self._waiting.extend(orphans)
        await self._place()
        if leaving:
            self.left += 1
            self._event("worker_left", worker=member.handle.name, cause=str(problem))
            await self._stop_quietly(member.handle)
            return
        # On its own, so that nobody (a broadcast, say) waits for a worker that is starting again.
        task = asyncio.create_task(self._replace(member, problem, requeued=len(orphans)))
        self._tasks.add(task)
        task.add_done_callback(self._surface)

    async def _replace(self, member: _Member, problem: BaseException, requeued: int = 0) -> None:
        cause = str(problem) or "no answer in time"
        member.losses.append(self._clock.now())
        self._event("worker_lost", worker=member.handle.name, cause=cause, requeued=requeued)
        repeated = self._mismatched_before(member, problem)
        await self._stop_quietly(member.handle)
        if repeated:
            raise Fatal(f"{member.handle.name}, replaced, still does not verify: {cause}")
        decision = decide(
            member.losses, self._clock.now(), max_restarts=self._settings.max_restarts
        )
        if isinstance(decision, GiveUp):
            member.status = "gone"
            raise Fatal(f"{member.handle.name}: {decision.reason}; last cause: {cause}")
        await self._clock.sleep(decision.after_s)
        member.handle = self._factory(member.index, member.handle.incarnation + 1)
        self.restarts += 1
        try:
            await self._bring_up(member)
        except (Retryable, WeightMismatch) as again:
            await self._replace(member, again)

    def _mismatched_before(self, member: _Member, problem: BaseException) -> bool:
        """Whether a process of this worker has failed to verify the current version before."""
        if not isinstance(problem, WeightMismatch) or self._manifest is None:
            return False
        repeated = self._manifest.version in member.mismatched
        member.mismatched.add(self._manifest.version)
        return repeated

    async def _place(self) -> None:
        """Give waiting groups to serving workers, fewest samples in hand first."""
        serving = [m for m in self._members.values() if m.status == "serving"]
        if not serving or not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        load = {m.index: sum(a.samples for a in m.leases.values()) for m in serving}
        shares: dict[int, list[Assignment]] = {}
        for assignment in waiting:
            index = min(load, key=lambda i: load[i])
            load[index] += assignment.samples
            shares.setdefault(index, []).append(assignment)
        for index, share in shares.items():
            member = self._members[index]
            member.leases.update({a.group_id: a for a in share})
            try:
                await member.handle.submit(share)
            except Retryable as problem:
                await self._lost(member, problem)

    def _surface(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (problem := task.exception()):
            self._harvests.put_nowait(problem)

    async def _stop_quietly(self, handle: WorkerHandle) -> None:
        # It may already be dead: that is often why it is stopped.
        with contextlib.suppress(AccordError, TimeoutError):
            await asyncio.wait_for(handle.stop(), 5.0)
