"""Which role runs on which core."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CorePlan:
    """Cores of each role; an empty tuple means "not pinned"."""

    workers: tuple[tuple[int, ...], ...]
    learner: tuple[int, ...]
    reward: tuple[int, ...]

    def worker(self, index: int) -> tuple[int, ...]:
        """Cores of worker ``index``; a worker added beyond the plan shares by turns."""
        return self.workers[index % len(self.workers)] if self.workers else ()


def plan_cores(cores: list[int], workers: int, *, pin: bool) -> CorePlan:
    """A core for each rollout worker, the rest for the learner; scoring shares the learner's.

    Not pinned when there are not enough cores for that: the operating system then does better.
    """
    if not pin or workers >= len(cores):
        return CorePlan((), (), ())
    own = tuple((core,) for core in cores[:workers])
    rest = tuple(cores[workers:])
    return CorePlan(own, rest, rest)


def own_cores() -> list[int]:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
