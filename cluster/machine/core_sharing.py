"""Keeps a run's processes to the cores that fit what they cost (``placement.py`` decides).

Workers, learner and reward service start on the cores of their plan. The run measures the CPU
seconds of each role, and moves the reward service, the controller and Ray's processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from cluster.machine.cores import CorePlan
from cluster.machine.placement import Place, Side, StepCosts, choose, placement_rows, start
from cluster.machine.role_processes import ProcessRole, RoleProcess, role_processes, threads_of

ROLE_OF: Mapping[Side, ProcessRole] = {
    "reward service": "reward",
    "controller": "controller",
    "Ray": "ray",
}


def keep_to(processes: Iterable[int], cores: Iterable[int]) -> None:
    """Linux: all threads of these processes run on these cores only, from now on."""
    chosen = set(cores)
    for process in processes:
        for thread in threads_of(process):
            with suppress(ProcessLookupError):  # it ended meanwhile
                os.sched_setaffinity(thread, chosen)


def own_processes() -> list[RoleProcess]:
    return role_processes(os.getpid())


@dataclass(slots=True)
class CoreSharing:
    """A sink of the controller's numbers, of which it takes how long each step lasted.

    It looks after steps 2, 4, 8, ... 64 of this command and then after every 64. As a rule the
    answer never changes. ``known``: what the roles cost in an earlier run; they are then moved
    after the first step. ``event`` is told of each move, ``record`` of the costs at each look.
    """

    plan: CorePlan
    event: Callable[..., None]
    record: Callable[[Mapping[str, Any]], None]
    known: StepCosts | None = None
    processes: Callable[[], Sequence[RoleProcess]] = own_processes
    keep: Callable[[Iterable[int], Iterable[int]], None] = keep_to
    _where: dict[Side, Place] = field(default_factory=dict)
    _before: dict[int, float] = field(default_factory=dict)  # process -> CPU seconds at that look
    _steps: int = 0
    _looked: int = 0  # after how many steps
    _took_s: float = 0.0  # by the steps since

    def __post_init__(self) -> None:
        self._where = start(self.plan)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._steps += 1
        self._took_s += numbers.get("time/step", 0.0)
        count, steps = self._steps, self._steps - self._looked
        if not (count % 64 == 0 or count in (1, 2, 4, 8, 16, 32)):
            return
        found = self.processes()
        costs = self.known if count == 1 else step_costs(found, self._before, steps)
        step_s, self._took_s, self._looked = self._took_s / steps, 0.0, count
        self._before = {process.pid: process.cpu_s for process in found}
        if costs is None:
            return
        choice = choose(self.plan, costs, self._where)
        detail = {
            "step": step,
            "step_s": step_s,
            "cores": [asdict(row) for row in placement_rows(self.plan, choice.placement, step_s)],
            "cpu_s": asdict(costs),
            "why": choice.why,
        }
        if choice.moved:
            self.event("cores_dealt_out", **detail)
        if count > 1:
            self.record(detail)
        # Also where nothing moves: Ray may have started a process since the last look.
        self._where = dict(choice.placement.where)
        for side, place in self._where.items():
            self.keep([p.pid for p in found if p.role == ROLE_OF[side]], place.cores)

    def close(self) -> None:
        """Back to all cores: other stages of the same command may follow."""
        everywhere = {core for cores in self.plan.workers for core in cores}
        everywhere |= {*self.plan.learner, *self.plan.reward}
        beside = [p.pid for p in self.processes() if p.role in ROLE_OF.values()]
        self.keep(beside, everywhere)


def step_costs(
    found: Iterable[RoleProcess], before: Mapping[int, float], steps: int
) -> StepCosts | None:
    """CPU seconds per step of each role, over ``steps`` steps. A process that has started since
    ``before`` counts from the next time on: its start is no part of a step. None where no worker or
    no learner was there all the time, as they were lost or run elsewhere."""
    spent: dict[ProcessRole, float] = {}
    for process in found:
        if process.pid in before:
            seconds = process.cpu_s - before[process.pid]
            spent[process.role] = spent.get(process.role, 0.0) + seconds / steps
    if not spent.get("worker") or not spent.get("learner"):
        return None
    return StepCosts(
        workers=spent["worker"],
        learner=spent["learner"],
        reward=spent.get("reward", 0.0),
        controller=spent.get("controller", 0.0),
        ray=spent.get("ray", 0.0),
    )
