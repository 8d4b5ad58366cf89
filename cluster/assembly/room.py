"""Room for a run on a cluster that may still grow: asked for, and said where it is missing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from cluster.assembly.run_session import RunSession
from cluster.contracts.config.train import TrainConfig
from cluster.machine.autoscaler import ask_for_machines
from cluster.machine.event_loop import in_own_thread
from cluster.machine.resources import Need, cluster_nodes, shortage

LOOK_S = 10.0
WITHDRAW_S = 5.0


async def keep_room(config: TrainConfig, session: RunSession, workers: Callable[[], int]) -> None:
    """On a cluster that was joined, until cancelled. ``workers``: how many the run wants.

    Each time something else is missing, says which resource, how much of it there is, and on which
    nodes. With `rollout.autoscale`, tells Ray's autoscaler how many workers are wanted, and at the
    end that none are.
    """
    if config.cluster.to_join is None:
        return  # it cannot grow, and was looked at before the start
    told, asked = "", -1
    try:
        while True:
            await asyncio.sleep(LOOK_S)
            needs = resource_needs(config, workers())
            if config.rollout.autoscale and asked != workers():
                asked = workers()
                await in_own_thread(partial(ask_for_machines, needs))
            # Asks Ray's head, which may be slow or gone.
            problem = shortage(needs, await in_own_thread(cluster_nodes))
            missing = "" if problem is None else problem.what
            if missing and missing != told:
                session.event("resources_missing", cause=missing)
                session.reporter.say(f"{missing}; waiting for the cluster to grow")
            told = missing
    finally:
        if asked >= 0:
            async with asyncio.timeout(WITHDRAW_S):
                await in_own_thread(partial(ask_for_machines, []))


def resource_needs(config: TrainConfig, workers: int | None = None) -> list[Need]:
    """What Ray must have for the run, by role. ``workers``: wanted now; None: at the start."""
    rollout, learner, reward = config.rollout, config.learner, config.reward
    count = rollout.workers if workers is None else workers
    services = 0 if reward.address else reward.replicas
    return [
        _need("a learner process", "learner", learner, learner.processes, learner.gpus),
        *([_need("a reward service", "reward", reward, services, reward.gpus)] if services else []),
        _need("a rollout worker", "rollout", rollout, count, rollout.gpus),
    ]


def _need(role: str, section: str, config: Any, count: int, gpus: float) -> Need:
    each = {"CPU": config.cpus, "GPU": gpus, **config.resources}
    keys = {"CPU": f"{section}.cpus", "GPU": f"{section}.gpus", "labels": f"{section}.labels"}
    keys |= dict.fromkeys(config.resources, f"{section}.resources")
    return Need(role, each, count, config.labels, keys)
