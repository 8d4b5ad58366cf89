"""The files of a learner whose run directory may lie on another host.

A learner that sees the run directory writes into it. Otherwise it writes into an outbox, a folder
of its own host, and the driver copies every file from there, chunk by chunk (`copy_files`).
"""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from cluster.contracts.durable import CHUNK, FileDigest, digest_of, write_chunks

ROLLOUTS = "rollouts"
_PREFIX = "accord-learner-"
_CHUNK_TIMEOUT_S = 120.0

Ask = Callable[[str, int], Future[Any]]
"""(name, offset) -> the file's bytes from there on, at most CHUNK of them."""


class Outbox:
    """A folder for what the driver will fetch; removed by `close`, or by the next outbox on this
    host where the process died before."""

    def __init__(self, parent: Path | None = None) -> None:
        parent = parent or Path(tempfile.gettempdir())
        _remove_abandoned(parent)
        fresh = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=parent))
        self._lock = (fresh / "lock").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        # Only now under a name that others look at: they remove what nobody holds the lock of.
        self.path = fresh.rename(parent / fresh.name.removeprefix("."))

    def rollouts(self) -> tuple[FileDigest, ...]:
        """The finished rollouts files that were not removed yet."""
        found = sorted((self.path / ROLLOUTS).glob("step-*.parquet"))
        return tuple(digest_of(path, f"{ROLLOUTS}/{path.name}") for path in found)

    def read(self, name: str, offset: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return np.fromfile(self.path / name, np.uint8, CHUNK, offset=offset)

    def remove(self, name: str) -> None:
        """A file or a folder that has been copied."""
        path = self.path / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def _remove_abandoned(parent: Path) -> None:
    for folder in parent.glob(f"{_PREFIX}*"):
        # The lock of a living process cannot be had; one of another user cannot even be opened.
        with suppress(OSError), (folder / "lock").open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)


def copy_files(ask: Ask, files: Sequence[FileDigest], target: Path, below: str = "") -> None:
    """Copy `files` below `target`, each hashed while it is written; two chunks are in memory at
    once. ``below``: the folder that their names are relative to at the sender.

    Raises OSError where the disk does not take a file, or it did not arrive as it was sent.
    """
    for file in files:
        name = f"{below}/{file.name}" if below else file.name
        write_chunks(target / file.name, _chunks(ask, name, file.nbytes), file)


def _chunks(ask: Ask, name: str, nbytes: int) -> Iterator[Any]:
    coming = ask(name, 0) if nbytes else None
    for offset in range(0, nbytes, CHUNK):
        if coming is None:
            return
        waited, coming = coming, None
        if offset + CHUNK < nbytes:
            coming = ask(name, offset + CHUNK)  # is on its way while the one before is written
        yield waited.result(_CHUNK_TIMEOUT_S)
