"""What a run lacks on a cluster that may still grow, said while it waits."""

from __future__ import annotations

import asyncio

from cluster.assembly.run_session import RunSession
from cluster.assembly.training_roles import resource_needs
from cluster.contracts.config.train import TrainConfig
from cluster.machine.resources import cluster_nodes, shortage

LOOK_S = 10.0


async def tell_what_is_missing(config: TrainConfig, session: RunSession) -> None:
    """On a cluster that was joined, until cancelled: each time something else is missing, which
    resource, how much of it there is, and on which nodes. Nodes may come and go."""
    if config.cluster.to_join is None:
        return  # it cannot grow, and was looked at before the start
    needs, told = resource_needs(config), ""
    while True:
        await asyncio.sleep(LOOK_S)
        # Asks Ray's head, which may be slow or gone.
        problem = shortage(needs, await asyncio.to_thread(cluster_nodes))
        missing = "" if problem is None else problem.what
        if missing and missing != told:
            session.event("resources_missing", cause=missing)
            session.reporter.say(f"{missing}; waiting for the cluster to grow")
        told = missing
