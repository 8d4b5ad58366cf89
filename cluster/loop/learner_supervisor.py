"""The learner as the loop sees it: what it does at this moment, and another one in its place when
it is lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cluster.contracts.crash_points import passing
from cluster.contracts.durable import FileDigest
from cluster.contracts.errors import LearnerLost, RolledBack
from cluster.contracts.live import LearnerState
from cluster.contracts.protocols import LearnerHandle
from cluster.contracts.records import StepInput, WeightManifest
from cluster.contracts.stopwatch import Stopwatch
from cluster.loop.context import LoopContext
from cluster.loop.succession import Succession


class LearnerSupervisor:
    """``state``: what it does, since ``since``. ``published``: its newest version; -1: none yet.
    ``succession``: what a new learner has to do again."""

    def __init__(self, handle: LearnerHandle, loop: LoopContext) -> None:
        self._handle = handle
        self._event = loop.run.event
        self._activities = loop.activities
        self._clock = loop.clock
        self.succession = Succession(loop.settings.max_learner_restarts)
        self.state: LearnerState = "starting"
        self.since = 0.0
        self._times: Stopwatch | None = None  # from its start
        self.published = -1

    def becomes(self, state: LearnerState, *, in_vain: bool = False) -> None:
        """``in_vain``: what it did until now brought the run no step further."""
        self.state, self.since = state, self._clock.now()
        if self._times is None:
            self._times = Stopwatch(self.since, state)
        self._times.turn(self.since, state, was="redo" if in_vain else None)

    def totals(self, now: float) -> dict[str, float]:
        """Seconds of what it did so far, by state; as "redo" those of steps that came to nothing,
        or were done once more."""
        return {} if self._times is None else self._times.totals(now)

    async def start(self, step: int) -> WeightManifest:
        """The first one of a run that has done ``step`` steps; what it publishes."""
        began = self._clock.now()
        self.becomes("starting")
        manifest = await self._handle.start()
        if manifest.version != step:
            raise RolledBack(f"the learner starts at version {manifest.version}, the run at {step}")
        self.succession.published(manifest)
        seconds = round(self._clock.now() - began, 3)
        self._event("learner_ready", version=manifest.version, seconds=seconds)
        self.published = manifest.version
        self.becomes("waiting")
        return manifest

    def watch(self) -> None:
        """Notice its end also while nothing is asked of it."""
        self._activities.begin("watch", self._handle.lost())

    def ask(self, batch: StepInput, sending: int | None) -> None:
        """Begin a step. ``sending``: the version that workers hold or are being sent."""
        passing("driver.before_step")
        self.succession.asked(batch)
        if "ahead" not in self._activities:
            self.becomes("training")
        self._activities.begin("step", self._handle.step(replace(batch, sending=sending)))

    def fetch_ahead(self, payloads: Sequence[Any]) -> None:
        """Begin to bring the next step's payloads to it, while it trains."""
        self._handle.fetch_ahead(payloads)

    def work_ahead(self, batch: StepInput) -> None:
        """Begin with some groups of the next step, while it waits for the others. A step that is
        asked meanwhile begins when this ends."""
        self.becomes("ahead")
        self._activities.begin("ahead", self._handle.work_ahead(batch))

    def ahead_ended(self) -> None:
        self.becomes("training" if "step" in self._activities else "waiting")

    async def snapshot(self) -> int:
        """Copy its state in its memory; bytes of the copy."""
        self.becomes("saving")
        nbytes = await self._handle.snapshot()
        self.becomes("waiting")
        return nbytes

    async def store(self, directory: str) -> tuple[FileDigest, ...]:
        return await self._handle.store(directory)

    # -- another one ------------------------------------------------------------------------------

    def behind(self, step: int) -> bool:
        """Whether it has still to do again what its predecessor had done of ``step`` steps."""
        redo = self.succession.redo
        return bool(redo) and redo[0].step < step

    def being_replaced(self, step: int) -> bool:
        """Whether another one is on its way to where its predecessor stood."""
        return "successor" in self._activities or self.behind(step)

    def replace(self, problem: LearnerLost, step: int) -> None:
        """Start another one, from what is on disk. Raises what ends the run when learners are lost
        too often."""
        self.becomes("starting", in_vain=self.state in ("training", "ahead"))
        self._event("learner_lost", step=step, cause=str(problem))
        pause_s = self.succession.lost(problem, self._clock.now())
        self._activities.begin("successor", self._successor(pause_s, step))

    async def _successor(self, pause_s: float, step: int) -> WeightManifest:
        await self._clock.sleep(pause_s)
        return await self._handle.start(step)

    def succeeded(self, manifest: WeightManifest, step: int) -> None:
        """Another one has started, and stands at ``manifest``."""
        self.succession.succeeded(manifest, step)
        seconds = round(self._clock.now() - self.succession.losses[-1].at, 3)
        again = [batch.step for batch in self.succession.redo]
        self._event("learner_replaced", version=manifest.version, seconds=seconds, again=again)
        self.becomes("waiting")
        self.watch()
