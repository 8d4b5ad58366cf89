"""The reinforcement-learning loop on one page.

    admit ──▶ pool (workers generate and score) ──▶ buffer ──▶ learner.step ──▶ manifest
      ▲                                                                            │
      └── slots are freed when every serving worker holds the new weights ◀── broadcast

Four things go on at once, each at most once: collecting finished groups, one learner step, one
broadcast of weights, and saving. The loop below starts whatever can start and waits for whatever
ends first; it holds no payload, only metadata. A broadcast never delays the learner: the next step
starts as soon as its groups are there.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.contracts.errors import Fatal, Retryable
from cluster.contracts.metrics import values
from cluster.contracts.protocols import Clock, LearnerHandle, PromptSource, Sink
from cluster.contracts.records import (
    Assignment,
    GroupMeta,
    RunState,
    StepResult,
    SwapReport,
    WeightManifest,
)
from cluster.pool import WorkerPool
from cluster.runs import Run
from cluster.staleness import GroupBuffer, SlotLedger
from cluster.timeline import Timeline

RESIZE_PAUSE_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopSettings:
    steps: int
    prompts_per_step: int
    samples_per_prompt: int
    staleness_bound: int
    workers: int
    checkpoint_every: int
    keep_checkpoints: int
    stop_grace_s: float = 4.0
    max_step_attempts: int = 3  # of one learner step whose rollouts were lost on the way


@dataclass(slots=True)
class _Window:
    """What happened since the last line of metrics."""

    started: float
    waited_batch: float = 0.0
    learner_busy: float = 0.0
    swaps: list[SwapReport] = field(default_factory=list)
    broadcast_s: float = 0.0
    worker_stats: Mapping[str, float] = field(default_factory=dict)


class Controller:
    """Runs the loop from ``state`` to ``settings.steps`` learner steps."""

    def __init__(
        self,
        settings: LoopSettings,
        prompts: PromptSource,
        learner: LearnerHandle,
        pool: WorkerPool,
        run: Run,
        sinks: list[Sink],
        clock: Clock,
        timeline: Timeline,
        state: RunState | None = None,
        wanted_workers: Callable[[], int | None] = lambda: None,
    ) -> None:
        self._settings = settings
        self._prompts = prompts
        self._learner = learner
        self._pool = pool
        self._run = run
        self._sinks = sinks
        self._clock = clock
        self._timeline = timeline
        self._wanted_workers = wanted_workers
        first = state.step if state else 0
        self._step = first  # learner steps finished
        self._elapsed_before = state.elapsed_s if state else 0.0
        self._dropped: list[Mapping[str, Any]] = list(state.dropped) if state else []
        self._ledger = SlotLedger(
            prompts_per_step=settings.prompts_per_step,
            bound=settings.staleness_bound,
            last_step=settings.steps,
            admitted=first * settings.prompts_per_step,
            held=first,
        )
        self._buffer = GroupBuffer(self._ledger, next_step=first)
        self._stop = asyncio.Event()
        self._tasks: dict[str, asyncio.Task[Any]] = {}
        self._to_broadcast: WeightManifest | None = None
        self._taken: list[GroupMeta] = []  # groups of the learner step under way
        self._step_attempts = 0
        self._waiting_since = 0.0
        self._sink_errors = 0
        self._resized_to: int | None = None
        self._resize_again_at = 0.0

    def request_stop(self) -> None:
        """Finish what is cheap to finish, keep everything done, and return."""
        self._stop.set()

    async def run(self) -> RunState:
        """Train; returns the state reached. Raises what stopped the run, with its cause."""
        self._began = self._clock.now()
        manifest = await self._start_unless_stopped()
        if manifest is None:
            return self._state()
        self._began = self._clock.now()
        self._window = _Window(started=self._began)
        self._waiting_since = self._began
        self._run.event("loop_started", step=self._step, version=manifest.version)
        self._spawn("stop", self._stop.wait())
        self._spawn("harvest", self._pool.next_harvest())
        try:
            while self._step < self._settings.steps and not self._stop.is_set():
                await self._admit()
                self._start_step()
                self._start_broadcast()
                await self._one_event()
            if self._stop.is_set():
                await self._finish_running_step()
            if self._step > 0 and self._step != self._saved:
                await self._save()
            return self._state()
        finally:
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

    async def _start(self) -> WeightManifest:
        self._saved = self._step
        manifest = await self._learner.start()
        if manifest.version != self._step:
            raise Fatal(
                f"the learner starts at version {manifest.version}, the run at {self._step}"
            )
        await self._pool.start(self._settings.workers, manifest)
        return manifest

    async def _admit(self) -> None:
        ids = self._ledger.admit(self._ledger.room())
        if ids:
            samples = self._settings.samples_per_prompt
            await self._pool.submit(
                [
                    Assignment(group_id=i, prompt=self._prompts.prompt(i), samples=samples)
                    for i in ids
                ]
            )

    def _start_step(self) -> None:
        if "step" in self._tasks:
            return
        taken = self._buffer.take()
        if taken is None:
            return
        batch, metas = taken
        now = self._clock.now()
        self._window.waited_batch += now - self._waiting_since
        self._timeline.span("learner", "wait for batch", self._waiting_since, now)
        self._note_dropped(metas)
        if not batch.group_ids:
            causes = {m.failure for m in metas}
            raise Fatal(f"every prompt of step {batch.step} failed: {'; '.join(map(str, causes))}")
        self._check_lag(batch.step, metas)
        self._taken = metas
        self._spawn("step", self._learner.step(batch))
        self._step_began = now

    def _start_broadcast(self) -> None:
        if self._to_broadcast is not None and "broadcast" not in self._tasks:
            manifest, self._to_broadcast = self._to_broadcast, None
            self._spawn("broadcast", self._broadcast(manifest))

    async def _broadcast(self, manifest: WeightManifest) -> int:
        began = self._clock.now()
        reports = await self._pool.broadcast(manifest)
        ended = self._clock.now()
        self._window.swaps += reports
        self._window.broadcast_s = ended - began
        self._timeline.span("weights", f"version {manifest.version}", began, ended)
        return manifest.version

    async def _one_event(self) -> None:
        """Wait until something ends and take its result. Resizing is looked at once a second."""
        done, _ = await asyncio.wait(
            self._tasks.values(), timeout=1.0, return_when=asyncio.FIRST_COMPLETED
        )
        for name in [n for n, task in self._tasks.items() if task in done]:
            task = self._tasks.pop(name)
            if name == "harvest":
                harvest, groups = task.result()
                self._buffer.add(harvest, groups)
                self._spawn("harvest", self._pool.next_harvest())
            elif name == "step":
                if isinstance(problem := task.exception(), Retryable):
                    await self._step_again(problem)
                else:
                    await self._after_step(task.result())
            elif name == "broadcast":
                self._ledger.weights_held(task.result())
            elif name == "resize":
                task.result()
        self._follow_wanted_workers()

    async def _after_step(self, result: StepResult) -> None:
        now = self._clock.now()
        self._window.learner_busy += now - self._step_began
        self._timeline.span("learner", f"step {result.step}", self._step_began, now)
        self._step = result.step + 1
        self._step_attempts = 0
        self._to_broadcast = result.manifest
        self._start_broadcast()
        self._write_metrics(result, now)
        if self._step % self._settings.checkpoint_every == 0 or self._step == self._settings.steps:
            await self._save()
        self._waiting_since = self._clock.now()
        self._window = _Window(started=now, worker_stats=self._pool.stats())

    async def _step_again(self, problem: Retryable) -> None:
        """The step's rollouts were lost on their way; nothing was learnt. Generate them again."""
        self._step_attempts += 1
        if self._step_attempts >= self._settings.max_step_attempts:
            raise Fatal(f"step {self._step} was tried {self._step_attempts} times: {problem}")
        lost = self._buffer.give_back(self._step, self._taken)
        self._run.event("step_retried", step=self._step, groups=len(lost), cause=str(problem))
        self._waiting_since = self._clock.now()
        await self._pool.submit(
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

    async def _save(self) -> None:
        began = self._clock.now()
        staging = self._run.begin_checkpoint(self._step)
        await self._learner.save(str(staging))
        final = self._run.commit_checkpoint(staging, self._state(), self._settings.keep_checkpoints)
        self._saved = self._step
        self._timeline.span("learner", "save", began, self._clock.now())
        self._run.event("checkpoint", step=self._step, path=str(final))

    async def _finish_running_step(self) -> None:
        """On a stop: wait a little for the step under way; it is lost if it takes longer."""
        task = self._tasks.get("step")
        if task is None:
            return
        done, _ = await asyncio.wait([task], timeout=self._settings.stop_grace_s)
        if done and isinstance(task.exception(), Retryable):
            self._tasks.pop("step")  # nothing was learnt by it
        elif done:
            self._tasks.pop("step")
            result = task.result()
            self._step = result.step + 1
            self._write_metrics(result, self._clock.now())
        else:
            self._run.event("step_abandoned", step=self._step)
            self._saved = self._step  # the learner is busy: saving now would wait for it

    # -- accounts ---------------------------------------------------------------------------------

    def _check_lag(self, step: int, metas: list[GroupMeta]) -> None:
        for meta in metas:
            if meta.failure is None and step - meta.version_min > self._settings.staleness_bound:
                raise Fatal(
                    f"group {meta.group_id} has tokens of version {meta.version_min} "
                    f"at step {step}: older than staleness.bound = {self._settings.staleness_bound}"
                )

    def _note_dropped(self, metas: list[GroupMeta]) -> None:
        noted = {row["group"] for row in self._dropped}
        for meta in metas:
            if meta.failure is not None and meta.group_id not in noted:
                prompt = self._prompts.prompt(meta.group_id)
                row = {"group": meta.group_id, "prompt": prompt.id, "cause": meta.failure}
                self._dropped.append(row)
                self._run.event("group_dropped", **row)

    def _state(self) -> RunState:
        return RunState(
            step=self._step,
            version=self._step,
            next_group=self._step * self._settings.prompts_per_step,
            prompts_total=len(self._prompts),
            dropped=tuple(self._dropped),
            elapsed_s=self._elapsed_before + self._clock.now() - self._began,
        )

    def _write_metrics(self, result: StepResult, now: float) -> None:
        numbers = values(result.metrics) | self._own_numbers(result, now)
        numbers = {name: v for name, v in numbers.items() if math.isfinite(v)}
        for sink in self._sinks:
            try:
                sink.write(self._step, numbers)
            except (
                Exception
            ) as problem:  # monitoring may fail without stopping a run; counted, logged
                self._sink_errors += 1
                self._run.event("sink_failed", sink=type(sink).__name__, cause=repr(problem))

    def _own_numbers(self, result: StepResult, now: float) -> dict[str, float]:
        window, pool = self._window, self._pool
        wall = max(now - window.started, 1e-9)
        stats = pool.stats()
        delta = {k: v - window.worker_stats.get(k, 0.0) for k, v in stats.items()}
        workers = max(1, pool.count("serving"))
        swaps = window.swaps
        numbers = {
            "async/queue_depth": len(self._buffer),
            "async/in_flight": pool.in_flight,
            "async/policy_version": result.version,
            "async/refused": self._buffer.refused,
            "async/dropped": len(self._dropped),
            "workers/alive": pool.count("serving"),
            "workers/restarts": pool.restarts,
            "workers/joined": pool.joined,
            "workers/left": pool.left,
            "weight_sync/bytes": result.manifest.nbytes,
            "weight_sync/version": self._ledger.held,
            "time/step": wall,
            "time/wait_batch": window.waited_batch,
            "perf/throughput": result.trained_tokens / wall,
            "perf/samples_per_s": self._settings.prompts_per_step
            * self._settings.samples_per_prompt
            / wall,
            "perf/trainer_idle_frac": max(0.0, 1.0 - window.learner_busy / wall),
            "run/elapsed_s": self._elapsed_before + now - self._began,
            "run/sink_errors": self._sink_errors,
        }
        if swaps:
            numbers |= {
                "weight_sync/seconds": window.broadcast_s,
                "weight_sync/pause_s": max(s.pause_s for s in swaps),
                "weight_sync/canary_logp_diff": max(s.canary_logp_diff for s in swaps),
            }
        if "generated_tokens" in delta:
            # A restarted worker counts from 0 again.
            numbers["rollout/tokens_per_s"] = max(0.0, delta["generated_tokens"]) / wall
        if "busy_s" in delta:
            numbers["perf/rollout_idle_frac"] = min(
                1.0, max(0.0, 1 - delta["busy_s"] / (wall * workers))
            )
        return numbers

    def _follow_wanted_workers(self) -> None:
        wanted = self._wanted_workers()
        have = self._pool.count("starting", "serving")
        now = self._clock.now()
        if (
            wanted is not None
            and wanted != have
            and "resize" not in self._tasks
            # What could not be had is asked for again after a while, or when another number is.
            and (wanted != self._resized_to or now >= self._resize_again_at)
        ):
            self._resized_to, self._resize_again_at = wanted, now + RESIZE_PAUSE_S
            self._run.event("resize", have=have, wanted=wanted)
            self._spawn("resize", self._pool.resize(wanted))

    def _spawn(self, name: str, work: Any) -> None:
        self._tasks[name] = asyncio.ensure_future(work)
