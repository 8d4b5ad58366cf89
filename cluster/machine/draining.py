"""Nodes of the Ray cluster that are about to go: drained by an autoscaler, or preempted."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LeavingNode:
    """``seconds_left``: until it goes; infinite where no deadline was set."""

    id: str
    name: str
    address: str
    seconds_left: float


def leaving_nodes() -> list[LeavingNode]:
    """Asks Ray's head, which may take a while."""
    import ray
    from ray._private.state import state

    deadlines = state.get_draining_nodes()  # id -> milliseconds since 1970, 0 for none
    if not deadlines:
        return []
    nodes = {str(node["NodeID"]): node for node in ray.nodes()}
    return [
        LeavingNode(
            id=node_id,
            name=str(nodes.get(node_id, {}).get("NodeManagerHostname", node_id[:12])),
            address=str(nodes.get(node_id, {}).get("NodeManagerAddress", "")),
            seconds_left=max(0.0, at / 1000 - time.time()) if at else math.inf,
        )
        for node_id, at in deadlines.items()
    ]
