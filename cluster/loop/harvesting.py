"""Collects what workers have finished, and notices those that do not answer or sample no token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from cluster.contracts.deadlines import LATE_S, within
from cluster.contracts.errors import BadReward, EngineFailure, Fault, Retryable, WeightMismatch
from cluster.contracts.protocols import Clock, WorkerHandle
from cluster.contracts.records import Assignment, GroupMeta, Harvest
from cluster.loop.dispatch import Dispatch
from cluster.loop.leases import CounterSums, LeaseBook
from cluster.loop.members import Member, Members
from cluster.loop.settings import PoolSettings

# A worker that has nothing yet answers its harvest after a while. All of them together may do so
# this often a second, however many they are.
IDLE_ANSWERS_PER_S = 25
LONGEST_HARVEST_S = 60.0
UNRATED_BORNE = 8  # groups without a score that end no run, however few groups there are


class OnLoss(Protocol):
    def __call__(
        self, member: Member, problem: BaseException, handle: WorkerHandle, *, generating: bool
    ) -> Awaitable[None]: ...


class Harvesting:
    """``finished``: called with a harvest and its groups of live leases; ``again``: with groups to
    be leased once more; ``retire``: when a drained member holds nothing any more; ``lost``: when
    one is lost; ``end``: with what ends the run. ``faults``: counts failed groups by class."""

    def __init__(
        self,
        settings: PoolSettings,
        clock: Clock,
        event: Callable[..., None],
        members: Members,
        book: LeaseBook,
        dispatch: Dispatch,
        faults: Counter[Fault],
        *,
        finished: Callable[[Harvest, list[GroupMeta]], None],
        again: Callable[[Sequence[Assignment]], None],
        retire: Callable[[Member], Awaitable[None]],
        lost: OnLoss,
        end: Callable[[BaseException], None],
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._event = event
        self._members = members
        self._book = book
        self._dispatch = dispatch
        self._faults = faults
        self._finished = finished
        self._scored = self._unrated = 0  # groups that came back, and those without a score
        self._again = again
        self._retire = retire
        self._lost = lost
        self._end = end
        self.counters = CounterSums()

    async def run(self, member: Member) -> None:
        """Collect one worker's results until it is drained, lost or gone."""
        handle, holder = member.handle, self._book.holder(member.index)
        stall_s = self._settings.stall_timeout_s
        seen: tuple[float, ...] = ()
        quiet_s = 0.0
        try:
            while member.status in ("serving", "draining"):
                wait_s, asked = self.patience_s(), self._clock.now()
                # A call that is not answered at all: the process hangs, or its machine is gone.
                harvest = await within(wait_s + stall_s, handle.harvest(wait_s))
                member.heard, member.stats = self._clock.now(), harvest.stats
                progress = _progress(harvest)
                if harvest.groups or progress != seen or not holder.leases or _only_scores(harvest):
                    seen, quiet_s = progress, 0.0
                else:  # not more than an answer takes: this process itself may have stood still
                    quiet_s += min(member.heard - asked, wait_s + LATE_S)
                # It answers, but samples no token: a hung engine behind a live process.
                if quiet_s > stall_s:
                    raise EngineFailure(
                        f"sampled no token of {len(holder.leases)} groups in {stall_s:.0f} s"
                    )
                self._receive(member, harvest)
                if member.status == "draining" and not holder.leases:
                    await self._retire(member)
        except (Retryable, WeightMismatch, TimeoutError) as problem:
            await self._lost(member, problem, handle, generating=True)
        except Exception as problem:  # the supervised boundary: ends the run, with its cause
            self._end(problem)

    def patience_s(self) -> float:
        """How long a worker that has nothing to give may wait before it says so."""
        shared = len(self._members) / IDLE_ANSWERS_PER_S
        return max(self._settings.harvest_s, min(LONGEST_HARVEST_S, shared))

    def _receive(self, member: Member, harvest: Harvest) -> None:
        self.counters.report(member.index, harvest.incarnation, harvest.stats)
        done: list[GroupMeta] = []
        again: list[Assignment] = []
        for meta in harvest.groups:
            lease = self._dispatch.take(member.index, meta)
            # Taken for lost and leased again meanwhile: training on both would count it twice.
            if lease is None:
                self._event("stale_result_refused", group=meta.group_id, worker=member.name)
            elif meta.failure is not None and meta.late:
                self._faults["engine"] += 1
                again.append(self._dispatch.once_more(lease, meta.failure))
            elif meta.failure is not None and meta.retryable:
                self._faults["reward"] += 1
                again.append(self._dispatch.score_again(lease, meta.failure))
            else:
                self._faults["reward" if meta.unrated else "prompt"] += meta.failure is not None
                self._require_ratings(meta)
                done.append(meta)
        # What the harvest counts, it counts without the groups that it brings.
        self._book.progress(member.index, int(harvest.stats.get("sampled", 0)))
        if done:
            member.finished += len(done)
            self._finished(harvest, done)
        self._again(again)  # also for groups that wait for a worker to have room

    def _require_ratings(self, meta: GroupMeta) -> None:
        """Raises BadReward when scorers have no score for too many groups."""
        self._scored += 1
        self._unrated += meta.unrated
        most = self._settings.max_unrated_share
        if self._unrated > max(UNRATED_BORNE, most * self._scored):
            raise BadReward(
                f"{self._unrated} of {self._scored} groups got no score, and "
                f"reward.max_unrated_share is {most:g}. The last one: {meta.failure}"
            )


def _progress(harvest: Harvest) -> tuple[float, ...]:
    """Changes whenever the worker has sampled a token."""
    names = ("generated_tokens", "unfinished_tokens")
    return tuple(harvest.stats.get(name, 0.0) for name in names)


def _only_scores(harvest: Harvest) -> bool:
    """Whether what the worker holds is all generated and waits for its scores."""
    return harvest.stats.get("scoring", 0.0) > 0 and harvest.stats.get("unfinished", 0.0) == 0
