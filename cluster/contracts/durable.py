"""Files that are whole after a power failure, and the record by which a copy of one is checked."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHUNK = 16 << 20  # bytes of a file held in memory at once


@dataclass(frozen=True, slots=True)
class FileDigest:
    """``name``: relative to its folder, with forward slashes. The others are of its content."""

    name: str
    nbytes: int
    sha256: str


def write_text(path: Path, text: str) -> None:
    """Temp-then-rename, synced, so that a reader sees the old file or the new one."""
    staging = path.with_name(f".{path.name}.tmp")
    with staging.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(staging, path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    return json.dumps(value, indent=2, default=str, ensure_ascii=False) + "\n"


def write_chunks(path: Path, chunks: Iterable[Any], expected: FileDigest) -> None:
    """Write the bytes of ``chunks``, hash them on the way, and put the file in place only if they
    are what was ``expected``. Raises OSError where they are not, or the disk does not take them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    hasher, nbytes = hashlib.sha256(), 0
    try:
        with staging.open("wb") as file:
            for chunk in chunks:
                hasher.update(chunk)
                nbytes += file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        if (nbytes, hasher.hexdigest()) != (expected.nbytes, expected.sha256):
            raise OSError(f"{expected.name} did not arrive as it was sent")
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)


def read_chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def digest_of(path: Path, name: str) -> FileDigest:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return FileDigest(name, file.tell(), sha256)


def digests_below(folder: Path) -> tuple[FileDigest, ...]:
    """Of every file below ``folder``, ordered by name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return tuple(digest_of(path, path.relative_to(folder).as_posix()) for path in files)


def sync_tree(root: Path) -> None:
    """What was written below ``root``, names included, is on disk when this returns."""
    for path in [*root.rglob("*"), root]:
        sync(path)


def sync(path: Path) -> None:
    """A file's content, or a directory's names, are on disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
