"""Gets workers to serve, and gets lost ones back, for as long as they are wanted.

A worker that is lost, or cannot start, is asked for again after a pause; there is no limit to how
often, because room may come. What is limited is how often it may fail by its own doing: then it is
broken, and the run goes on without it for a while. One that waits for room on the cluster is left
waiting, so that an autoscaler can bring its machine. The run ends when so many workers are broken
that too few are left, and at once for what every worker would meet in the same way.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable

from cluster.contracts.deadlines import within
from cluster.contracts.errors import (
    AccordError,
    EngineFailure,
    Fatal,
    Fault,
    Unexpected,
    UserError,
    WeightMismatch,
    WorkersGone,
)
from cluster.contracts.protocols import Clock, WorkerHandle
from cluster.loop.current_weights import CurrentWeights
from cluster.loop.members import Member, Members
from cluster.loop.settings import PoolSettings
from cluster.loop.supervision import (
    FEWEST_OF_UNKNOWN,
    WINDOW_S,
    GiveUp,
    Loss,
    decide,
    is_charged,
)

EventLog = Callable[..., None]
STOP_S = 5.0


class Recruiter:
    """``serve``: called with each member that has just begun to serve. ``end``: with what ends the
    run. ``faults`` counts by class whatever goes wrong with workers."""

    def __init__(
        self,
        factory: Callable[[int, int], WorkerHandle],
        settings: PoolSettings,
        clock: Clock,
        event: EventLog,
        members: Members,
        serve: Callable[[Member], None],
        end: Callable[[BaseException], None],
    ) -> None:
        self._factory = factory
        self._settings = settings
        self._clock = clock
        self._event = event
        self._members = members
        self._serve = serve
        self._end = end
        self._unforeseen: list[float] = []  # when
        # Of a fixed seed, so that a simulation repeats itself.
        self._random = random.Random(0)
        self.weights = CurrentWeights(settings.weights_timeout_s, clock, event)
        self.faults: Counter[Fault] = Counter()
        self.wanted = 0
        self.restarts = 0
        self.joined = 0

    @property
    def least(self) -> int:
        """With fewer serving workers the run waits."""
        return min(self._settings.min_workers, self.wanted)

    def add(self) -> None:
        """One more worker, which begins to start."""
        self._bring(self._members.add(self._factory))

    def leave(self, member: Member) -> None:
        """End a member that does not serve, whatever it waits for."""
        self._members.become(member, "gone")
        if member.bringing is not None:
            member.bringing.cancel()
        stopping = asyncio.ensure_future(self.stop_quietly(member.handle))
        member.bringing = stopping  # kept, so that it is not collected before its end

    def replace(self, member: Member, problem: BaseException, *, blameless: bool = False) -> None:
        """Start a lost member (status "starting") again, in the background: nobody (a broadcast,
        say) waits for it. ``blameless``: a prompt has killed it, so the loss is not charged."""
        self._bring(member, problem, blameless)

    def _bring(
        self, member: Member, lost: BaseException | None = None, blameless: bool = False
    ) -> None:
        work = self._bring_up(member, lost, blameless)
        member.bringing = asyncio.create_task(self._guarded(work))

    async def _guarded(self, work: Awaitable[None]) -> None:
        try:
            await work
        except Exception as problem:  # the supervised boundary: ends the run, with its cause
            self._end(problem)

    # -- one member until it serves ---------------------------------------------------------------

    async def _bring_up(
        self, member: Member, problem: BaseException | None, blameless: bool
    ) -> None:
        """``problem``: how it was lost, None for a new one."""
        starting = False
        while True:
            if problem is not None:
                await self._pause(member, problem, starting=starting, blameless=blameless)
                # Another incarnation is another seed: the same completions are of no use again.
                member.handle = self._factory(member.index, member.handle.incarnation + 1)
                self.restarts += 1
            try:
                await self._begin(member)
                break
            except (AccordError, TimeoutError) as again:
                problem, starting, blameless = again, True, False
        self.joined += not member.served
        member.served, member.waits_for, member.refused = True, "", None
        self._serve(member)

    async def _begin(self, member: Member) -> None:
        handle, limit = member.handle, self._settings.start_timeout_s
        member.waits_for = "room on the cluster"
        await handle.placed()
        member.waits_for = "its engine"
        try:
            info = await within(limit, handle.start())
        except TimeoutError:
            raise EngineFailure(f"{member.name} was not ready within {limit:.0f} s") from None
        member.node = str(info.get("node", ""))
        member.waits_for = "weights"
        await self.weights.join(member)
        self._members.become(member, "serving")
        self._event("worker_serving", worker=member.name, version=member.version, **dict(info))

    # -- after a failure --------------------------------------------------------------------------

    async def _pause(
        self, member: Member, problem: BaseException, *, starting: bool, blameless: bool
    ) -> None:
        """Count the failure, and wait until the member is to be tried again. Raises what ends the
        run."""
        cause = str(problem) or "no answer in time"
        # Ended before its successor starts: both would want the same cores or GPU.
        await self.stop_quietly(member.handle)
        self._require_hope(member, problem, starting=starting)
        now, served = self._clock.now(), any(m.served for m in self._members)
        own = is_charged(problem, starting=starting, served_before=served)
        charged = own and not blameless
        member.losses.append(Loss(now, charged))
        decision = decide(
            member.losses,
            now,
            max_restarts=self._settings.max_restarts,
            jitter=self._random.random(),
        )
        if isinstance(problem, WeightMismatch) and max(member.mismatches.values()) > 1:
            decision = GiveUp("replaced, still does not verify")
        if isinstance(decision, GiveUp):
            await self._break(member, f"{decision.reason}; last cause: {cause}")
            return
        if starting:
            self._event(
                "worker_not_joined",
                worker=member.name,
                cause=cause,
                fault=self._count(problem),
                again_in_s=round(decision.after_s, 1),
            )
        member.waits_for = f"{decision.after_s:.0f} s to pass after: {cause}"
        await self._clock.sleep(decision.after_s)

    def _require_hope(self, member: Member, problem: BaseException, *, starting: bool) -> None:
        """Raises what would go wrong again, however often it were tried."""
        served = any(m.served for m in self._members)
        stops = isinstance(problem, UserError | Fatal) and not isinstance(problem, WeightMismatch)
        if stops and not (starting and served):  # where others have served, the config does work
            raise problem
        if isinstance(problem, Unexpected):
            now = self._clock.now()
            self._unforeseen = [t for t in self._unforeseen if now - t <= WINDOW_S] + [now]
            if len(self._unforeseen) > FEWEST_OF_UNKNOWN:
                raise Fatal(
                    f"workers failed {len(self._unforeseen)} times within {WINDOW_S:.0f} s in a "
                    f"way that nobody foresaw; the last time: {problem}"
                ) from problem
        member.refused = problem if starting else None
        alike = [m.refused for m in self._members if m.status in ("starting", "serving")]
        if not served and all(isinstance(refused, EngineFailure) for refused in alike):
            raise problem

    async def _break(self, member: Member, reason: str) -> None:
        """Go on without the member until its losses are forgiven."""
        self._members.become(member, "broken")
        self._event("worker_broken", worker=member.name, cause=reason, again_in_s=WINDOW_S)
        if self._members.count("starting", "serving") < self.least:
            raise WorkersGone(f"{member.name}: {reason}")
        member.waits_for = f"{WINDOW_S:.0f} s to pass, because it was {reason}"
        await self._clock.sleep(WINDOW_S)
        member.losses.clear()
        member.mismatches.clear()
        self._members.become(member, "starting")

    def _count(self, problem: BaseException) -> Fault:
        fault: Fault = getattr(problem, "fault", "worker")
        self.faults[fault] += 1
        return fault

    def note_loss(self, member: Member, problem: BaseException, requeued: int) -> None:
        """The event and the count of a serving worker's loss."""
        detail = {}
        if isinstance(problem, Unexpected) and problem.__cause__ is not None:
            detail["trace"] = "".join(traceback.format_exception(problem.__cause__))
        self._event(
            "worker_lost",
            worker=member.name,
            cause=str(problem) or "no answer in time",
            fault=self._count(problem),
            requeued=requeued,
            **detail,
        )

    async def stop_quietly(self, handle: WorkerHandle) -> None:
        # It may already be dead: that is often why it is stopped.
        with contextlib.suppress(AccordError, TimeoutError):
            await within(STOP_S, handle.stop())
