"""A file to which a run adds lines, and that neither a full disk nor a killed process breaks."""

from __future__ import annotations

import errno
import os
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
MOST_WAITING = 10_000


@dataclass(slots=True)
class Lines:
    """What does not fit on the disk waits in memory (its newest ``MOST_WAITING`` lines), and is
    written before the next line that fits."""

    path: Path
    waiting: deque[str] = field(default_factory=lambda: deque(maxlen=MOST_WAITING))

    def add(self, line: str) -> None:
        self.waiting.append(line)
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                while self.waiting:
                    _append(descriptor, self.waiting[0].encode() + b"\n")
                    self.waiting.popleft()
            finally:
                os.close(descriptor)
        except OSError as problem:
            if problem.errno not in FULL:
                raise


def _append(descriptor: int, line: bytes) -> None:
    """Add a line; after a new line where a killed process or a full disk has left half of one,
    which must not become part of it."""
    end = os.lseek(descriptor, 0, os.SEEK_END)
    if end and os.pread(descriptor, 1, end - 1) not in (b"\n", b""):
        line = b"\n" + line
    while line:
        line = line[os.write(descriptor, line) :]
