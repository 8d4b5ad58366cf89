"""Whether Ray has what a run asks for. Ray itself would wait, and say nothing, until a role's start
takes too long."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.contracts.errors import UserError


@dataclass(frozen=True, slots=True)
class Need:
    """``count`` processes of a role, with ``each`` of a resource ("CPU", "GPU"); ``key``: the
    setting it comes from."""

    key: str
    resource: str
    each: float
    count: int = 1

    @property
    def total(self) -> float:
        return self.each * self.count

    def __str__(self) -> str:
        return f"{self.key} = {self.each:g}" + (f" for {self.count}" if self.count > 1 else "")


def shortage(needs: Sequence[Need], there: Mapping[str, float]) -> UserError | None:
    """What is wrong when ``needs`` are more than Ray has in all, else None."""
    for resource in dict.fromkeys(need.resource for need in needs):
        own = [need for need in needs if need.resource == resource and need.each > 0]
        wanted, has = sum(need.total for need in own), there.get(resource, 0.0)
        if wanted > has + 1e-6:
            more = "cluster.num_cpus" if resource == "CPU" else "a machine with more GPUs"
            return UserError(
                f"the run asks for {wanted:g} {resource} ({', '.join(map(str, own))}), Ray has "
                f"{has:g}",
                where=own[0].key,
                fix=f"lower {' or '.join(need.key for need in own)}, or give {more}",
            )
    return None


def require_resources(
    needs: Sequence[Need], ray_info: Mapping[str, Any], say: Callable[[str], None]
) -> None:
    """Raise UserError when a cluster that was started here has too little; one that was joined may
    still grow, so there it is only said. ``ray_info``: what ``ray_cluster`` yields."""
    problem = shortage(needs, ray_info["resources"])
    if problem is None:
        return
    if ray_info["started"]:
        raise problem
    say(f"{problem.what}; waiting for the cluster to grow")
