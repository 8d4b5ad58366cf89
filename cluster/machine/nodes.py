"""One call on every machine of the Ray cluster, side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def on_every_node(
    call: Callable[..., Any], *arguments: Any, timeout_s: float
) -> dict[str, Any | Exception]:
    """`call(*arguments)` on each live node, beside whatever runs there: "NAME (ADDRESS)" of the
    node -> its answer, or the error that stands for it (TimeoutError where none came in time)."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task: Any = ray.remote(call)
    asked = {
        f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})": task.options(
            num_cpus=0,
            max_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        ).remote(*arguments)
        for node in ray.nodes()
        if node["Alive"]
    }
    done, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=timeout_s)
    answers: dict[str, Any | Exception] = {}
    for host, ref in asked.items():
        if ref not in done:
            ray.cancel(ref, force=True)
            answers[host] = TimeoutError(f"no answer within {timeout_s:.0f} s")
            continue
        try:
            answers[host] = ray.get(ref)
        except ray.exceptions.RayError as problem:
            answers[host] = problem
    return answers
