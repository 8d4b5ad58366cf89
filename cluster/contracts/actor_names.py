"""What Ray's dashboard calls the processes of a run: RUN/worker-0, RUN/learner, RUN/reward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

Names = Callable[[str], dict[str, str]]
"""Role -> options of its actor."""


class ActorNames:
    """Gives each actor a name of its own. Ray wants names to be unique within a namespace, and the
    name of a dead actor may be taken for a while: so the second process of a role is called
    RUN/worker-0 (2).

    ``namespace``: of this command alone, so that runs of one name do not meet.
    """

    def __init__(self, run: str, namespace: str) -> None:
        self._run, self._namespace = run, namespace
        self._given: Counter[str] = Counter()

    def __call__(self, role: str) -> dict[str, str]:
        self._given[role] += 1
        count = self._given[role]
        name = f"{self._run}/{role}" + (f" ({count})" if count > 1 else "")
        return {"name": name, "namespace": self._namespace}


def unnamed(role: str) -> dict[str, str]:
    return {}
