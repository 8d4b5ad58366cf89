"""The files of a parcel as one stream of bytes: found and read on one host, written on another."""

from __future__ import annotations

import hashlib
import os
import socket
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cluster.contracts.errors import UserError

Block = NDArray[np.uint8]
NOTHING = np.empty(0, np.uint8)


class Digest(Protocol):
    def update(self, data: Any, /) -> None: ...

    def hexdigest(self) -> str: ...


@dataclass(frozen=True, slots=True)
class PackedFile:
    """One file. name: relative to the packed path, with "/"; the rest tells the same file again."""

    name: str
    size: int
    inode: int
    modified_ns: int


Wanted = Callable[[Path], bool]
"""Whether a file is sent, or a folder looked into."""


def listed(root: Path, wanted: Wanted) -> tuple[PackedFile, ...]:
    """The `wanted` files at or below `root`, by name; bytecode that Python made is left out."""
    found = []
    for name, path in _walk(root, wanted):
        facts = path.stat()
        found.append(PackedFile(name, facts.st_size, facts.st_ino, facts.st_mtime_ns))
    if not found:
        raise UserError(
            "holds no file to send to the other hosts",
            where=str(root),
            fix="check the path; an empty directory cannot be meant",
        )
    return tuple(sorted(found, key=lambda file: file.name))


def _walk(root: Path, wanted: Wanted) -> Iterator[tuple[str, Path]]:
    """(relative name, path) of every file; the name of a single file is its own."""
    if _checked(root, ()):
        yield root.name, root
        return
    waiting: list[tuple[Path, tuple[str, ...]]] = [(root, (os.path.realpath(root),))]
    while waiting:
        folder, above = waiting.pop()
        try:
            entries = sorted(folder.iterdir())
        except OSError as problem:
            raise _unreadable(folder, problem) from None
        for entry in entries:
            if entry.name == "__pycache__" or not wanted(entry):
                continue
            if _checked(entry, above):
                yield entry.relative_to(root).as_posix(), entry
            else:
                waiting.append((entry, (*above, os.path.realpath(entry))))


def _checked(path: Path, above: Sequence[str]) -> bool:
    """True for a file, False for a directory; anything else is refused. Links are followed."""
    try:
        mode = path.stat().st_mode
    except OSError as problem:
        raise _unreadable(path, problem) from None
    if stat.S_ISREG(mode):
        return True
    if not stat.S_ISDIR(mode):
        raise UserError(
            "is neither a file nor a directory, so it cannot be sent to the other hosts",
            where=str(path),
            fix="move it elsewhere",
        )
    if os.path.realpath(path) in above:
        raise UserError(
            "is a link to a directory that contains it, so its content has no end",
            where=str(path),
            fix="remove the link",
        )
    return False


def _unreadable(path: Path, problem: OSError) -> UserError:
    broken = path.is_symlink() and not path.exists()
    return UserError(
        f"is a link to nothing ({os.readlink(path)})"
        if broken
        else f"cannot be read on {socket.gethostname()}: {problem.strerror or problem}",
        where=str(path),
        fix="remove or mend the link" if broken else "check the path and its permissions",
    )


def digest_of(name: str, files: Sequence[PackedFile]) -> Digest:
    """A digest that has taken the names, of the packed path too, and the sizes; the bytes of the
    files follow, in order."""
    digest = hashlib.sha256(f"{name}\0".encode())
    for file in files:
        digest.update(f"{file.size} {file.name}\0".encode())
    return digest


def read_blocks(
    root: Path, files: Sequence[PackedFile], digest: Digest, size: int
) -> Iterator[Block]:
    """The bytes of all files one after the other, in blocks of `size` bytes, the last one shorter.

    One block is in memory at a time, if the reader keeps none.
    """
    left = sum(file.size for file in files)
    block, filled = np.empty(min(size, left), np.uint8), 0
    for file in files:
        path = root if root.is_file() else root / file.name
        try:
            with path.open("rb", buffering=0) as source:
                unread = file.size
                while unread:
                    count = source.readinto(block.data[filled : filled + unread])
                    if not count:
                        raise OSError("it became shorter while it was read")
                    digest.update(block.data[filled : filled + count])
                    unread, filled = unread - count, filled + count
                    if filled == len(block):
                        left -= filled
                        yield block
                        block, filled = np.empty(min(size, left), np.uint8), 0
        except OSError as problem:
            raise _unreadable(path, problem) from None


def write_files(
    files: Sequence[PackedFile], base: Path, blocks: Iterable[Block], digest: Digest
) -> None:
    """Cut the stream of blocks into the files again."""
    source = iter(blocks)
    block = memoryview(b"")
    for file in files:
        path = base / file.name
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with path.open("xb", buffering=0) as target:
            unwritten = file.size
            while unwritten:
                if not block:
                    block = NOTHING.data  # frees the last one before the next is fetched
                    block = next(source, NOTHING).data
                    if not block:
                        return  # the digest tells
                count = target.write(block[:unwritten])
                digest.update(block[:count])
                block, unwritten = block[count:], unwritten - count
