"""Trained groups to Parquet, beside the training: a slow disk must not slow a step."""

from __future__ import annotations

import errno
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.contracts.durable import sync
from cluster.contracts.errors import Fatal

_DEADLINE_S = 120.0
_FULL = (errno.ENOSPC, errno.EDQUOT)


class RolloutWriter:
    """Writes DIRECTORY/step-000123.parquet in one thread, one file at a time.

    An error of a write is raised by the next call, as Fatal: rollouts a user asked for must not go
    missing quietly. A full disk is none: it may have room again, and what was not written until
    then is told (`take_not_written`).
    """

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        for left in self._directory.glob(".step-*"):  # by a learner that was killed
            left.unlink(missing_ok=True)
        # One thread: files come to be in the order of steps, so that a gap is a fault, not a delay.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollout-writer")
        self._pending: Future[None] | None = None
        self._not_written: list[str] = []

    def take_not_written(self) -> tuple[str, ...]:
        """What did not fit on the disk since this was last asked, one line per file."""
        taken, self._not_written = tuple(self._not_written), []
        return taken

    def write(self, step: int, table: pa.Table) -> None:
        """Begin to write; waits for the file before, at most two minutes."""
        self.flush()
        path = self._directory / f"step-{step:06d}.parquet"
        self._pending = self._thread.submit(_write, path, table)

    def flush(self) -> None:
        """Wait until everything is on disk. Raises Fatal if it cannot be."""
        # Taken out first: an error is raised once, and does not come again with every later call.
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result(timeout=_DEADLINE_S)
        except TimeoutError:
            raise Fatal(
                f"rollouts were not written to {self._directory} within {_DEADLINE_S:.0f} s"
            ) from None
        except (OSError, pa.ArrowException) as problem:
            if isinstance(problem, OSError) and problem.errno in _FULL:
                self._not_written.append(f"{problem.filename or self._directory}: {problem}")
                return
            raise Fatal(f"cannot write rollouts to {self._directory}: {problem}") from problem

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)


def _write(path: Path, table: pa.Table) -> None:
    # Renamed when it is whole. The process's number keeps a resumed run from writing into what a
    # killed one has left.
    aside = path.with_name(f".{path.name}.writing-{os.getpid()}")
    try:
        pq.write_table(table, aside, compression="zstd", write_page_checksum=True)
        sync(aside)  # before it gets its name: a name must never stand for half a file
        os.replace(aside, path)
        sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)
