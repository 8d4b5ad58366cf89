"""Reads files of one JSON object a line while a run writes them, however long or damaged they are.

Nothing here raises for a file that is missing, torn or hostile. A line that is no JSON object is
passed over.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

Row = dict[str, Any]

TAIL_BYTES = 256 << 10  # of metrics.jsonl: some hundred steps
WHOLE_BYTES = 4 << 20  # a file up to this size is read whole
LONGEST_LINE = 1 << 20
FOLLOWED_BYTES = 16 << 20  # some ten thousand events


def parse_object(line: str | bytes) -> Row | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def whole_rows(text: str) -> list[Row]:
    """The last line counts once it is complete. Only a line feed ends a line: texts hold others."""
    lines = text[: text.rfind("\n") + 1].split("\n")
    return [row for line in lines if line and (row := parse_object(line)) is not None]


def tail_rows(path: Path, most_bytes: int = TAIL_BYTES) -> list[Row]:
    """The last rows of a file that may be long."""
    try:
        with path.open("rb") as file:
            return _tail(file, most_bytes)
    except OSError:
        return []


def spread_rows(path: Path, most: int, whole_bytes: int = WHOLE_BYTES) -> list[Row]:
    """All rows of a file up to ``whole_bytes``; of a longer one about ``most`` of them, evenly
    spread over the file, and the last ones. The cost does not grow with the file."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size <= whole_bytes:
                return whole_rows(_text(file.read()))
            end = size - min(TAIL_BYTES, whole_bytes)
            found: dict[int, Row] = {}
            for at in range(most):
                _add_row_at(file, at * end // most, end, found)
            return [*found.values(), *_tail(file, size - end)]
    except OSError:
        return []


class Follower:
    """Hands out each row of a growing file once.

    ``began_late``: the file was so long that its beginning was left out. ``restarted``: the last
    ``new_rows`` began anew, because the file had been replaced or cut.
    """

    def __init__(self, path: Path, at_most: int = FOLLOWED_BYTES) -> None:
        self._path = path
        self._at_most = at_most
        self._place = 0
        self._inode: int | None = None
        self.began_late = False
        self.restarted = False

    def new_rows(self) -> list[Row]:
        self.restarted = False
        try:
            with self._path.open("rb") as file:
                return self._read(file)
        except OSError:
            return []

    def _read(self, file: BinaryIO) -> list[Row]:
        found = os.fstat(file.fileno())
        if self._inode is not None and (found.st_ino != self._inode or found.st_size < self._place):
            self._place, self.began_late, self.restarted = 0, False, True
        self._inode = found.st_ino
        if found.st_size - self._place > self._at_most:
            file.seek(found.st_size - self._at_most)
            file.readline(LONGEST_LINE)
            self._place, self.began_late = file.tell(), True
        file.seek(self._place)
        data = file.read(found.st_size - self._place)
        whole = data[: data.rfind(b"\n") + 1]
        self._place += len(whole)
        return whole_rows(_text(whole))


def _tail(file: BinaryIO, most_bytes: int) -> list[Row]:
    size = os.fstat(file.fileno()).st_size
    file.seek(max(0, size - most_bytes))
    data = file.read(most_bytes)
    if size > most_bytes:
        data = data[data.find(b"\n") + 1 :]
    return whole_rows(_text(data))


def _add_row_at(file: BinaryIO, offset: int, end: int, found: dict[int, Row]) -> None:
    """The first whole line from ``offset`` on, if it begins before ``end``, under its place."""
    file.seek(offset)
    if offset and not file.readline(LONGEST_LINE).endswith(b"\n"):
        return
    place = file.tell()
    if place in found or place >= end:
        return
    line = file.readline(LONGEST_LINE)
    if line.endswith(b"\n") and (row := parse_object(_text(line))) is not None:
        found[place] = row


def _text(data: bytes) -> str:
    return data.decode("utf-8", errors="replace")
