"""The roles beside workers and learner go to the cores that fit what they cost."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import pytest

from cluster.machine.core_sharing import CoreSharing, keep_to, step_costs
from cluster.machine.cores import plan_cores
from cluster.machine.placement import StepCosts
from cluster.machine.role_processes import ProcessRole, RoleProcess

PLAN = plan_cores(range(2), 1, pin=True)
PIDS: Mapping[ProcessRole, int] = {
    "worker": 11, "learner": 12, "reward": 13, "controller": 14, "ray": 15,
}  # fmt: skip
BESIDE = {"reward": 0.04, "controller": 0.02, "ray": 0.05}


class Machine:
    """Processes that use so many CPU seconds per step, and what is done to them."""

    def __init__(self, known: StepCosts | None = None) -> None:
        self.used: dict[ProcessRole, float] = dict.fromkeys(PIDS, 100.0)  # of their start
        self.kept: dict[int, set[int]] = {}
        self.events: list[dict[str, Any]] = []
        self.records: list[Mapping[str, Any]] = []
        self.sink = CoreSharing(
            PLAN,
            event=lambda kind, **detail: self.events.append({"kind": kind, **detail}),
            record=self.records.append,
            known=known,
            processes=lambda: [RoleProcess(PIDS[r], r, used) for r, used in self.used.items()],
            keep=self.keep,
        )
        self.step = 0

    def keep(self, processes: Iterable[int], cores: Iterable[int]) -> None:
        self.kept |= {process: set(cores) for process in processes}

    def steps(self, count: int, **cpu_s: float) -> None:
        for _ in range(count):
            self.step += 1
            for role in PIDS:
                self.used[role] += {**BESIDE, **cpu_s}[role]
            self.sink.write(self.step, {"time/step": 1.25})


def test_they_go_where_there_is_room() -> None:
    machine = Machine()
    machine.steps(1, worker=1.0, learner=1.2)
    assert machine.kept == {}  # what the roles used before is no cost of a step
    machine.steps(1, worker=1.0, learner=1.2)
    assert machine.kept == {13: {0}, 14: {0}, 15: {0}}
    (event,) = machine.events
    assert (event["kind"], event["step"], event["step_s"]) == ("cores_dealt_out", 2, 1.25)
    assert event["cpu_s"]["learner"] == pytest.approx(1.2)
    assert event["cores"][0]["roles"] == ["1 rollout worker", "reward service", "controller", "Ray"]
    assert event["cores"][0]["busy"] == pytest.approx(1.11 / 1.25)
    assert machine.records == [{k: v for k, v in event.items() if k != "kind"}]
    machine.sink.close()
    assert machine.kept == {13: {0, 1}, 14: {0, 1}, 15: {0, 1}}


def test_it_looks_less_and_less_often_at_what_was_used_since() -> None:
    machine = Machine()
    machine.steps(6, worker=1.0, learner=1.2)
    machine.steps(194, worker=1.2, learner=1.0)
    assert [record["step"] for record in machine.records] == [2, 4, 8, 16, 32, 64, 128, 192]
    # At step 8 two steps of either kind count, at step 16 those of the new kind alone.
    assert [event["step"] for event in machine.events] == [2, 8, 16]
    assert machine.kept == {13: {1}, 14: {1}, 15: {1}}


def test_costs_of_an_earlier_run_decide_after_the_first_step() -> None:
    known = StepCosts(workers=1.0, learner=1.2, reward=0.04, controller=0.02, ray=0.05)
    machine = Machine(known)
    machine.steps(1, worker=1.0, learner=1.2)
    assert [event["step"] for event in machine.events] == [1]
    assert machine.kept == {13: {0}, 14: {0}, 15: {0}}
    assert machine.records == []  # it has measured nothing itself yet


def test_costs_are_those_of_processes_that_were_there_all_the_time() -> None:
    before = {1: 10.0, 2: 20.0, 3: 30.0}
    found = [
        RoleProcess(1, "worker", 12.0),
        RoleProcess(2, "worker", 23.0),
        RoleProcess(3, "learner", 34.0),
        RoleProcess(4, "worker", 99.0),  # was started meanwhile
    ]
    costs = step_costs(found, before, 2)
    assert costs == StepCosts(workers=2.5, learner=2.0, reward=0, controller=0, ray=0)
    assert step_costs(found[:2], before, 2) is None  # the learner was lost


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinity")
def test_all_threads_of_a_process_are_kept() -> None:
    before = os.sched_getaffinity(0)
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    core = min(before)
    try:
        keep_to([os.getpid(), 2**22 + 1], {core})  # one that is gone is no problem
        assert os.sched_getaffinity(0) == {core}
        assert os.sched_getaffinity(thread.native_id or 0) == {core}
        assert os.sched_getaffinity(other.pid) == before
    finally:
        keep_to([os.getpid()], before)
        stop.set()
        other.communicate(b"\n", timeout=30)
