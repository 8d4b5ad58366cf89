"""The reinforcement-learning loop on one page: who waits for whom, and who frees it.

                 groups admitted                     all groups of step s are there
    CONTROLLER ──────────────────▶ WORKERS ────────────────────────────────▶ LEARNER
        ▲       (a group waits     generate, score      (a finished group      trains step s,
        │        here until a      (a group waits       waits in the buffer    publishes
        │        worker is free)   for its reward)      for the rest of s)     version s + 1
        │                              ▲                                           │
        │                              │ swap between two tokens                   │
        │                          BROADCAST ◀─────────────────────────────────────┘
        │  all hold version s + 1      │        (one at a time; a newer version replaces
        └──────────────────────────────┘         one that still waits to be sent)

    what waits           for                                   who frees it
    ───────────────────  ────────────────────────────────────  ────────────────────────────────────
    a group to come      room: admitted < (held + bound + 1)P  the broadcast's end: held is raised
                         that its step is near (pacing.py)     a timer
    an admitted group    a serving worker                      a worker that joins or comes back
    a finished group     the other groups of its step          the last of them (or its failure)
    learner step s       its groups; never for a broadcast     the slowest group of s
    a part of step s     its own groups, and an idle learner   the slowest of them
    the next step        the copy of the learner's state, if   the learner, within seconds
                         a checkpoint is due
    a broadcast          the one before                        the slowest to take it, or its loss
    a swap in a worker   the token under way                   the engine, some milliseconds later
    an evaluation        its weights at all workers            the broadcast's end; with bound 0
                                                               also the last group of its step
    the first step       the evaluation of the start           the judge, or its ``timeout_s``
    a stop               the step under way, a little          the learner, or ``stop_grace_s``
    a pause's end        a person (`accord resume`)            the wish, read each second
    a lost learner       another one, from what is on disk     its start, or ``max_restarts``

Nobody waits in a circle: a learner step needs only groups that are admitted already, a broadcast
only workers that answer or are given up, and admission only a broadcast. With ``bound = 0`` the
waiting is the whole of it (train, send, generate, train ...); every step of bound lets generation
run one step ahead.

At most one each goes on of: a learner step, the writing of a checkpoint, a broadcast, an
evaluation (``evaluations`` says what it holds up). The loop starts whatever can start and wakes
when anything ends. It holds metadata only: rollouts and weights go from role to role.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.contracts.config.monitors import MonitorsConfig
from cluster.contracts.errors import AccordError, LearnerLost, Resumable
from cluster.contracts.metrics import values
from cluster.contracts.protocols import Clock, Journal, LearnerHandle, PromptSource, Sink
from cluster.contracts.records import RunState, StepResult, WeightManifest
from cluster.contracts.stopwatch import Stopwatch
from cluster.loop.activities import Name
from cluster.loop.admission import Admission
from cluster.loop.autoscale import Autoscaler
from cluster.loop.bookkeeping import Bookkeeping
from cluster.loop.broadcasts import Broadcasts
from cluster.loop.context import LoopContext
from cluster.loop.ending import Abandoned, Ending, GoesBack
from cluster.loop.evaluations import EvaluationRole, Evaluations
from cluster.loop.learner_steps import LearnerSteps
from cluster.loop.learner_supervisor import LearnerSupervisor
from cluster.loop.live import LoopFacts, Wait
from cluster.loop.pacing import Pacer
from cluster.loop.pool import WorkerPool
from cluster.loop.saving import Saving
from cluster.loop.settings import LoopSettings
from cluster.loop.staleness import AdmissionLedger, GroupBuffer
from cluster.loop.steering import Steering
from cluster.loop.timeline import Timeline
from cluster.runs.control import Wishes
from cluster.runs.monitor_actions import MonitorActions

LOOK_AROUND_S = 1.0  # how often it is looked what people want of the run


class Controller:
    """Runs the loop from ``state`` to ``settings.steps`` learner steps."""

    def __init__(
        self,
        settings: LoopSettings,
        prompts: PromptSource,
        learner: LearnerHandle,
        pool: WorkerPool,
        run: Journal,
        sinks: list[Sink],
        clock: Clock,
        timeline: Timeline,
        state: RunState | None = None,
        wishes: Callable[[], Wishes] = Wishes,
        cpu_s: Callable[[], float] = time.thread_time,
        saved: int | None = None,
        evaluation: EvaluationRole | None = None,
        monitors: MonitorActions | None = None,
    ) -> None:
        """``cpu_s``: CPU seconds of the loop's thread. ``saved``: step of the newest checkpoint,
        where ``state`` is of a later one. ``evaluation``: how the policy is evaluated while it
        trains; None: it is not. ``monitors``: what they want done to the run."""
        self._settings = settings
        self._pool = pool
        self._run = run
        self._clock = clock
        first = state.step if state else 0
        # On resume everything before ``first`` is trained, so it counts as admitted and held.
        self._ledger = AdmissionLedger(
            prompts_per_step=settings.prompts_per_step,
            bound=settings.staleness_bound,
            last_step=settings.steps,
            admitted=first * settings.prompts_per_step,
            held=first,
        )
        self._buffer = GroupBuffer(self._ledger, next_step=first)
        loop = LoopContext(settings=settings, run=run, clock=clock, timeline=timeline)
        self._activities = loop.activities
        self._ending = Ending()
        self._steering = Steering(wishes, run.event, _autoscaler(settings))
        self._learner = LearnerSupervisor(learner, loop)
        books = self._books = Bookkeeping(
            prompts, pool, sinks, self._buffer, self._steering, state, cpu_s, loop
        )
        saved = first if saved is None else saved
        self._saving = Saving(self._learner, lambda: books.state(self.step), saved, loop)
        evaluations = self._evaluations = Evaluations(
            evaluation, pool, self._ledger, self._saving, self._ending, books.note, loop, first
        )
        self._broadcasts = Broadcasts(
            pool.broadcast,
            books.broadcast_ended,
            self._ledger,
            lambda: evaluations.holds_weights,
            loop,
        )
        pacer = Pacer(settings.staleness_lead, next_step=first)
        self._admission = Admission(prompts, pool, self._buffer, pacer, loop)
        self._monitors = monitors or MonitorActions(MonitorsConfig(enabled=False), Path())
        self._steps = LearnerSteps(
            prompts,
            pool,
            self._learner,
            self._buffer,
            books,
            self._broadcasts,
            self._saving,
            pacer,
            loop,
            after_each=self._step_ended,
            monitors=self._monitors,
        )
        self._started = False
        self._waits: Stopwatch | None = None  # while the loop runs

    @property
    def step(self) -> int:
        """Learner steps finished."""
        return self._steps.done

    def request_stop(self) -> None:
        """Finish what is cheap to finish, keep everything done, and return."""
        self._ending.now()
        self._activities.wake()

    def end(self, problem: Resumable, keep_s: float) -> None:
        """Stop because of ``problem``, which ``run`` or ``start`` then raises. The newest state is
        saved if that takes no longer than ``keep_s`` seconds: who has to save it may hang, too."""
        self._ending.because(problem, keep_s)
        self._activities.wake()

    def on_reward_replicas(self, call: Callable[[int], None]) -> None:
        """``call`` with the number of reward services whenever another one is asked for."""
        self._steering.on_reward_replicas(call)

    def request_checkpoint(self) -> None:
        """Write one after the step under way, or at once where none is."""
        self._saving.due = self.step > 0
        self._activities.wake()

    @property
    def stopped_as_asked(self) -> bool:
        """Whether the run ended because `accord stop` asked for it, and in no hurry."""
        return self._steering.stop and not self._ending.hurried.is_set()

    @property
    def stopped_early(self) -> str | None:
        """Why the evaluations have ended the run before its last step; None: they have not."""
        return self._evaluations.stopped

    # -- from the start to the end ----------------------------------------------------------------

    async def start(self) -> bool:
        """Bring up learner and workers, side by side. False: a stop was asked for meanwhile."""
        self._books.began = self._clock.now()
        self._activities.begin("look around", self._look_around())
        manifest = await self._start_unless_stopped()
        if manifest is None:
            if self._ending.problem is not None:
                raise self._ending.problem
            return False
        self._started = True
        self._books.began = self._clock.now()
        self._saving.loop_began(self._books.began)
        self._run.account(start=self.step)
        self._run.event("loop_started", step=self.step, version=manifest.version)
        return True

    async def _start_unless_stopped(self) -> WeightManifest | None:
        """Starting takes long; a stop asked for meanwhile does not wait for it (None)."""
        start = asyncio.ensure_future(self._start())
        stop = asyncio.ensure_future(self._ending.asked.wait())
        try:
            await asyncio.wait([start, stop], return_when=asyncio.FIRST_COMPLETED)
            return start.result() if start.done() else None
        finally:
            start.cancel()
            stop.cancel()
            await asyncio.gather(start, stop, return_exceptions=True)
            if not start.done() or start.cancelled() or start.exception():
                await self._activities.cancel()

    async def _start(self) -> WeightManifest:
        # Engines are built from the model on disk, which takes as long as the learner's own start.
        # A worker waits for the first published weights only to load and verify them.
        first = asyncio.ensure_future(self._learner.start(self.step))
        workers = asyncio.ensure_future(self._pool.start(self._settings.workers, first))
        try:
            await asyncio.gather(first, workers)  # raises the first problem of either
            return first.result()
        finally:
            first.cancel()
            workers.cancel()

    async def run(self) -> RunState:
        """Train; returns the state reached. Raises what stopped the run, with its cause."""
        if not self._started and not await self.start():
            return self._books.state(self.step)
        self._learner.becomes("waiting")
        self._books.loop_began(self._learner.totals)
        waits = self._waits = Stopwatch(self._clock.now(), "groups")
        self._pool.on_news(self._activities.wake)
        self._learner.watch()
        try:
            while True:
                await self._train_to_the_end(waits)
                if self._ending.problem is not None:
                    await self._keep_what_can_be_kept()
                    raise self._ending.problem
                stopped = self._ending.asked.is_set()
                if stopped:
                    await self._steps.finish(self._ending.hurried)
                try:
                    await self._saving.finish(stopped=stopped)
                    return self._books.state(self.step)
                except LearnerLost as problem:  # another one brings the last state back
                    self._steps.learner_lost(problem)
        finally:
            self._admission.cancel()
            await self._activities.cancel()

    async def _train_to_the_end(self, waits: Stopwatch) -> None:
        """Until the last step is done, by a learner that still stands there, or a stop."""
        while not self._ending.asked.is_set():
            if self.step >= self._settings.steps and not self._must_go_on():
                return
            # Each of these does nothing when it cannot start; none of them waits.
            if not self._steering.paused:
                self._admission.admit()
            self._saving.start()
            if not self._steering.paused:
                if not self._step_waits():
                    self._steps.start()
                self._evaluations.start()
            self._broadcasts.start()
            waits.turn(self._clock.now(), self._waits_for())
            await self._one_event_or_the_end()

    def _must_go_on(self) -> bool:
        """Whether there is something left to do after the last step."""
        return self._learner.being_replaced(self.step) or self._evaluations.open

    def _step_waits(self) -> bool:
        """Whether the next step, if not one that a new learner does once more, has to wait."""
        held = self._saving.holds_step or self._evaluations.holds_first_step
        return held and not self._learner.being_replaced(self.step)

    async def _one_event_or_the_end(self) -> None:
        try:
            await self._one_event()
        except Resumable:  # what was learnt is sound, so it is kept
            await self._finish()
            raise
        except GoesBack:
            await self._saving.settle()
            raise

    async def _finish(self) -> None:
        await self._steps.finish(self._ending.hurried)
        await self._saving.finish(stopped=self._ending.asked.is_set())

    async def _keep_what_can_be_kept(self) -> None:
        keep_s = self._ending.keep_s
        try:
            async with asyncio.timeout(keep_s):
                await self._finish()
        # What ends the run may have taken the learner with it. It is raised, whatever this meets.
        except (AccordError, TimeoutError) as problem:
            cause = str(problem) or f"not written within {keep_s:.0f} s"
            self._run.event("last_checkpoint_failed", step=self.step, cause=cause)

    # -- what is begun, and what ends -------------------------------------------------------------

    async def _one_event(self) -> None:
        """Wait until something ends, then take all that has. Costs the same with any number of
        workers: nothing is asked of those that have no news."""
        await self._activities.news()
        for harvest, groups in self._pool.take_finished():
            self._buffer.add(harvest, groups)
        self._admission.note_complete_steps()
        for name, task in self._activities.take_ended():
            self._after(name, task)

    def _after(self, name: Name, task: asyncio.Task[Any]) -> None:
        problem = task.exception()
        if isinstance(problem, LearnerLost):
            self._saving.due |= name in ("snapshot", "save")
            self._steps.learner_lost(problem)
        elif name == "step":
            self._steps.after(task)
        elif name == "ahead":
            task.result()  # it left every problem to the step, but for those of the loop itself
            self._learner.ahead_ended()
        elif name == "broadcast":
            self._broadcasts.after(task)
        elif name == "snapshot":
            self._saving.copied(task)
        elif name == "save":
            self._saving.written(task)
        elif name == "successor":
            self._steps.learner_succeeded(task.result())
        elif name == "evaluation":
            self._evaluations.after(task, self.step)
        else:
            task.result()  # raises what went wrong: nothing that fails here may go unnoticed

    def _step_ended(self, result: StepResult) -> None:
        self._look()
        self._go_back_if_wanted()
        self._evaluations.step_ended(self.step, values(result.metrics))

    def _go_back_if_wanted(self) -> None:
        wanted = self._monitors.go_back
        if wanted is not None and not self._steering.stop:
            state = self._books.state(self.step)
            admitted, refused = self._ledger.admitted, self._buffer.refused
            raise GoesBack(wanted.alarm, Abandoned(state=state, admitted=admitted, refused=refused))

    # -- what is asked of the run -----------------------------------------------------------------

    async def _look_around(self) -> None:
        while True:
            await asyncio.sleep(LOOK_AROUND_S)
            self._look()

    def _look(self) -> None:
        """Follow what is asked of the run: fewer or more workers, a pause, its end, a stop."""
        steering, pool = self._steering, self._pool
        paused = steering.paused
        have = pool.count("starting", "serving")
        steering.look(step=self.step, workers=have, serving=pool.count("serving"))
        if steering.stop:
            self._ending.asked.set()
        if not self._started:
            return
        if steering.paused and not pool.leased and not self._activities.under_way:
            steering.rests(step=self.step, finished=len(self._buffer))
        if (paused and not steering.paused) or steering.stop:
            self._activities.wake()
        self._follow_wanted_workers()

    def _follow_wanted_workers(self) -> None:
        wanted, have = self._steering.workers, self._pool.wanted
        if wanted is not None and wanted != have and "resize" not in self._activities:
            self._run.event("resize", have=have, wanted=wanted)
            self._activities.begin("resize", self._pool.resize(wanted))

    # -- for a look at the run --------------------------------------------------------------------

    def facts(self) -> LoopFacts:
        """At any time: what is known already; costs the same always."""
        now, learner = self._clock.now(), self._learner
        return LoopFacts(
            step=self.step,
            steps=self._settings.steps,
            elapsed_s=self._books.elapsed_s(now) if self._books.began else 0.0,
            learner=learner.state,
            learner_since=learner.since,
            waits=self._waits.totals(now) if self._waits else {},
            ready=len(self._buffer),
            missing=0 if "step" in self._activities else self._buffer.lacking(),
            per_step=self._settings.prompts_per_step,
            published=learner.published,
            held=self._ledger.held if self._waits else -1,
            sending="broadcast" in self._activities,
            bound=self._settings.staleness_bound,
            saved=self._saving.saved,
            paused=self._steering.paused,
            under_way=self._activities.under_way,
        )

    def _waits_for(self) -> Wait:
        acts = self._activities
        if "step" in acts:
            return "learner"
        # Nothing is generated or scored, as no more may be admitted before the weights are there.
        return "weights" if "broadcast" in acts and not self._pool.in_flight else "groups"


def _autoscaler(settings: LoopSettings) -> Autoscaler | None:
    if settings.autoscale is None:
        return None
    least, most = settings.autoscale
    return Autoscaler(least=least, most=most)
