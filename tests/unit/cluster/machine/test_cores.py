"""Threads and cores of each role, for machines, numbers of workers and CPUs that were asked for."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.contracts.config.train import TrainConfig
from cluster.machine.cores import CorePlan, core_plan, plan_cores


def config(**sections: Any) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "model": {"path": "m"},
            "data": {"prompts": "p.jsonl"},
            "reward": {"sources": [{"type": "rules", "max_words": 5}]},
            "rollout": {"workers": 1, "cpus": 1, "gpus": 0},
            "learner": {"cpus": 1, "gpus": 0},
            "cluster": {"pin_cores": True},
        }
        | sections
    )


def spread(first: int, count: int) -> tuple[int, ...]:
    return tuple(range(first, first + count))


# cores, workers, CPUs of a worker, processes of the learner, CPUs of each
# -> first worker's cores, learner's cores, reward service's cores, threads of each
PINNED = [
    (2, 1, 1, 1, 1, (0,), (1,), (1,), 1, 1),
    (4, 1, 1, 1, 3, (0,), (1, 2, 3), (1, 2, 3), 1, 3),
    (4, 2, 1, 1, 1, (0,), (2,), (3,), 1, 1),
    (8, 1, 4, 1, 3, (0, 1, 2, 3), (4, 5, 6), (7,), 4, 3),
    (64, 1, 16, 1, 40, spread(0, 16), spread(16, 40), spread(56, 8), 16, 40),
    (64, 4, 8, 1, 32, spread(0, 8), spread(32, 32), spread(32, 32), 8, 32),
    (64, 1, 8, 1, 100, spread(0, 8), spread(8, 56), spread(8, 56), 8, 56),  # gets what is left
    (64, 2, 8, 4, 10, spread(0, 8), spread(16, 40), spread(56, 8), 8, 10),
    (8, 2, 2, 8, 1, (0, 1), spread(4, 4), spread(4, 4), 2, 1),  # processes share the rest
    (4, 1, 1.5, 1, 0.5, (0,), (1,), (2, 3), 1, 1),
]


@pytest.mark.parametrize("case", PINNED, ids=str)
def test_pinned_roles_have_what_was_asked(case: tuple[Any, ...]) -> None:
    cores, workers, cpus, processes, learner_cpus, *expected = case
    plan = plan_cores(
        range(cores),
        workers,
        worker_cpus=cpus,
        learner_cpus=learner_cpus,
        learner_processes=processes,
        pin=True,
    )
    threads = (plan.worker_threads, plan.learner_threads)
    assert [plan.worker(0), plan.learner, plan.reward, *threads] == expected
    own = [set(plan.worker(index)) for index in range(workers)]
    assert sum(map(len, own)) == len(set.union(*own))  # no worker shares a core with another
    assert not set.union(*own) & {*plan.learner, *plan.reward}
    assert plan.worker(workers) == plan.worker(0)  # one that was added later shares by turns


# cores, workers, CPUs of a worker and of the learner, more settings -> threads of each
NOT_PINNED = [
    (2, 2, 1, 1, {}, 1, 1),  # no core would be left
    (2, 1, 2, 1, {}, 2, 1),
    (2, 1, 8, 8, {}, 2, 2),  # never more threads than cores
    (64, 1, 8, 16, {"cluster": {"pin_cores": False}}, 8, 16),
    (64, 1, 1, 8, {"gpus": 1}, 1, 8),
    # On a cluster that was joined, cores of other machines count, not this one's.
    (2, 1, 4, 8, {"cluster": {"pin_cores": True, "address": "auto"}}, 4, 8),
]


@pytest.mark.parametrize("case", NOT_PINNED, ids=str)
def test_roles_that_are_not_pinned_have_the_threads_that_were_asked(case: tuple[Any, ...]) -> None:
    cores, workers, cpus, learner_cpus, more, *threads = case
    given = config(
        rollout={"workers": workers, "cpus": cpus, "gpus": more.get("gpus", 0)},
        learner={"cpus": learner_cpus, "gpus": 0},
        cluster=more.get("cluster", {"pin_cores": True}),
    )
    plan = core_plan(given, range(cores))
    assert (plan.workers, plan.learner, plan.reward) == ((), (), ())
    assert [plan.worker_threads, plan.learner_threads] == threads
    assert plan.worker(3) == ()
    assert not plan.crowded


def test_the_plan_is_said_in_one_line() -> None:
    assert plan_cores(range(2), 1, pin=True).describe() == (
        "1 thread per rollout worker on core 0, 1 thread per learner process on core 1, "
        "reward service on core 1"
    )
    apart = CorePlan(((0, 1), (4, 5)), (2, 3, 8), (9,), 2, 3)
    assert apart.describe() == (
        "2 threads per rollout worker on cores 0-1, 4-5, 3 threads per learner process on cores "
        "2-3, 8, reward service on core 9"
    )
    assert plan_cores(range(2), 2, pin=True).describe() == (
        "1 thread per rollout worker, 1 thread per learner process, not bound to cores"
    )


def test_a_core_that_is_left_over_is_nobodys_rival() -> None:
    assert plan_cores(range(2), 1, pin=True).crowded
    assert not plan_cores(range(4), 1, learner_cpus=2, pin=True).crowded
