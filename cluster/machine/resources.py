"""Whether Ray has what a run asks for, and what is missing where. Ray itself would wait and say
nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.contracts.errors import UserError

SLACK = 1e-6  # of sums of fractions of a GPU


@dataclass(frozen=True, slots=True)
class Need:
    """``count`` processes of a role, each of which asks for ``each`` ({"CPU": 1, "rollout": 1}) on
    a node with ``labels``; ``keys``: resource -> the setting that it comes from."""

    role: str
    each: Mapping[str, float]
    count: int = 1
    labels: Mapping[str, str] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)

    def key(self, resource: str) -> str:
        return self.keys.get(resource, self.role)

    def bundle(self) -> dict[str, float]:
        return {kind: amount for kind, amount in self.each.items() if amount > 0}


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the cluster with all that it has, used or not."""

    name: str
    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)


def cluster_nodes() -> list[Node]:
    """The live nodes of the cluster that this process has joined."""
    import ray

    return [
        Node(str(node["NodeManagerHostname"]), node["Resources"], node.get("Labels") or {})
        for node in ray.nodes()
        if node["Alive"]
    ]


def shortage(needs: Sequence[Need], nodes: Sequence[Node]) -> UserError | None:
    """What is wrong when ``needs`` do not fit on ``nodes`` all at once, else None.

    Processes are dealt out first fit, the most particular ones first; Ray may find a place where
    this does not, so on a cluster with many nodes it is a reason to say something, not to stop.
    """
    for resource in dict.fromkeys(kind for need in needs for kind in need.bundle()):
        own = [need for need in needs if need.bundle().get(resource)]
        wanted = sum(need.each[resource] * need.count for need in own)
        has = sum(node.resources.get(resource, 0.0) for node in nodes)
        if wanted > has + SLACK:
            return _too_little(resource, own, wanted, has, nodes)
    free = [(node, dict(node.resources)) for node in nodes]
    for need in sorted(needs, key=_particular, reverse=True):
        placed = sum(_place(need, free) for _ in range(need.count))
        if placed < need.count:
            return _no_node(need, need.count - placed, nodes)
    return None


def _particular(need: Need) -> tuple[int, int, float]:
    custom = [kind for kind in need.bundle() if kind not in ("CPU", "GPU")]
    return len(need.labels) + len(custom), int("GPU" in need.bundle()), max(need.each.values())


def _place(need: Need, free: list[tuple[Node, dict[str, float]]]) -> bool:
    for node, left in free:
        fits = all(left.get(kind, 0.0) + SLACK >= n for kind, n in need.bundle().items())
        if fits and has_labels(node.labels, need.labels):
            for kind, amount in need.bundle().items():
                left[kind] -= amount
            return True
    return False


def has_labels(labels: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """Ray's label selectors: `value`, `!value`, `in(a, b)` and `!in(a, b)`."""
    return all(_matches(labels.get(key), text.strip()) for key, text in wanted.items())


def _matches(value: str | None, selector: str) -> bool:
    refused = selector.startswith("!")
    text = selector.removeprefix("!")
    values = [text]
    if text.startswith("in(") and text.endswith(")"):
        values = [word.strip() for word in text[3:-1].split(",")]
    return (value in values) != refused


def _too_little(
    resource: str, own: Sequence[Need], wanted: float, has: float, nodes: Sequence[Node]
) -> UserError:
    asks = ", ".join(
        f"{need.key(resource)} = {need.each[resource]:g}"
        + (f" for {need.count}" if need.count > 1 else "")
        for need in own
    )
    keys = " or ".join(need.key(resource) for need in own)
    more = {"CPU": "cluster.num_cpus", "GPU": "a machine with more GPUs"}
    return UserError(
        f"the run asks for {wanted:g} {resource} ({asks}), Ray has {has:g}"
        + _where_it_is(resource, nodes),
        where=own[0].key(resource),
        fix=f"lower {keys}, or give {more.get(resource, f'nodes with more {resource}')}",
    )


def _where_it_is(resource: str, nodes: Sequence[Node]) -> str:
    """Only with several nodes: on one there is nothing to look for."""
    owners = [node for node in nodes if node.resources.get(resource, 0.0) > 0]
    if len(nodes) < 2 or not owners:
        return ""
    shown = ", ".join(f"{node.name} {node.resources[resource]:g}" for node in owners[:8])
    return f" ({shown}{', ...' if len(owners) > 8 else ''})"


def _no_node(need: Need, unplaced: int, nodes: Sequence[Node]) -> UserError:
    asks = ", ".join(f"{amount:g} {kind}" for kind, amount in need.bundle().items())
    labels = ", ".join(f"{key}: {value}" for key, value in need.labels.items())
    with_labels = [node for node in nodes if has_labels(node.labels, need.labels)]
    if labels and not with_labels:
        return UserError(
            f"no node has the labels {labels}, which {need.role} asks for",
            where=need.key("labels"),
            fix="start a node with them (`ray start --labels`), or change the labels in the config",
        )
    have = "; ".join(_described(node, need) for node in with_labels[:8])
    return UserError(
        f"{need.role}: {unplaced} of {need.count} find no node with {asks} left"
        + (f" and the labels {labels}" if labels else "")
        + f" (there are {have})",
        where=need.key(next(iter(need.bundle()), "CPU")),
        fix="ask for less per process, or add a node that has room",
    )


def _described(node: Node, need: Need) -> str:
    has = ", ".join(f"{node.resources.get(kind, 0.0):g} {kind}" for kind in need.bundle())
    return f"{node.name} with {has}"


def require_resources(
    needs: Sequence[Need], ray_info: Mapping[str, Any], say: Callable[[str], None]
) -> None:
    """Raise UserError when a cluster that was started here has too little; one that was joined may
    still grow, so there it is only said. ``ray_info``: what ``ray_cluster`` yields."""
    if not any(need.bundle() or need.labels for need in needs):
        return  # also where no Ray is running
    problem = shortage(needs, cluster_nodes())
    if problem is None:
        return
    if ray_info["started"]:
        raise problem
    say(f"{problem.what}; waiting for the cluster to grow")
