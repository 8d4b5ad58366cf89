"""The files of a run directory for download, and nothing outside it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

from starlette.responses import StreamingResponse

from cluster.runs.overview import ago, size

MOST_FILES = 2000
CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class FileRow:
    name: str  # within the run directory
    size: str
    changed: str


def listed(run: Path) -> tuple[list[FileRow], bool]:
    """By name, and whether there are more. Links are not followed and not shown: they may lead out
    of the run directory."""
    rows: list[FileRow] = []
    for path in _walk(run):
        if len(rows) == MOST_FILES:
            return rows, True
        try:
            found = path.lstat()
        except OSError:
            continue  # a run also deletes
        if stat.S_ISREG(found.st_mode):
            name = path.relative_to(run).as_posix()
            rows.append(FileRow(name, size(found.st_size), ago(found.st_mtime)))
    return rows, False


def _walk(run: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(run):
        folders.sort()
        yield from (Path(folder, name) for name in sorted(names))


def download(run: Path, name: str) -> StreamingResponse | None:
    """The file as an attachment, which no browser opens as a page of this server. None where the
    run has no such regular file, or a link stands in its path."""
    descriptor = _open_below(run, name)
    if descriptor is None:
        return None
    file = os.fdopen(descriptor, "rb")  # closed with the response, also where none of it is sent
    length = os.fstat(descriptor).st_size
    return StreamingResponse(
        _content(file, length),
        media_type="application/octet-stream",
        headers={
            "content-length": str(length),
            "content-disposition": f"attachment; filename*=UTF-8''{_quoted(Path(name).name)}",
        },
    )


def _open_below(run: Path, name: str) -> int | None:
    """A descriptor of the regular file, opened part by part so that no link is ever followed."""
    parts = name.split("/")
    if not name or any(part in ("", ".", "..") or "\0" in part for part in parts):
        return None
    try:
        here = os.open(run, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        for part in parts[:-1]:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=here)
            os.close(here)
            here = inner
        # O_NONBLOCK: to open a pipe must not wait for its writer.
        found = os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=here)
    except (OSError, ValueError):
        return None
    finally:
        os.close(here)
    if stat.S_ISREG(os.fstat(found).st_mode):
        return found
    os.close(found)
    return None


def _content(file: BinaryIO, length: int) -> Iterator[bytes]:
    """As much as was promised: a live file may have grown since."""
    with file:
        while length > 0 and (data := file.read(min(CHUNK, length))):
            length -= len(data)
            yield data


def _quoted(name: str) -> str:
    return quote(os.fsencode(name), safe="")
