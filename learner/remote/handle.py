"""The controller's handle of a learner in Ray actors."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from ray.exceptions import RayError

from cluster.contracts.actor_names import Names, unnamed
from cluster.contracts.crash_points import take_learners
from cluster.contracts.durable import FileDigest
from cluster.contracts.errors import Fatal
from cluster.contracts.records import StepInput, StepResult, WeightManifest
from learner.remote.files import FileBridge
from learner.remote.processes import LearnerProcesses
from learner.settings import LearnerSettings
from learner.step_names import StepNames

_STOP_TIMEOUT_S = 130.0


class RayLearner:
    """LearnerHandle of a learner in Ray actors, `learner.processes` of them.

    cores, threads, options: see LearnerProcesses. room_timeout_s: how long to wait for a place on
    the cluster, which may still grow. successor: (settings of a lost learner, step to go on at) ->
    those of the one that takes over.
    """

    def __init__(
        self,
        settings: LearnerSettings,
        *,
        cores: Sequence[int] = (),
        threads: int = 1,
        options: dict[str, Any] | None = None,
        names: Names = unnamed,
        room_timeout_s: float = math.inf,
        successor: Callable[[LearnerSettings, int], LearnerSettings] = lambda same, step: same,
    ) -> None:
        self._successor = successor
        self._room_timeout_s = room_timeout_s
        self._settings = settings
        self._processes = LearnerProcesses(cores, threads, options, names)
        self._files = FileBridge(self._processes)
        self._steps = StepNames()
        self._started = False
        self.nodes: frozenset[str] = frozenset()  # ids of those that its processes run on

    async def start(self, step: int | None = None) -> WeightManifest:
        """Start the processes, load the models, publish. Deadline: `learner.start_timeout_s` from
        the moment at which all processes have their places. The second time, the processes of
        before are ended, and others take over."""
        processes = self._processes
        if self._started:
            processes.end()
            self._settings = await asyncio.to_thread(self._successor, self._settings, step or 0)
        learner = self._settings.learner
        processes.begin(self._settings)
        await processes.call(
            "pid", self._room_timeout_s, "to find room on the cluster", together=False
        )
        self.nodes = frozenset(await asyncio.gather(*processes.each("node")))
        limit, purpose = learner.start_timeout_s, "to load its models"
        await self._files.open(self._settings, limit)
        if (crash := take_learners()) is not None:
            point, number = crash
            ending = [a for rank, a in enumerate(processes.actors) if number in (None, rank)]
            await processes.ask(ending, "crash_at", limit, "to arm a crash point", point)
        several = learner.processes > 1
        place = (await processes.first("open_place", limit, purpose),) if several else ()
        manifest: WeightManifest = await processes.call("start", limit, purpose, *place)
        self._started = True
        return manifest

    async def lost(self) -> None:
        """Waits until one of its processes has ended without being asked to; raises LearnerLost."""
        await self._processes.lost()

    async def pulse(self) -> None:
        """Returns when every process has answered. Raises Retryable when one is gone."""
        await self._processes.pulse()

    async def stacks(self) -> str:
        """What the threads of its processes do."""
        told = await asyncio.gather(*self._processes.each("stacks"))
        return "\n".join(told) or "has no process"

    def fetch_ahead(self, payloads: Sequence[Any]) -> None:
        """See `LearnerHandle`. Each process fetches them, beside the step under way."""
        for actor in self._processes.actors:
            actor.fetch_ahead.remote(list(payloads))

    async def work_ahead(self, batch: StepInput) -> None:
        """See `LearnerHandle`. A process runs this and the step in turn. Several do nothing."""
        if len(self._processes.actors) != 1:
            return
        (actor,) = self._processes.actors
        # A process that is gone is missed by the one who watches it.
        with contextlib.suppress(RayError):
            await asyncio.wrap_future(actor.work_ahead.remote(batch).future())

    async def step(self, batch: StepInput) -> StepResult:
        """One learner step. Deadline: `learner.step_timeout_s`. Raises Retryable when a payload is
        gone with its worker: the step has then changed nothing and may be asked for again."""
        limit, purpose = self._settings.learner.step_timeout_s, f"for step {batch.step}"
        processes = self._processes
        several = len(processes.actors) > 1
        if several:
            fetch = f"to fetch step {batch.step}"
            await processes.call("hold", limit, fetch, batch, together=False)
        name = self._steps.of(batch.step)
        result: StepResult = await processes.call(
            "step", limit, purpose, None if several else batch, task=name
        )
        self._steps.done(result)
        not_carried = self._files.carry_rollouts()
        return dataclasses.replace(result, not_written=(*result.not_written, *not_carried))

    async def snapshot(self) -> int:
        """Copy the state in the learner's memory, after the step before; bytes of the copies."""
        limit = self._settings.learner.step_timeout_s
        return sum(await self._processes.call_all("snapshot", limit, "to copy its state"))

    async def store(self, directory: str) -> tuple[FileDigest, ...]:
        """Write the copies that `snapshot` made below `directory` of this host, while steps go on.

        Raises NotSaved where a disk does not take it.
        """
        return await self._files.store(directory, self._settings.learner.step_timeout_s)

    async def stop(self) -> None:
        """Let it finish writing, then end its processes. Raises what the last writing met.

        One that is still starting has written nothing, and would answer only when it has started.
        """
        processes = self._processes
        try:
            if processes.actors and self._started:
                await processes.call("close", _STOP_TIMEOUT_S, "to finish writing")
                try:
                    await self._files.bring_rollouts()
                except OSError as problem:
                    raise Fatal(f"the last rollouts could not be written: {problem}") from problem
                await self._files.close_outboxes(_STOP_TIMEOUT_S)
        finally:
            self._files.close()
            processes.end()
