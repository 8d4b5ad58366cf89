"""What a reward service prints on another host comes into a file on this one."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

EVERY_S = 2.0
CHUNK = 1 << 20

Read = Callable[[int], bytes]
"""Offset -> what was printed from there on: whole lines, at most CHUNK bytes unless one is longer;
empty where there is nothing more."""


def whole_lines(descriptor: int, offset: int) -> bytes:
    """``Read`` of an open file. A line that is longer than CHUNK comes in pieces."""
    found = os.pread(descriptor, CHUNK, offset)
    end = found.rfind(b"\n") + 1
    return found[:end] if end or len(found) < CHUNK else found


class LogFollower:
    """Appends to ``target`` every ``EVERY_S`` seconds, on a thread, until ``close``. A service that
    cannot be asked now is asked again; what it printed just before its host was lost is lost."""

    def __init__(self, read: Read, target: Path) -> None:
        self._read = read
        self._target = target
        self._offset = 0
        self._gate = threading.Lock()
        self._over = threading.Event()
        threading.Thread(target=self._follow, name="accord-reward-log", daemon=True).start()

    def collect(self) -> None:
        """What there is by now. Raises what ``read`` raises, and OSError."""
        with self._gate:
            while found := self._read(self._offset):
                self._target.parent.mkdir(parents=True, exist_ok=True)
                with self._target.open("ab") as file:
                    file.write(found)
                self._offset += len(found)

    def close(self) -> None:
        """Ends the following; nothing more is asked."""
        self._over.set()

    def _follow(self) -> None:
        while not self._over.wait(EVERY_S):
            with contextlib.suppress(Exception):  # gone, slow, a full disk: a log ends no run
                self.collect()
