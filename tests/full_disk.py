"""A disk without room, for the files that a test writes with `os.write`."""

from __future__ import annotations

import errno
import os

import pytest


class Disk:
    """``room``: bytes that it still takes; None: as many as come."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room: int | None = None
        self._write = os.write
        monkeypatch.setattr(os, "write", self.write)

    def write(self, descriptor: int, content: bytes) -> int:
        if self.room is None:
            return self._write(descriptor, content)
        if self.room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = self._write(descriptor, content[: self.room])
        self.room -= taken
        return taken
