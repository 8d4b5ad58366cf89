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

    def add(self, line: str) -> bool:
        """Returns whether everything is in the file now."""
        self.waiting.append(line)
        return self.flush()

    def flush(self) -> bool:
        """Write what waits. Returns whether everything is in the file now."""
        if not self.waiting:
            return True
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
            return False
        return True


def _append(descriptor: int, line: bytes) -> None:
    """Add a line; after a new line where a killed process or a full disk has left half of one,
    which must not become part of it."""
    end = os.lseek(descriptor, 0, os.SEEK_END)
    if end and os.pread(descriptor, 1, end - 1) not in (b"\n", b""):
        line = b"\n" + line
    write_whole(descriptor, line)


def write_whole(descriptor: int, content: bytes) -> None:
    """A disk that becomes full takes the first part, and raises OSError for the rest."""
    while content:
        content = content[os.write(descriptor, content) :]
