"""Tells of a run that stands still: a file that says why, then the run's end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.contracts.config.train import TrainConfig
from cluster.contracts.deadlines import within
from cluster.contracts.durable import write_text
from cluster.contracts.errors import Resumable
from cluster.contracts.live import LiveView
from cluster.contracts.protocols import Clock, LearnerHandle, WorkerHandle
from cluster.contracts.stacks import task_stacks, thread_stacks
from cluster.loop.live import LoopFacts, PoolFacts
from cluster.loop.watchdog import OwnDeadlines, Watchdog, report, waits_for

LOOK_S = 5.0
ANSWER_S = 10.0  # for the stacks of another process
KEEP_S = 60.0  # for the learner to save before the run ends

Stacks = Callable[[], Awaitable[str]]


class Stalled(Resumable):
    """Nothing has moved for long. What was learnt so far is on disk."""


@dataclass(slots=True, kw_only=True)
class StallWatch:
    """``processes``: of each process of the run, its name and what asks it for its stacks. ``end``:
    ends the run because of a problem, within so many seconds. ``loop``, ``pool``, ``look``: see
    ``LiveFeed``."""

    timeout_s: float
    own: OwnDeadlines
    folder: Path
    loop: Callable[[], LoopFacts]
    pool: Callable[[], PoolFacts]
    look: Callable[[], LiveView]
    processes: Callable[[], Mapping[str, Stacks]]
    event: Callable[..., None]
    end: Callable[[Resumable, float], None]
    clock: Clock
    answer_s: float = ANSWER_S

    async def run(self) -> None:
        """Until cancelled."""
        watchdog = Watchdog(self.timeout_s, self.own)
        while True:
            await self.clock.sleep(LOOK_S)
            now = self.clock.now()
            verdict = watchdog.look(now, self.loop(), self.pool())
            if verdict == "stalled":
                await self._tell(watchdog.idle_s(now))
            elif verdict == "stop":
                path = await self._tell(watchdog.idle_s(now))
                why = f"nothing has moved for {watchdog.idle_s(now):.0f} s"
                told = f"{path} says who waits for what"
                how = f"Resume with accord train --resume {self.folder}"
                self.end(Stalled(f"{why}; {told}. {how}"), KEEP_S)

    async def _tell(self, idle_s: float) -> Path:
        loop, pool = self.loop(), self.pool()
        wait = waits_for(loop, pool, self.own)
        text = report(self.look(), loop, wait, idle_s)
        text += f"\n== driver ==\n{thread_stacks()}\n{task_stacks()}\n"
        processes = self.processes()
        answers = await asyncio.gather(*(self._stacks_of(ask) for ask in processes.values()))
        text += "".join(
            f"\n== {name} ==\n{answer}\n" for name, answer in zip(processes, answers, strict=True)
        )
        path = self.folder / f"stall-{time.strftime('%Y%m%d-%H%M%S')}.txt"
        try:
            await asyncio.to_thread(write_text, path, text)
        except OSError as problem:  # a full disk: the event says the same in short
            self.event("stalled", waits_for=wait.what, idle_s=round(idle_s), cause=str(problem))
        else:
            self.event("stalled", waits_for=wait.what, idle_s=round(idle_s), file=str(path))
        return path

    async def _stacks_of(self, ask: Stacks) -> str:
        try:
            return await within(self.answer_s, ask())
        except TimeoutError:
            return f"did not answer within {self.answer_s:.0f} s"
        except Exception as problem:  # a process that is gone: that is what the file is to tell
            return f"cannot be asked: {problem}"


def processes(
    learner: LearnerHandle, workers: Sequence[WorkerHandle], services: Sequence[Any]
) -> dict[str, Stacks]:
    """Of a run: learner, workers and reward services that can say what their threads do."""
    handles: dict[str, Any] = {"learner": learner}
    handles |= {worker.name: worker for worker in workers}
    handles |= {f"reward service {number}": one for number, one in enumerate(services)}
    return {name: handle.stacks for name, handle in handles.items() if hasattr(handle, "stacks")}


def own_deadlines(config: TrainConfig) -> OwnDeadlines:
    return OwnDeadlines(
        learner_start_s=config.learner.start_timeout_s,
        step_s=config.learner.step_timeout_s,
        weights_s=config.weights.timeout_s,
        sampling_s=config.rollout.stall_timeout_s,
        workers_s=config.rollout.workers_timeout_s,
        outage_s=config.reward.outage_s,
        evaluation_s=2 * config.evaluation.timeout_s,  # of the completions, and of the judge
        min_workers=config.rollout.min_workers,
    )
