"""Side processes go to the cores of the role that waits more."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterable

import pytest

from cluster.machine.core_sharing import SideBalance, keep_to, side_threads
from cluster.machine.cores import CorePlan

PLAN = CorePlan(((0,), (1,)), (2, 3), (2, 3))


class Moves:
    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def __call__(self, threads: Iterable[int], cores: Iterable[int]) -> None:
        assert list(threads) == [7]
        self.seen.append(tuple(sorted(cores)))


def balance(moves: Moves) -> SideBalance:
    return SideBalance(PLAN, threads=lambda: [7], keep=moves)


def idle(trainer: float, rollout: float) -> dict[str, float]:
    return {"perf/trainer_idle_frac": trainer, "perf/rollout_idle_frac": rollout}


@pytest.mark.parametrize(
    ("trainer", "rollout", "cores"),
    [(0.0, 0.1, (0, 1)), (0.3, 0.1, (2, 3)), (0.1, 0.11, None)],
)
def test_they_go_where_more_is_waited(
    trainer: float, rollout: float, cores: tuple[int, ...] | None
) -> None:
    moves = Moves()
    sink = balance(moves)
    sink.write(0, idle(trainer, rollout))
    assert moves.seen == []
    sink.write(1, idle(trainer, rollout))
    assert moves.seen == ([] if cores is None else [cores])
    sink.close()
    assert moves.seen[1:] == ([] if cores is None else [(0, 1, 2, 3)])


def test_it_is_looked_at_less_and_less_often_and_over_all_steps() -> None:
    moves = Moves()
    sink = balance(moves)
    for step in range(200):
        sink.write(step, idle(0.0, 0.5) if step < 6 else idle(0.5, 0.0))
    # after 2, 4, 8, 16, 32, 64, 128 and 192 steps
    assert moves.seen == [(0, 1)] * 3 + [(2, 3)] * 5


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinity")
def test_all_threads_of_this_and_of_started_processes_are_kept() -> None:
    before = os.sched_getaffinity(0)
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    # A role's own process keeps its cores.
    code = "input() # RolloutActor"
    role = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    try:
        threads = side_threads()
        assert {os.getpid(), thread.native_id, other.pid} <= set(threads)
        assert role.pid not in threads
        core = min(before)
        keep_to([*threads, 2**22 + 1], {core})  # one that is gone is no problem
        assert os.sched_getaffinity(other.pid) == os.sched_getaffinity(0) == {core}
        assert os.sched_getaffinity(thread.native_id or 0) == {core}
        assert os.sched_getaffinity(role.pid) == before
    finally:
        keep_to(side_threads(), before)
        stop.set()
        for process in (other, role):
            process.communicate(b"\n", timeout=10)
