"""CPU time of a training run by role, sampled from /proc while it goes on."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from typing import get_args

from cluster.machine.role_processes import PROC, TICKS, ProcessRole, RoleProcess, role_processes

INTERVAL_S = 0.5

Samples = list[tuple[float, float]]


class ProcessSampler:
    """Samples the process ``root`` and all that descend from it, until ``stop``.

    ``by_role``: role -> (monotonic time, CPU-seconds since the start). ``elsewhere``: CPU-seconds
    of all other processes of the machine: the noise.
    """

    def __init__(self, root: int) -> None:
        self._root = root
        self._known: dict[int, RoleProcess] = {}  # also those that have ended
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
        self._known |= {process.pid: process for process in role_processes(self._root)}
        now, sums = time.monotonic(), dict.fromkeys(get_args(ProcessRole), 0.0)
        for process in self._known.values():
            sums[process.role] += process.cpu_s
        for role, used in sums.items():
            self.by_role[role].append((now, used))
        self.elsewhere.append((now, max(0.0, _machine_seconds() - sum(sums.values()))))


def _machine_seconds() -> float:
    """CPU-seconds used by everything since the machine started."""
    first = (PROC / "stat").read_text(encoding="utf-8").splitlines()[0].split()[1:]
    user, nice, system, _idle, _wait, irq, softirq = (int(word) for word in first[:7])
    return (user + nice + system + irq + softirq) / TICKS
