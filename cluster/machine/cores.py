"""Which role computes on which cores, with how many threads: decided before anything starts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from cluster.contracts.config.train import TrainConfig


@dataclass(frozen=True, slots=True)
class CorePlan:
    """Cores of each role; an empty tuple means "not pinned". Threads: of torch, in one process of
    the role (a rollout worker; each process of the learner)."""

    workers: tuple[tuple[int, ...], ...]
    learner: tuple[int, ...]
    reward: tuple[int, ...]
    worker_threads: int = 1
    learner_threads: int = 1

    def worker(self, index: int) -> tuple[int, ...]:
        """Cores of worker ``index``; a worker added beyond the plan shares by turns."""
        return self.workers[index % len(self.workers)] if self.workers else ()

    @property
    def crowded(self) -> bool:
        """Whether no core is left for what is neither generation nor training."""
        return bool(self.workers) and self.reward == self.learner

    def describe(self) -> str:
        """The plan in one line, for people."""
        workers = f"{counted(self.worker_threads, 'thread')} per rollout worker"
        learner = f"{counted(self.learner_threads, 'thread')} per learner process"
        if not self.workers:
            return f"{workers}, {learner}, not bound to cores"
        own = sorted({core for cores in self.workers for core in cores})
        return (
            f"{workers} on {cores_text(own)}, {learner} on {cores_text(self.learner)}, "
            f"reward service on {cores_text(self.reward)}"
        )


def core_plan(config: TrainConfig, cores: Sequence[int]) -> CorePlan:
    """The plan of a training run whose config has no ``auto`` left. ``cores``: those of this
    machine that this process may use."""
    rollout, learner = config.rollout, config.learner
    joined = config.cluster.to_join is not None
    return plan_cores(
        cores,
        rollout.workers,
        worker_cpus=rollout.cpus,
        learner_cpus=learner.cpus,
        learner_processes=learner.processes,
        # Cores can only be dealt out on a machine of our own, and a GPU's engine needs none.
        pin=config.cluster.pin_cores and not joined and not rollout.gpus,
        joined=joined,
    )


def plan_cores(
    cores: Sequence[int],
    workers: int,
    *,
    worker_cpus: float = 1,
    learner_cpus: float = 1,
    learner_processes: int = 1,
    pin: bool,
    joined: bool = False,
) -> CorePlan:
    """Each role computes with as many threads as it was given CPUs: ``rollout.cpus`` in a worker,
    ``learner.cpus`` in each process of the learner.

    Pinned, every worker has that many cores to itself and the learner the next ones. What is left
    is the reward service's and the other processes'; when nothing is left they share the
    learner's cores. A learner that asked for more than the workers leave gets what they leave.
    Nothing is pinned when the workers would leave no core: the operating system then does better.
    ``joined``: the roles may run on other machines, whose cores are not known here.
    """
    threads, learner_threads = _whole(worker_cpus), _whole(learner_cpus)
    if not joined:
        # More threads than cores make small products many times slower.
        threads = min(threads, max(1, len(cores)))
        learner_threads = min(learner_threads, max(1, len(cores)))
    if not pin or workers * threads >= len(cores):
        return CorePlan((), (), (), threads, learner_threads)
    own = tuple(tuple(cores[i * threads : (i + 1) * threads]) for i in range(workers))
    rest = tuple(cores[workers * threads :])
    learner_threads = min(learner_threads, max(1, len(rest) // learner_processes))
    used = learner_threads * learner_processes
    return CorePlan(own, rest[:used], rest[used:] or rest[:used], threads, learner_threads)


def own_cores() -> list[int]:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _whole(cpus: float) -> int:
    return max(1, int(cpus))


def cores_text(cores: Sequence[int]) -> str:
    """ "core 3", "cores 0-3, 8"."""
    runs = [
        [core for _, core in run]
        for _, run in groupby(enumerate(cores), lambda place: place[1] - place[0])
    ]
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return ("core " if len(cores) == 1 else "cores ") + ", ".join(parts)
