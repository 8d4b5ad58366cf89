"""Processes of a run, by role."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from cluster.machine.role_processes import role_processes, roles_below, threads_of


def test_roles_follow_from_titles_and_from_who_started_a_process() -> None:
    titles = {
        2: "raylet",
        3: "ray::RolloutActor.harvest",
        4: "VLLM::Worker_0",
        5: "ray::_RewardActor",
        6: "python sandbox.py",
        7: "ray::LearnerActor",
        8: "fork server",
    }
    # 1 is the command; Ray's workers are children of the fork server, 9 belongs to somebody else.
    parents = {1: 0, 2: 1, 8: 1, 3: 8, 4: 3, 5: 2, 6: 5, 7: 8, 9: 0}
    assert roles_below(1, parents, lambda pid: titles.get(pid, "")) == {
        1: "controller",
        2: "ray",
        8: "ray",
        3: "worker",
        4: "worker",
        5: "reward",
        6: "reward",
        7: "learner",
    }
    assert roles_below(99, parents, lambda pid: "") == {}


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="the system has no /proc")
def test_this_process_is_found_with_what_it_started_and_its_threads() -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        found = {process.pid: process for process in role_processes(os.getpid())}
        assert found[os.getpid()].role == "controller"
        assert found[os.getpid()].cpu_s == pytest.approx(sum(os.times()[:2]), abs=0.5)
        assert found[other.pid].role == "ray"
        assert thread.native_id in threads_of(os.getpid())
    finally:
        stop.set()
        other.communicate(b"\n", timeout=30)
    assert threads_of(other.pid) == []
