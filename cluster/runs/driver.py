"""Which process drives a run, and whether it still does.

A process id alone does not tell: another process may have the id of a dead one, after a reboot or
just later. Boot id and start time settle that.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LOCK = "driver.lock"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Driver:
    """``started``: when the process began, in clock ticks since boot (unlike the time of day, no
    clock adjustment moves it); None where the system has no /proc."""

    pid: int
    host: str
    boot: str
    started: int | None = None

    @staticmethod
    def of_this_process() -> Driver:
        pid = os.getpid()
        state = _proc_state(pid)
        return Driver(pid, socket.gethostname(), _boot_id(), state[1] if state else None)

    @staticmethod
    def of_record(record: Mapping[str, Any]) -> Driver | None:
        try:
            started = record.get("started")
            return Driver(
                pid=int(record["pid"]),
                host=str(record["host"]),
                boot=str(record["boot"]),
                started=None if started is None else int(started),
            )
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
            return None

    def record(self) -> dict[str, Any]:
        return asdict(self)

    def is_this_process(self) -> bool:
        return self.pid == os.getpid() and self.alive() is True

    def alive(self) -> bool | None:
        """Whether that very process still exists; None where this machine cannot tell."""
        if self.host != socket.gethostname():
            return None
        if self.boot != _boot_id():
            return False
        if self.pid <= 0:  # kill(2) would take it for a group of processes
            return False
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except PermissionError:  # it exists and is another user's
            pass
        state = _proc_state(self.pid)
        if state is None:
            return True
        letter, started = state
        return letter not in "ZX" and self.started in (None, started)


def driver_of(directory: Path) -> Driver | None:
    """The process that holds the run now or, without one, the process that made the run."""
    for name, key in ((LOCK, None), ("manifest.json", "driver")):
        with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
            content = json.loads((directory / name).read_text(encoding="utf-8"))
            found = Driver.of_record(content if key is None else content.get(key, {}))
            if found is not None:
                return found
    return None


def _boot_id() -> str:
    return _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""


def _proc_state(pid: int) -> tuple[str, int] | None:
    """(state letter, start in clock ticks since boot), see proc(5); None without /proc."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before may hold spaces and brackets
    return fields[0], int(fields[19])
