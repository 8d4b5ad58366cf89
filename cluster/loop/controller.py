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
    an admitted group    a serving worker                      a worker that joins or comes back
    a finished group     the other groups of its step          the last of them (or its failure)
    learner step s       its groups; never for a broadcast     the slowest group of s
    the next step        the copy of the learner's state, if   the learner, within seconds
                         a checkpoint is due
    a broadcast          the one before                        the slowest worker (lost: left out)
    a swap in a worker   the token under way                   the engine, some milliseconds later
    a stop               the step under way, a little          the learner, or ``stop_grace_s``
    a pause's end        a person (`accord resume`)            the wish, read each second
    a lost learner       another one, from what is on disk     its start, or ``max_restarts``

Nobody waits in a circle: a learner step needs only groups that are admitted already, a broadcast
only workers that answer or are given up, and admission only a broadcast. With ``bound = 0`` the
waiting is the whole of it (train, send, generate, train ...); every step of bound lets generation
run one step ahead.

At most one each goes on of: a learner step, the writing of a checkpoint, a broadcast. The loop
starts whatever can start and wakes when anything ends. It holds metadata only: rollouts and weights
go from role to role.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.contracts.crash_points import passing
from cluster.contracts.errors import (
    AccordError,
    Fatal,
    LearnerLost,
    NotSaved,
    Resumable,
    Retryable,
    RolledBack,
    WeightsAway,
)
from cluster.contracts.live import LearnerState
from cluster.contracts.metrics import values
from cluster.contracts.protocols import Clock, Journal, LearnerHandle, PromptSource, Sink
from cluster.contracts.records import (
    Assignment,
    GroupMeta,
    RunState,
    StepInput,
    StepResult,
    WeightManifest,
)
from cluster.loop.autoscale import Autoscaler
from cluster.loop.live import LoopFacts, Wait, Waits
from cluster.loop.loop_metrics import Accounts, Standing
from cluster.loop.pool import WorkerPool
from cluster.loop.settings import LoopSettings
from cluster.loop.staleness import AdmissionLedger, GroupBuffer
from cluster.loop.steering import Steering
from cluster.loop.succession import Succession
from cluster.loop.timeline import Timeline
from cluster.runs.control import Wishes

