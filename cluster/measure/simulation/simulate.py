"""The real controller, pool, ledger and buffer on virtual time, with roles that pass the time."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from cluster.loop.controller import Controller
from cluster.loop.pool import WorkerPool
from cluster.loop.settings import LoopSettings, PoolSettings
from cluster.loop.timeline import Timeline
from cluster.measure.simulation.loop import VirtualClock, VirtualLoop
from cluster.measure.simulation.record import Figures, Record
from cluster.measure.simulation.roles import (
    SimulatedLearner,
    SimulatedPrompts,
    SimulatedWorker,
    Trail,
)
from cluster.measure.simulation.scenario import Lengths, Scenario

WARM_UP = 0.25  # share of the simulated time that no figure counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """cpu_s: real CPU seconds the simulation took. groups: trained, in order; trained_tokens: of
    each step."""

    scenario: Scenario
    figures: Figures
    trail: Trail
    groups: list[int]
    trained_tokens: list[float]
    samples_generated: int
    losses: int
    restarts: int
    cpu_s: float


def simulate(scenario: Scenario) -> Outcome:
    """Run ``scenario.seconds`` of virtual time. Raises ValueError when that is only a few steps."""
    began = time.process_time()
    loop = VirtualLoop()  # type: ignore[abstract]  # of a loop's methods, what is needed
    record = Record(scenario.seconds, scenario.bound)
    trail, learner, pool = loop.run(_run(scenario, record, loop))
    figures = record.figures(scenario.workers * scenario.slots, WARM_UP * scenario.seconds)
    return Outcome(
        scenario=scenario,
        figures=figures,
        trail=trail,
        groups=learner.groups,
        trained_tokens=[step.tokens for step in record.steps],
        samples_generated=record.samples_generated,
        losses=record.losses,
        restarts=pool.restarts,
        cpu_s=time.process_time() - began,
    )


async def _run(
    scenario: Scenario, record: Record, loop: VirtualLoop
) -> tuple[Trail, SimulatedLearner, WorkerPool]:
    trail, clock, lengths = Trail(), VirtualClock(loop), Lengths(scenario)
    learner = SimulatedLearner(scenario, record)
    pool = WorkerPool(
        lambda index, incarnation: SimulatedWorker(index, incarnation, scenario, lengths, record),
        PoolSettings(
            start_timeout_s=scenario.restart_s + 60.0,
            stall_timeout_s=scenario.seconds,
            weights_timeout_s=60.0 + 100.0 * scenario.fetch_s,
            max_restarts=1_000_000,
            slots=scenario.slots,
        ),
        clock,
        trail.event,
    )
    controller = Controller(
        LoopSettings(
            steps=1_000_000_000,
            prompts_per_step=scenario.prompts_per_step,
            samples_per_prompt=scenario.samples_per_prompt,
            staleness_bound=scenario.bound,
            staleness_lead=None if scenario.lead < 0 else scenario.lead,
            workers=scenario.workers,
            checkpoint_every=1_000_000_000,
            keep_checkpoints=1,
            stop_grace_s=0.0,
        ),
        SimulatedPrompts(),
        learner,
        pool,
        trail,
        [trail],
        clock,
        Timeline(),
        cpu_s=lambda: 0.0,  # the machine's real time has no place in the trail
    )
    loop.call_at(scenario.seconds, controller.request_stop)
    try:
        await controller.run()
    finally:
        await asyncio.gather(pool.stop())
    return trail, learner, pool
