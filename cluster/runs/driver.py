"""Which process drives a run, and whether it still does.

A process id alone does not tell: another process may have the id of a dead one, after a reboot or
just later. Boot id and start time settle that.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.contracts.errors import UserError

LOCK = "driver.lock"
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # of file systems without locks
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


def driver_of(directory: Path, *, also_maker: bool = True) -> Driver | None:
    """The process that holds the run now or, without one, the process that made the run."""
    places = ((LOCK, None), ("manifest.json", "driver"))
    for name, key in places if also_maker else places[:1]:
        with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
            content = json.loads((directory / name).read_text(encoding="utf-8"))
            found = Driver.of_record(content if key is None else content.get(key, {}))
            if found is not None:
                return found
    return None


@contextlib.contextmanager
def driver_lock(directory: Path) -> Iterator[None]:
    """Hold the run for this process, by a lock that the system lets go of when the process dies.

    Raises UserError when another process holds it, or when a process of another host has left its
    record: whether that one still lives cannot be seen from here.
    """
    path = directory / LOCK
    descriptor = _locked(path)
    try:
        holder = driver_of(directory, also_maker=False)
        if holder is not None and not holder.is_this_process() and holder.alive() is not False:
            raise _held(directory, holder)
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(Driver.of_this_process().record()).encode(), 0)
        os.fsync(descriptor)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # while it is locked: it is this process's own
    finally:
        os.close(descriptor)


def _locked(path: Path) -> int:
    """A descriptor of the lock file at ``path``, locked."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before may have removed the file between the two calls: locked would then
            # be one that nobody else finds.
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise _held(path.parent, driver_of(path.parent, also_maker=False)) from None
        except FileNotFoundError:
            pass
        except OSError as problem:
            if problem.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
            return descriptor  # the record in the file has to do
        os.close(descriptor)


def _held(directory: Path, holder: Driver | None) -> UserError:
    if holder is None:  # it has only just taken it
        return UserError("another process is driving this run", where=str(directory))
    if holder.alive() is None:
        return UserError(
            f"process {holder.pid} on host {holder.host} is driving this run, or was when that "
            "host went down",
            where=str(directory),
            fix=f"stop it there; if it is dead, remove {directory / LOCK}",
        )
    return UserError(
        f"process {holder.pid} is driving this run",
        where=str(directory),
        fix="wait for it, or end it with `accord stop`; a paused run goes on with `accord resume`",
    )


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
