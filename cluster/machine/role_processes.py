"""Processes of a run by role, with the CPU time each has used, from /proc (Linux)."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

PROC = Path("/proc")
TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100

ProcessRole = Literal["worker", "learner", "reward", "controller", "ray"]
TITLES: Mapping[str, ProcessRole] = {  # what Ray calls the process of an actor
    "ray::RolloutActor": "worker",
    "ray::LearnerActor": "learner",
    "ray::_RewardActor": "reward",
}


@dataclass(frozen=True, slots=True)
class RoleProcess:
    """``cpu_s``: user and system time since the process started."""

    pid: int
    role: ProcessRole
    cpu_s: float


def role_processes(root: int) -> list[RoleProcess]:
    """The process ``root``, which is the controller, and all that descend from it."""
    parents, seconds = all_processes()
    roles = roles_below(root, parents, title_of)
    return [RoleProcess(pid, role, seconds[pid]) for pid, role in roles.items()]


def roles_below(
    root: int, parents: Mapping[int, int], title: Callable[[int], str]
) -> dict[int, ProcessRole]:
    """Process -> role. What a role has started belongs to it (vLLM's processes to their worker,
    what a reward function starts to the reward service); everything else is Ray's.

    ``parents``: process -> its parent. ``title``: command line of a process.
    """
    children: dict[int, list[int]] = defaultdict(list)
    for pid, parent in parents.items():
        children[parent].append(pid)
    found: dict[int, ProcessRole] = {root: "controller"} if root in parents else {}
    todo = list(found)
    while todo:
        pid = todo.pop()
        inherited: ProcessRole = found[pid] if found[pid] in TITLES.values() else "ray"
        for child in children[pid]:
            words = title(child)
            own = (role for name, role in TITLES.items() if words.startswith(name))
            found[child] = next(own, inherited)
            todo.append(child)
    return found


def all_processes() -> tuple[dict[int, int], dict[int, float]]:
    """Of the whole machine: process -> its parent, process -> CPU seconds (user and system)."""
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


def title_of(pid: int) -> str:
    """The command line of a process; "" of one that has ended."""
    with suppress(OSError):
        return (PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace")
    return ""


def threads_of(pid: int) -> list[int]:
    """Of a process; none of one that has ended."""
    with suppress(OSError):
        return [int(thread) for thread in os.listdir(PROC / str(pid) / "task")]
    return []
