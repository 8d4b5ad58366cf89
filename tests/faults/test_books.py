"""Whatever happens in whatever order, the books of a run are exact: a state machine over the real
controller, pool and ledger, with workers that deliver, repeat, reorder, lose and die."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from cluster.contracts.errors import MachineLost, Retryable
from cluster.measure.simulation.loop import VirtualLoop
from cluster.runs.control import Wishes
from tests.run_world import PROMPTS_PER_STEP, Books, Sampler, Training

STEPS = 8
LOSSES = (Retryable("no answer"), MachineLost("node gone"))  # which make no prompt a suspect


class Runs(RuleBasedStateMachine):
    """``sessions`` of one run: a crash ends one, the next resumes from the newest checkpoint."""

    @initialize(bound=st.integers(0, 3), workers=st.integers(1, 3))
    def begin(self, bound: int, workers: int) -> None:
        self.loop, self.books = VirtualLoop(), Books()
        self.bound, self.count = bound, workers
        self.requests = 0
        self._open_session()

    def _open_session(self) -> None:
        async def start() -> None:
            self.training = Training(
                self.loop,
                self.books,
                self._tame,
                steps=STEPS,
                workers=self.count,
                bound=self.bound,
                max_restarts=10**6,
                stall_timeout_s=1e9,
            )
            self.training.learner.step_s = 0.2
            await asyncio.sleep(0.3)

        self.loop.run(start())

    @staticmethod
    def _tame(worker: Sampler) -> None:
        worker.pace_s = None  # it finishes what a rule tells it to

    def _play(self, work: Coroutine[Any, Any, None]) -> None:
        self.loop.run(work)

    def _workers(self) -> list[Sampler]:
        return self.training.serving()

    # -- what can happen --------------------------------------------------------------------------

    @rule(which=st.integers(0, 9), most=st.integers(1, 4), seconds=st.sampled_from([0.0, 0.3, 1.5]))
    def deliver(self, which: int, most: int, seconds: float) -> None:
        async def work() -> None:
            if workers := self._workers():
                workers[which % len(workers)].finish_begun(1e9, most)
            await asyncio.sleep(seconds)

        self._play(work())

    @rule(which=st.integers(0, 9))
    def deliver_out_of_order_and_twice(self, which: int) -> None:
        async def work() -> None:
            if workers := self._workers():
                worker = workers[which % len(workers)]
                worker._begun.reverse()
                worker.finish_begun(1e9, 2)
                worker._done += worker._done[::-1]
            await asyncio.sleep(1.2)

        self._play(work())

    @rule(which=st.integers(0, 9), how=st.sampled_from(LOSSES), late=st.booleans())
    def lose_a_worker(self, which: int, how: Exception, late: bool) -> None:
        async def work() -> None:
            if workers := self._workers():
                worker = workers[which % len(workers)]
                if late:  # its results are on their way when it dies
                    worker.finish_begun(1e9)
                worker.lost = how
            await asyncio.sleep(1.2)

        self._play(work())

    @rule(step=st.integers(0, STEPS - 1))
    def a_prompt_cannot_be_completed(self, step: int) -> None:
        for worker in self._workers():
            worker.fail[step * PROMPTS_PER_STEP + 1] = "not text"

    @rule(step=st.integers(0, STEPS - 1))
    def rollouts_are_lost_on_their_way(self, step: int) -> None:
        self.training.learner.lose.add(step)

    @rule(count=st.integers(0, 4))
    def scale(self, count: int) -> None:
        self.requests += 1
        self.training.wishes = Wishes(workers=count, request=str(self.requests))
        self._play(asyncio.sleep(1.2))

    @rule(seconds=st.sampled_from([0.1, 3.0, 40.0, 900.0]))
    def time_passes(self, seconds: float) -> None:
        self._play(asyncio.sleep(seconds))

    @precondition(lambda self: not self.training.running.done())
    @rule()
    def the_command_is_killed_and_the_run_resumed(self) -> None:
        self._play(self.training.end())
        self._open_session()

    # -- what must hold ---------------------------------------------------------------------------

    @invariant()
    def the_books_are_exact(self) -> None:
        if hasattr(self, "training"):
            assert self.training.audit().violations == []
            if self.training.running.done():
                self.training.running.result()  # raises what ended the run

    def teardown(self) -> None:
        """Heal everything: the run then comes to its end, and every prompt is accounted for."""
        if not hasattr(self, "training"):
            return

        async def work() -> None:
            self.training.wishes = Wishes(workers=2, request="last")
            self.training._change = lambda worker: None
            for _ in range(3000):
                if self.training.running.done():
                    break
                for worker in self.training.workers.values():
                    worker.pace_s = 0.1
                await asyncio.sleep(1)
            await self.training.end()

        self._play(work())
        audit = self.training.audit()
        assert audit.violations == []
        assert (audit.steps, audit.in_flight) == (STEPS, 0)
        assert audit.trained + audit.dropped.total() == STEPS * PROMPTS_PER_STEP


Runs.TestCase.settings = settings(
    max_examples=30,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestBooks = Runs.TestCase