LOOK_AROUND_S = 1.0  # how often it is looked what people want of the run
BACKGROUND = {"look around", "watch"}  # of a run that rests, nothing else is under way


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
    ) -> None:
        """``saved``: step of the newest checkpoint, where ``state`` is of a later one."""
        self._settings = settings
        self._prompts = prompts
        self._learner = learner
        self._pool = pool
        self._run = run
        self._sinks = sinks
        self._clock = clock
        self._timeline = timeline
        self._steering = Steering(wishes, run.event, _autoscaler(settings))
        self._cpu_s = cpu_s  # CPU seconds of the loop's thread
        first = state.step if state else 0
        self._step = first  # learner steps finished
        self._elapsed_before = state.elapsed_s if state else 0.0
        self._dropped: dict[int, Mapping[str, Any]] = (
            {row["group"]: row for row in state.dropped} if state else {}
        )
        # On resume everything before ``first`` is trained, so it counts as admitted and held.
        self._ledger = AdmissionLedger(
            prompts_per_step=settings.prompts_per_step,
            bound=settings.staleness_bound,
            last_step=settings.steps,
            admitted=first * settings.prompts_per_step,
            held=first,
        )
        self._buffer = GroupBuffer(self._ledger, next_step=first)
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()  # the stop must not wait long for the step under way
        self._ending: Resumable | None = None  # why it is stopped, where nobody asked for it
        self._keep_s = 0.0  # then the longest wait for the last checkpoint
        self._wake = asyncio.Event()  # something ended, or it is time to look around
        self._tasks: dict[str, asyncio.Task[Any]] = {}
        self._to_broadcast: WeightManifest | None = None  # only the newest is worth sending
        self._taken: list[GroupMeta] = []  # groups of the learner step under way
        self._step_attempts = 0
        self._sink_errors = 0
        self._started = False
        self._saved = first if saved is None else saved  # step of the newest checkpoint
        self._save_due = False
        self._save_began = 0.0
        self._step_abandoned = False
        self._began = 0.0
        self._published = -1  # newest version of the learner
        self._succession = Succession(settings.max_learner_restarts)
        self._waits: Waits | None = None  # while the loop runs
        self._learner_state: LearnerState = "starting"
        self._learner_since = 0.0

    @property
    def step(self) -> int:
        """Learner steps finished."""
        return self._step

    def request_stop(self) -> None:
        """Finish what is cheap to finish, keep everything done, and return."""
        self._hurry.set()
        self._stop.set()
        self._wake.set()

    def end(self, problem: Resumable, keep_s: float) -> None:
        """Stop because of ``problem``, which ``run`` or ``start`` then raises. The newest state is
        saved if that takes no longer than ``keep_s`` seconds: who has to save it may hang, too."""
        if self._ending is None:
            self._ending, self._keep_s = problem, keep_s
        self.request_stop()

    def on_reward_replicas(self, call: Callable[[int], None]) -> None:
        """``call`` with the number of reward services whenever another one is asked for."""
        self._steering.on_reward_replicas(call)

    def request_checkpoint(self) -> None:
        """Write one after the step under way, or at once where none is."""
        self._save_due = self._step > 0
        self._wake.set()

    @property
    def stopped_as_asked(self) -> bool:
        """Whether the run ended because `accord stop` asked for it, and in no hurry."""
        return self._steering.stop and not self._hurry.is_set()

    async def start(self) -> bool:
        """Bring up learner and workers, side by side. False: a stop was asked for meanwhile."""
        self._began = self._clock.now()
        self._spawn("look around", self._look_around())
        manifest = await self._start_unless_stopped()
        if manifest is None:
            if self._ending is not None:
                raise self._ending
            return False
        self._started = True
        self._began = self._clock.now()
        self._run.account(start=self._step)
        self._run.event("loop_started", step=self._step, version=manifest.version)
        return True

    async def run(self) -> RunState:
        """Train; returns the state reached. Raises what stopped the run, with its cause."""
        if not self._started and not await self.start():
            return self._state()
        self._accounts = Accounts(self._settings, self._pool, self._clock.now, self._cpu_s)
        self._learner_is("waiting")
        waits = self._waits = Waits(self._clock.now())
        self._pool.on_news(self._wake.set)
        self._watch_learner()
        try:
            while True:
                await self._train_to_the_end(waits)
                if self._ending is not None:
                    await self._keep_what_can_be_kept()
                    raise self._ending
                if self._stop.is_set():
                    await self._finish_running_step()
                try:
                    await self._finish_saving()
                    return self._state()
                except LearnerLost as problem:  # another one brings the last state back
                    self._learner_lost(problem)
        finally:
            await self._end_tasks()

    async def _train_to_the_end(self, waits: Waits) -> None:
        """Until the last step is done, by a learner that still stands there, or a stop."""
        while not self._stop.is_set():
            if self._step >= self._settings.steps and not self._learner_is_replaced:
                return
            # Each of these does nothing when it cannot start; none of them waits.
            self._admit()
            self._start_save()
            self._start_step()
            self._start_broadcast()
            waits.turn(self._clock.now(), self._waits_for())
            await self._one_event_or_the_end()

    async def _keep_what_can_be_kept(self) -> None:
        try:
            async with asyncio.timeout(self._keep_s):
                await self._finish_running_step()
                await self._finish_saving()
        # What ends the run may have taken the learner with it. It is raised, whatever this meets.
        except (AccordError, TimeoutError) as problem:
            cause = str(problem) or f"not written within {self._keep_s:.0f} s"
            self._run.event("last_checkpoint_failed", step=self._step, cause=cause)

    async def _end_tasks(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    # -- the four activities ----------------------------------------------------------------------

    async def _start_unless_stopped(self) -> WeightManifest | None:
        """Starting takes long; a stop asked for meanwhile does not wait for it (None)."""
        start = asyncio.ensure_future(self._start())
        stop = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait([start, stop], return_when=asyncio.FIRST_COMPLETED)
            return start.result() if start.done() else None
        finally:
            start.cancel()
            stop.cancel()
            await asyncio.gather(start, stop, return_exceptions=True)
            if not start.done() or start.cancelled() or start.exception():
                await self._end_tasks()

    async def _start(self) -> WeightManifest:
        # Engines are built from the model on disk, which takes as long as the learner's own start.
        # A worker waits for the first published weights only to load and verify them.
        first = asyncio.ensure_future(self._first_weights())
        workers = asyncio.ensure_future(self._pool.start(self._settings.workers, first))
        try:
            await asyncio.gather(first, workers)  # raises the first problem of either
            return first.result()
        finally:
            first.cancel()
            workers.cancel()

    async def _first_weights(self) -> WeightManifest:
        began = self._clock.now()
        self._learner_is("starting")
        manifest = await self._learner.start()
        if manifest.version != self._step:
            raise RolledBack(
                f"the learner starts at version {manifest.version}, the run at {self._step}"
            )
        self._succession.published(manifest)
        seconds = round(self._clock.now() - began, 3)
        self._run.event("learner_ready", version=manifest.version, seconds=seconds)
        self._published = manifest.version
        self._learner_is("waiting")
        return manifest

    def _admit(self) -> None:
        if self._steering.paused:
            return
        ids = self._ledger.admit(self._ledger.room())
        if ids:
            samples = self._settings.samples_per_prompt
            self._pool.submit(
                [
                    Assignment(group_id=i, prompt=self._prompts.prompt(i), samples=samples)
                    for i in ids
                ]
            )
            passing("driver.after_admit")

    def _start_step(self) -> None:
        if {"step", "snapshot", "successor"} & self._tasks.keys():
            return  # one learner, one step: steps change the same weights
        if self._steering.paused:
            return
        if self._succession.redo:
            self._ask_step(self._succession.redo[0])
            return
        taken = self._buffer.take()
        if taken is None:
            return
        batch, metas = taken
        now = self._clock.now()
        self._timeline.span("learner", "wait for batch", self._accounts.waiting_since, now)
        self._note_dropped(metas)
        if not batch.group_ids:
            causes = {m.failure for m in metas}
            raise Fatal(f"every prompt of step {batch.step} failed: {'; '.join(map(str, causes))}")
        self._check_lag(batch.step, metas)  # the ledger's promise, checked on what really came
        self._taken = metas
        self._accounts.step_begins(now)
        self._ask_step(batch)

    def _ask_step(self, batch: StepInput) -> None:
        passing("driver.before_step")
        self._succession.asked(batch)
        self._learner_is("training")
        sending = self._pool.sent_version
        self._spawn("step", self._learner.step(replace(batch, sending=sending)))

    def _start_broadcast(self) -> None:
        if self._to_broadcast is not None and "broadcast" not in self._tasks:
            manifest, self._to_broadcast = self._to_broadcast, None
            self._spawn("broadcast", self._broadcast(manifest))

    async def _broadcast(self, manifest: WeightManifest) -> int:
        began = self._clock.now()
        reports = await self._pool.broadcast(manifest)
        ended = self._clock.now()
        self._accounts.broadcast_ended(reports, ended - began)
        self._timeline.span("weights", f"version {manifest.version}", began, ended)
        passing("driver.after_broadcast")
        return manifest.version

    async def _one_event(self) -> None:
        """Wait until something ends, then take all that has. Costs the same with any number of
        workers: nothing is asked of those that have no news."""
        await self._wake.wait()
        self._wake.clear()
        for harvest, groups in self._pool.take_finished():
            self._buffer.add(harvest, groups)
        for name in [n for n, task in self._tasks.items() if task.done()]:
            if (task := self._tasks.pop(name, None)) is not None:
                self._after(name, task)

    def _after(self, name: str, task: asyncio.Task[Any]) -> None:
        problem = task.exception()
        if isinstance(problem, LearnerLost):
            self._learner_lost(problem)
        elif name == "step":
            # Only what was lost on the way is tried again: any other problem is the learner's
            # own, and its weights may be half changed.
            if isinstance(problem, Retryable):
                self._step_again(problem)
            else:
                self._after_step(task.result())
        elif name == "broadcast":
            if not isinstance(problem, WeightsAway):  # they are sent again by the next learner
                self._ledger.weights_held(task.result())
        elif name == "snapshot":
            self._spawn("save", self._save(task.result()))
        elif name == "save":
            self._after_save(task)
        elif name == "successor":
            self._learner_succeeded(task.result())
        else:
            task.result()  # raises what went wrong: nothing that fails here may go unnoticed

    async def _one_event_or_the_end(self) -> None:
        try:
            await self._one_event()
        except Resumable:  # what was learnt is sound, so it is kept
            await self._finish_running_step()
            await self._finish_saving()
            raise

    def _after_step(self, result: StepResult) -> None:
        now = self._clock.now()
        self._succession.published(result.manifest)
        self._succession.redo = self._succession.redo[1:]
        if result.step < self._step:  # done once more by a new learner
            self._learner_is("waiting")
            if result.version == self._step:  # older ones were held by all before
                self._to_broadcast = result.manifest
            return
        passing("driver.after_step")
        began = self._accounts.step_ended(now, result.trained_tokens)
        self._learner_is("waiting")
        self._timeline.span("learner", f"step {result.step}", began, now)
        self._step = result.step + 1
        self._step_attempts = 0
        self._published = result.version
        self._account(result)
        # First of all: workers fetch while the numbers are written.
        self._to_broadcast = result.manifest
        self._start_broadcast()
        self._write_metrics(result, now)
        passing("driver.after_metrics")
        self._look()
        self._save_due = self._save_due or self._time_to_save(now)
        self._accounts.next_window(now, waiting_since=self._clock.now())

    def _step_again(self, problem: Retryable) -> None:
        """The step's rollouts were lost on their way; nothing was learnt. Generate them again."""
        self._step_attempts += 1
        redone = self._succession.redo[:1]
        if redone and redone[0].step < self._step:
            raise RolledBack(f"rollouts of step {redone[0].step} are lost: {problem}")
        self._succession.given_back(self._step)
        if self._step_attempts >= self._settings.max_step_attempts:
            raise Fatal(f"step {self._step} was tried {self._step_attempts} times: {problem}")
        # The same ids under a higher attempt, so that a late answer to the first one is refused.
        lost = self._buffer.give_back(self._step, self._taken)
        self._accounts.step_lost(self._clock.now(), lost)
        self._learner_is("waiting")
        self._run.event("step_retried", step=self._step, groups=len(lost), cause=str(problem))
        self._pool.submit(
            [
                Assignment(
                    group_id=meta.group_id,
                    prompt=self._prompts.prompt(meta.group_id),
                    samples=self._settings.samples_per_prompt,
                    attempt=meta.attempt + 1,
                )
                for meta in lost
            ]
        )

    # -- another learner --------------------------------------------------------------------------

    def _watch_learner(self) -> None:
        self._spawn("watch", self._learner.lost())

    def _learner_lost(self, problem: LearnerLost) -> None:
        """Start another one, from what is on disk. Workers go on meanwhile, as far as the bound
        allows; finished groups wait for it."""
        if (step := self._tasks.get("step")) is not None and step.done() and not step.exception():
            self._after_step(self._tasks.pop("step").result())  # the last that it did
        # All of them end with it, each in its own way; the first has told.
        for name in ("step", "watch", "snapshot", "save", "successor"):
            if (task := self._tasks.pop(name, None)) is not None:
                task.cancel()
                self._save_due |= name in ("snapshot", "save")
        self._to_broadcast = None
        self._learner_is("starting")
        self._pool.faults["learner"] += 1
        self._run.event("learner_lost", step=self._step, cause=str(problem))
        pause_s = self._succession.lost(problem, self._clock.now())
        self._spawn("successor", self._successor(pause_s))

    async def _successor(self, pause_s: float) -> WeightManifest:
        await self._clock.sleep(pause_s)
        return await self._learner.start(self._step)

    @property
    def _behind(self) -> bool:
        """Whether the learner has still to do again what its predecessor had done."""
        redo = self._succession.redo
        return bool(redo) and redo[0].step < self._step

    @property
    def _learner_is_replaced(self) -> bool:
        """Whether another learner is on its way to where its predecessor stood."""
        return "successor" in self._tasks or self._behind

    def _learner_succeeded(self, manifest: WeightManifest) -> None:
        self._succession.succeeded(manifest, self._step)
        seconds = round(self._clock.now() - self._succession.losses[-1].at, 3)
        again = [batch.step for batch in self._succession.redo]
        self._run.event("learner_replaced", version=manifest.version, seconds=seconds, again=again)
        self._learner_is("waiting")
        self._watch_learner()
        if manifest.version == self._step:
            self._to_broadcast = manifest  # the same weights, at another place

    # -- checkpoints ------------------------------------------------------------------------------

    def _time_to_save(self, now: float) -> bool:
        every, every_s = self._settings.checkpoint_every, self._settings.checkpoint_every_s
        return (
            self._step % every == 0
            or self._step == self._settings.steps
            or (every_s is not None and now - max(self._save_began, self._began) >= every_s)
        )

    def _start_save(self) -> None:
        busy = {"step", "snapshot", "save", "successor"} & self._tasks.keys()
        if self._save_due and not busy and not self._behind:
            self._save_due = False
            self._spawn("snapshot", self._snapshot())

    async def _snapshot(self) -> tuple[RunState, int]:
        """The only part of a checkpoint that a step has to wait for."""
        state, self._save_began = self._state(), self._clock.now()
        self._learner_is("saving")
        nbytes = await self._learner.snapshot()
        self._learner_is("waiting")
        self._timeline.span("learner", "copy state", self._save_began, self._clock.now())
        return state, nbytes

    async def _save(self, snapshot: tuple[RunState, int]) -> Path:
        """Beside the loop: hashing and copying many gigabytes takes minutes."""
        state, nbytes = snapshot
        began, copied = self._save_began, self._clock.now()
        # Written beside and renamed last: an interrupt leaves the checkpoint before it whole.
        staging = await self._run.begin_checkpoint(state.step, nbytes)
        try:
            files = await self._learner.store(str(staging))
        except NotSaved:
            await self._run.abandon_checkpoint(staging)
            raise
        passing("driver.mid_save")
        keep = self._settings.keep_checkpoints
        path = await self._run.commit_checkpoint(staging, files, state, keep)
        self._saved = state.step
        ended = self._clock.now()
        self._timeline.span("checkpoint", f"step {state.step}", copied, ended)
        self._run.event(
            "checkpoint",
            step=state.step,
            path=str(path),
            bytes=nbytes,
            learner_waited_s=round(copied - began, 3),
            seconds=round(ended - began, 3),
        )
        return path

    def _after_save(self, task: asyncio.Task[Any]) -> None:
        if isinstance(problem := task.exception(), NotSaved):
            # What was trained is in the learner's memory; it is written at the next interval.
            self._run.event("checkpoint_failed", step=self._step, cause=str(problem))
        else:
            task.result()  # raises any other problem

    async def _finish_saving(self) -> None:
        """At the end: wait for the checkpoint under way, and write the newest state. Raises
        Resumable when that cannot be written; LearnerLost, where a run has come to its end, for
        another learner to write it."""
        try:
            if (task := self._tasks.pop("snapshot", None)) is not None:
                self._tasks["save"] = asyncio.ensure_future(self._save(await task))
            if (task := self._tasks.pop("save", None)) is not None:
                await asyncio.wait([task])
                self._after_save(task)
            if self._step > 0 and self._step != self._saved and not self._step_abandoned:
                await self._save(await self._snapshot())
        except (NotSaved, LearnerLost) as problem:
            if isinstance(problem, LearnerLost) and not self._stop.is_set():
                raise
            raise Resumable(
                f"the run has ended, and its last state, of step {self._step}, could not be saved: "
                f"{problem}"
            ) from problem

    async def _finish_running_step(self) -> None:
        """On a stop: wait for the step under way. When somebody is in a hurry, only a little; the
        step is lost if it takes longer."""
        task = self._tasks.get("step")
        if self._learner_is_replaced:
            self._run.event("step_abandoned", step=self._step)
            self._saved = self._step  # by nobody, but a resume trains it again from the rollouts
            return
        if task is None:
            return
        hurry = asyncio.ensure_future(self._hurry.wait())
        await asyncio.wait([task, hurry], return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        # A person is waiting: better to lose the step than to hold the terminal for a long one.
        done, _ = await asyncio.wait([task], timeout=self._settings.stop_grace_s)
        if done and isinstance(task.exception(), Retryable | LearnerLost):
            self._tasks.pop("step")  # nothing of it is kept
        elif done:
            self._tasks.pop("step")
            result, now = task.result(), self._clock.now()
            self._step = result.step + 1
            self._account(result)
            self._accounts.step_ended(now, result.trained_tokens)
            self._write_metrics(result, now)
        else:
            self._run.event("step_abandoned", step=self._step)
            self._step_abandoned = True  # the learner is busy: saving now would wait for it

    # -- accounts ---------------------------------------------------------------------------------

    def facts(self) -> LoopFacts:
        """For a look at the run, at any time: what is known already; costs the same always."""
        now = self._clock.now()
        return LoopFacts(
            step=self._step,
            steps=self._settings.steps,
            elapsed_s=self._elapsed_before + now - self._began if self._began else 0.0,
            learner=self._learner_state,
            learner_since=self._learner_since,
            waits=self._waits.totals(now) if self._waits else {},
            ready=len(self._buffer),
            missing=0 if "step" in self._tasks else self._buffer.lacking(),
            per_step=self._settings.prompts_per_step,
            published=self._published,
            held=self._ledger.held if self._waits else -1,
            sending="broadcast" in self._tasks,
            bound=self._settings.staleness_bound,
            saved=self._saved,
            paused=self._steering.paused,
            under_way=tuple(sorted(self._tasks.keys() - BACKGROUND)),
        )

    def _waits_for(self) -> Wait:
        if "step" in self._tasks:
            return "learner"
        # Nothing is generated or scored, as no more may be admitted before the weights are there.
        return "weights" if "broadcast" in self._tasks and not self._pool.in_flight else "groups"

    def _learner_is(self, state: LearnerState) -> None:
        self._learner_state, self._learner_since = state, self._clock.now()

    def _account(self, result: StepResult) -> None:
        """Enter the step that has just ended into the books, and where every other group is."""
        trained = [meta for meta in self._taken if meta.failure is None]
        self._run.account(
            step=result.step,
            trained=[meta.group_id for meta in trained],
            dropped={str(m.group_id): m.failure for m in self._taken if m.failure is not None},
            samples=sum(meta.samples for meta in trained),
            tokens=sum(meta.response_tokens for meta in trained),
            version_min=min(meta.version_min for meta in trained),
            version_max=max(meta.version_max for meta in trained),
            issued=self._ledger.admitted,
            ready=len(self._buffer) + self._pool.unread,
            in_flight=self._pool.in_flight,
            refused=self._buffer.refused,
        )

    def _check_lag(self, step: int, metas: list[GroupMeta]) -> None:
        for meta in metas:
            if meta.failure is None and step - meta.version_min > self._settings.staleness_bound:
                raise Fatal(
                    f"group {meta.group_id} has tokens of version {meta.version_min} "
                    f"at step {step}: older than staleness.bound = {self._settings.staleness_bound}"
                )

    def _note_dropped(self, metas: list[GroupMeta]) -> None:
        for meta in metas:
            if meta.failure is not None and meta.group_id not in self._dropped:
                prompt = self._prompts.prompt(meta.group_id)
                row = {"group": meta.group_id, "prompt": prompt.id, "cause": meta.failure}
                self._dropped[meta.group_id] = row
                self._run.event("group_dropped", **row)

    def _state(self) -> RunState:
        return RunState(
            step=self._step,
            version=self._step,
            # Not the ledger's: what was admitted beyond is generated again by newer weights.
            next_group=self._step * self._settings.prompts_per_step,
            prompts_total=len(self._prompts),
            dropped=tuple(self._dropped.values()),
            elapsed_s=self._elapsed_before + self._clock.now() - self._began,
        )

    def _write_metrics(self, result: StepResult, now: float) -> None:
        for cause in result.not_written:
            self._run.event("rollouts_not_written", step=self._step, cause=cause)
        if (tokens := result.smaller_microbatches) is not None:
            self._run.event("learner_out_of_memory", step=self._step, tokens_per_microbatch=tokens)
        standing = Standing(
            queued=len(self._buffer),
            refused=self._buffer.refused,
            refused_tokens=self._buffer.refused_tokens,
            dropped=len(self._dropped),
            held=self._ledger.held,
            elapsed_s=self._elapsed_before + now - self._began,
            sink_errors=self._sink_errors,
        )
        numbers = values(result.metrics) | self._accounts.numbers(result, now, standing)
        # JSON has no NaN; a number that could not be measured is left out.
        numbers = {name: v for name, v in numbers.items() if math.isfinite(v)}
        self._steering.step_ended(numbers, now=now, wanted=self._pool.wanted)
        for sink in self._sinks:
            try:
                sink.write(self._step, numbers)
            # Monitoring may fail without stopping a run; it is counted and logged.
            except Exception as problem:
                self._sink_errors += 1
                self._run.event("sink_failed", sink=type(sink).__name__, cause=repr(problem))

    async def _look_around(self) -> None:
        while True:
            await asyncio.sleep(LOOK_AROUND_S)
            self._look()

    def _look(self) -> None:
        """Follow what is asked of the run: fewer or more workers, a pause, its end, a stop."""
        steering, pool = self._steering, self._pool
        paused = steering.paused
        have = pool.count("starting", "serving")
        steering.look(step=self._step, workers=have, serving=pool.count("serving"))
        if steering.stop:
            self._stop.set()
        if not self._started:
            return
        if steering.paused and not pool.leased and not self._tasks.keys() - BACKGROUND:
            steering.rests(step=self._step, finished=len(self._buffer))
        if (paused and not steering.paused) or steering.stop:
            self._wake.set()
        self._follow_wanted_workers()

    def _follow_wanted_workers(self) -> None:
        wanted, have = self._steering.workers, self._pool.wanted
        if wanted is not None and wanted != have and "resize" not in self._tasks:
            self._run.event("resize", have=have, wanted=wanted)
            self._spawn("resize", self._pool.resize(wanted))

    def _spawn(self, name: str, work: Any) -> None:
        task = asyncio.ensure_future(work)
        task.add_done_callback(lambda _: self._wake.set())
        self._tasks[name] = task


def _autoscaler(settings: LoopSettings) -> Autoscaler | None:
    if settings.autoscale is None:
        return None
    least, most = settings.autoscale
    return Autoscaler(least=least, most=most)
