"""Random sizes, losses and failures of a whole run, in virtual time: nothing is lost or doubled."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.contracts.errors import Retryable
from cluster.contracts.records import Harvest, StepInput, StepResult, WeightManifest
from cluster.loop.controller import Controller
from cluster.loop.pool import WorkerPool
from cluster.loop.settings import LoopSettings, PoolSettings
from cluster.loop.timeline import Timeline
from cluster.measure.simulation.loop import VirtualClock, VirtualLoop
from cluster.measure.simulation.record import Record
from cluster.measure.simulation.roles import (
    SimulatedLearner,
    SimulatedPrompts,
    SimulatedWorker,
    Trail,
    manifest,
)
from cluster.measure.simulation.scenario import Lengths, Scenario
from cluster.runs.control import Wishes

STEPS = 12


async def published(first: WeightManifest) -> WeightManifest:
    return first


class Worker(SimulatedWorker):
    """Some groups fail for good, some once; the answers of those have no payload."""

    dropped: frozenset[int] = frozenset()

    async def harvest(self, timeout_s: float) -> Harvest:
        harvest = await super().harvest(timeout_s)
        groups = []
        for meta in harvest.groups:
            if meta.group_id in self.dropped:
                meta = replace(meta, failure="not text")
            elif meta.group_id % 11 == 4 and meta.attempt == 0:
                meta = replace(meta, failure="no score", retryable=True)
            groups.append(meta)
        return replace(harvest, groups=tuple(groups))


class Learner(SimulatedLearner):
    """Loses the rollouts of some steps once, on their way to it."""

    losing: set[int]
    batches: list[StepInput]

    async def step(self, batch: StepInput) -> StepResult:
        if batch.step in self.losing:
            self.losing.remove(batch.step)
            await asyncio.sleep(1.0)
            raise Retryable("rollouts are lost")
        self.batches.append(batch)
        return await super().step(batch)


async def drive(
    scenario: Scenario, sizes: Sequence[int], dropped: frozenset[int], losing: set[int]
) -> tuple[Learner, WorkerPool, Mapping[str, Any], list[int]]:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    record, lengths, trail = Record(scenario.seconds, scenario.bound), Lengths(scenario), Trail()
    learner = Learner(scenario, record)
    learner.losing, learner.batches = losing, []

    def make(index: int, incarnation: int) -> Worker:
        worker = Worker(index, incarnation, scenario, lengths, record)
        worker.dropped = dropped
        return worker

    limits = PoolSettings(
        start_timeout_s=900,
        stall_timeout_s=9000,
        weights_timeout_s=900,
        max_restarts=10**6,
        max_attempts=100,
    )
    pool = WorkerPool(make, limits, VirtualClock(loop), trail.event)
    outstanding: list[int] = []
    controller = Controller(
        LoopSettings(
            steps=STEPS,
            prompts_per_step=scenario.prompts_per_step,
            samples_per_prompt=scenario.samples_per_prompt,
            staleness_bound=scenario.bound,
            workers=scenario.workers,
            checkpoint_every=1000,
            keep_checkpoints=1,
        ),
        SimulatedPrompts(),
        learner,
        pool,
        trail,
        [trail],
        VirtualClock(loop),
        Timeline(),
        wishes=lambda: Wishes(workers=sizes[int(loop.time() / 40.0) % len(sizes)]),
        cpu_s=lambda: outstanding.append(pool.in_flight) or 0.0,  # type: ignore[func-returns-value]
    )
    await controller.run()
    assert pool.in_flight == 0
    assert pool.count("serving", "starting") >= 1
    await pool.stop()
    assert pool.count("serving", "starting", "draining") == 0
    last = next(detail for _, kind, detail in trail.rows if kind == f"step {STEPS}")
    return learner, pool, last, outstanding


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    bound=st.integers(0, 4),
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    churn=st.sampled_from([0.0, 20.0, 60.0]),
    dropped=st.frozensets(st.integers(0, 70), max_size=4),
    losing=st.sets(st.integers(0, STEPS - 1), max_size=3),
)
def test_every_group_is_trained_or_dropped_exactly_once(
    seed: int,
    bound: int,
    sizes: list[int],
    churn: float,
    dropped: frozenset[int],
    losing: set[int],
) -> None:
    scenario = Scenario(
        workers=sizes[0],
        slots=4,
        tokens_per_s=100.0,
        length_mean=400.0,
        max_tokens=2000,
        speed_cv=0.5,
        churn_per_hour=churn,
        restart_s=5.0,
        prompts_per_step=6,
        samples_per_prompt=2,
        bound=bound,
        learn_step_s=3.0,
        seconds=100_000.0,
        seed=seed,
    )
    learner, _, last, outstanding = VirtualLoop().run(drive(scenario, sizes, dropped, set(losing)))
    groups = [group for batch in learner.batches for group in batch.group_ids]
    assert groups == [group for group in range(STEPS * 6) if group not in dropped]
    assert last["async/dropped"] == len(dropped)
    assert max(outstanding) <= (bound + 1) * 6


def test_a_worker_that_joins_takes_waiting_work_at_once() -> None:
    """One worker is overloaded, another joins: the step after gets faster, and no group moves."""
    scenario = Scenario(
        workers=1,
        slots=2,
        tokens_per_s=100.0,
        length_mean=400.0,
        speed_cv=0.0,
        churn_per_hour=0.0,
        stragglers=0.0,
        prompts_per_step=6,
        samples_per_prompt=2,
        bound=1,
        learn_step_s=1.0,
    )
    slow = VirtualLoop()
    slow.run(drive(scenario, [1], frozenset(), set()))
    fast = VirtualLoop()
    learner, pool, _, _ = fast.run(drive(scenario, [1, 6, 6, 6, 6, 6, 6], frozenset(), set()))
    assert pool.joined >= 6
    assert fast.time() < 0.6 * slow.time()
    assert [g for b in learner.batches for g in b.group_ids] == list(range(STEPS * 6))


def test_a_worker_that_is_starting_again_when_it_is_no_longer_wanted_does_not_serve() -> None:
    scenario = Scenario(workers=2, slots=2, speed_cv=0.0, churn_per_hour=0.0, stragglers=0.0)

    async def scene() -> tuple[list[str], int, int, int]:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        record, lengths, trail = Record(100.0, 1), Lengths(scenario), Trail()
        made: list[SimulatedWorker] = []

        def make(index: int, incarnation: int) -> SimulatedWorker:
            made.append(SimulatedWorker(index, incarnation, scenario, lengths, record))
            return made[-1]

        limits = PoolSettings(
            start_timeout_s=900, stall_timeout_s=900, weights_timeout_s=900, max_restarts=5
        )
        pool = WorkerPool(make, limits, VirtualClock(loop), trail.event)
        await pool.start(2, published(manifest(0)))
        await asyncio.sleep(1.0)
        made[1]._die()
        await asyncio.sleep(1.0)
        await pool.resize(1)
        await asyncio.sleep(2 * scenario.restart_s)
        counts = pool.count("serving"), pool.joined, pool.left
        await pool.stop()
        return [kind for _, kind, _ in trail.rows], *counts

    kinds, serving, joined, left = VirtualLoop().run(scene())
    assert (serving, joined, left) == (1, 2, 1)
    assert kinds.count("worker_serving") == 2
