"""Keep what is not generation or training off the busier of the two.

On a small machine each rollout worker and the learner have a core of their own. The controller, the
reward service and Ray's daemons have to run somewhere: on the cores of the role that waits more.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import psutil

from cluster.machine.cores import CorePlan

ROLES = ("RolloutActor", "LearnerActor")  # in the titles Ray gives their processes
MARGIN = 0.02  # of a step; less of a difference is noise


def side_threads() -> list[int]:
    """Threads of this process and of those it started, without the roles' own processes."""
    own = psutil.Process()
    found = []
    for process in [own, *own.children(recursive=True)]:
        with suppress(psutil.Error):  # gone meanwhile
            if not any(role in " ".join(process.cmdline()) for role in ROLES):
                found += [thread.id for thread in process.threads()]
    return found


def keep_to(threads: Iterable[int], cores: Iterable[int]) -> None:
    """Linux: these threads run on these cores only, from now on."""
    chosen = set(cores)
    for thread in threads:
        with suppress(ProcessLookupError):
            os.sched_setaffinity(thread, chosen)


@dataclass(slots=True)
class SideBalance:
    """A sink of the controller's numbers: reads who waits, moves the side processes there.

    Looks after steps 2, 4, 8, ... 64 and then every 64: as a rule the answer never changes.
    """

    plan: CorePlan
    threads: Callable[[], list[int]] = side_threads
    keep: Callable[[Iterable[int], Iterable[int]], None] = keep_to
    cores: tuple[int, ...] = ()
    _waited: dict[str, float] = field(default_factory=dict)
    _looked: int = 0

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for role in ("trainer", "rollout"):
            waited = numbers.get(f"perf/{role}_idle_frac", 0.0)
            self._waited[role] = self._waited.get(role, 0.0) + waited
        self._looked += 1
        if not (self._looked % 64 == 0 or self._looked in (2, 4, 8, 16, 32)):
            return
        difference = (self._waited["rollout"] - self._waited["trainer"]) / self._looked
        if abs(difference) < MARGIN:
            return
        generation = tuple(sorted({core for cores in self.plan.workers for core in cores}))
        self.cores = generation if difference > 0 else self.plan.learner
        self.keep(self.threads(), self.cores)

    def close(self) -> None:
        """Back to all cores: other stages of the same command may follow."""
        if self.cores:
            everywhere = {core for cores in self.plan.workers for core in cores}
            self.keep(self.threads(), everywhere | set(self.plan.learner))
