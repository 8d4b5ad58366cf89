"""CPU time of a training run by role, sampled from /proc while it goes on."""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from pathlib import Path

PROC = Path("/proc")
INTERVAL_S = 0.5
TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
ROLES = {  # what a process of the run is called -> its role; the rest of the tree is Ray's
    "ray::RolloutActor": "worker",
    "ray::LearnerActor": "learner",
    "ray::_RewardActor": "reward",
}

Samples = list[tuple[float, float]]


class ProcessSampler:
    """Samples the process ``root`` and all that descend from it, until ``stop``.

    ``by_role``: role -> (monotonic time, CPU-seconds since the start). ``elsewhere``: CPU-seconds
    of all other processes of the machine: the noise.
    """

    def __init__(self, root: int) -> None:
        self._root = root
        self._known: dict[int, tuple[str, float]] = {}  # pid -> role, CPU-seconds
        self.by_role: dict[str, Samples] = defaultdict(list)
        self.elsewhere: Samples = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="process-sampler", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(10.0)

    def _loop(self) -> None:
        while not self._stopping.wait(INTERVAL_S):
            self._sample()

    def _sample(self) -> None:
        parents, seconds = _all_processes()
        for pid in _descendants(self._root, parents):
            role = self._known.get(pid, ("", 0.0))[0]
            if role in ("", "ray"):  # Ray renames a process when it becomes an actor
                role = "controller" if pid == self._root else _role(pid)
            self._known[pid] = (role, seconds[pid])
        now, sums = time.monotonic(), dict.fromkeys((*ROLES.values(), "controller", "ray"), 0.0)
        for role, used in self._known.values():
            sums[role] += used
        for role, used in sums.items():
            self.by_role[role].append((now, used))
        self.elsewhere.append((now, max(0.0, _machine_seconds() - sum(sums.values()))))


def _all_processes() -> tuple[dict[int, int], dict[int, float]]:
    """pid -> parent's pid, pid -> CPU-seconds (user and system)."""
    parents, seconds = {}, {}
    for entry in os.listdir(PROC):
        if not entry.isdigit():
            continue
        try:
            text = (PROC / entry / "stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue  # it ended meanwhile
        fields = text.rpartition(")")[2].split()
        parents[int(entry)] = int(fields[1])
        seconds[int(entry)] = (int(fields[11]) + int(fields[12])) / TICKS
    return parents, seconds


def _descendants(root: int, parents: dict[int, int]) -> set[int]:
    children: dict[int, list[int]] = defaultdict(list)
    for pid, parent in parents.items():
        children[parent].append(pid)
    found, todo = set(), [root] if root in parents else []
    while todo:
        pid = todo.pop()
        found.add(pid)
        todo += children[pid]
    return found


def _role(pid: int) -> str:
    try:
        words = (PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return "ray"
    return next((role for name, role in ROLES.items() if words.startswith(name)), "ray")


def _machine_seconds() -> float:
    """CPU-seconds used by everything since the machine started."""
    first = (PROC / "stat").read_text(encoding="utf-8").splitlines()[0].split()[1:]
    user, nice, system, _idle, _wait, irq, softirq = (int(word) for word in first[:7])
    return (user + nice + system + irq + softirq) / TICKS
