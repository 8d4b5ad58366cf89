"""Weights through a shared directory: the slow transport every other one must agree with.

DIRECTORY/v000123/00000.bin     one file a bucket: its tensors, each at a multiple of 64 bytes

Which tensor lies where follows from the manifest, which Ray brings.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cluster.contracts.errors import Retryable, WeightMismatch
from cluster.contracts.records import TensorEntry, WeightManifest
from cluster.weights.manifest import CARRIERS, buckets_in
from cluster.weights.transports import PublisherOptions
from cluster.weights.update import Update

NAME = "disk"
_ALIGNMENT = 64  # bytes


class DiskPublisher:
    """Writes a version aside and renames it, so that a reader never sees half of one."""

    on_device = False

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory).absolute()

    def open(self, version: int) -> Update:
        return Update(version, NAME, _Files(self._directory, version))

    def retain(self, versions: Collection[int]) -> None:
        for old in self._directory.glob("v*"):
            if _version(old) not in versions:
                shutil.rmtree(old)

    def close(self) -> None:
        """Remove what was published; a checkpoint is what lasts."""
        for old in self._directory.glob("v*"):
            shutil.rmtree(old)


class _Files:
    """The carrier of one version."""

    def __init__(self, directory: Path, version: int) -> None:
        self._final = directory / f"v{version:06d}"
        # Hidden and unique: `retain` and readers look for `v*` only, and what a killed writer has
        # left never collides with a new one.
        self._aside = directory / f".writing-{uuid.uuid4().hex}"
        self._aside.mkdir(parents=True)
        self._written = 0

    def put(self, arrays: Mapping[str, Any]) -> None:
        with (self._aside / _file(self._written)).open("wb") as file:
            for array in arrays.values():
                file.write(np.asarray(array, order="C").reshape(-1).view(np.uint8).data)
                file.write(bytes(-file.tell() % _ALIGNMENT))
            # A disk that is full, or a server that is gone, may say so only now.
            file.flush()
            os.fsync(file.fileno())
        self._written += 1

    def finish(self) -> str:
        if self._final.exists():  # published before a crash, and now again
            shutil.rmtree(self._final)
        # A rename is atomic within a directory: a reader sees the whole version or none.
        os.replace(self._aside, self._final)
        return str(self._final)

    def discard(self) -> None:
        shutil.rmtree(self._aside, ignore_errors=True)


def _file(bucket: int) -> str:
    return f"{bucket:05d}.bin"


def _version(path: Path) -> int:
    return int(path.name.removeprefix("v"))


class DiskReceiver:
    in_any_process = True

    def fetch(self, manifest: WeightManifest, timeout_s: float) -> Iterator[dict[str, np.ndarray]]:
        """Read-only arrays mapped from the files. Retryable when the version is gone (newer ones
        were published meanwhile)."""
        directory = Path(manifest.locator)
        for number, entries in enumerate(buckets_in(manifest)):
            which = f"bucket {number + 1} of {manifest.buckets} of version {manifest.version}"
            try:
                yield _mapped(directory / _file(number), entries)
            # A version that is let go of while it is read looks torn; the folder tells which it
            # was.
            except (OSError, ValueError) as problem:
                if not directory.is_dir():
                    raise Retryable(f"{which} is no longer at {directory}") from None
                raise WeightMismatch(f"{which} at {directory} is torn: {problem}") from None


def _mapped(path: Path, entries: list[TensorEntry]) -> dict[str, np.ndarray]:
    """Raises ValueError for a file of another size, OSError for one that is not there."""
    starts, end = [], 0
    for entry in entries:
        starts.append(end)
        end += -(-entry.nbytes // _ALIGNMENT) * _ALIGNMENT
    # Mapped, not read: several workers of a machine share one copy in the page cache.
    held: np.ndarray = np.memmap(path, np.uint8, mode="r")
    if held.nbytes != end:
        raise ValueError(f"{path.name} has {held.nbytes} bytes, {end} were announced")
    return {
        entry.name: held[start : start + entry.nbytes]
        .view(CARRIERS[entry.dtype])
        .reshape(entry.shape)
        for start, entry in zip(starts, entries, strict=True)
    }


def publisher(options: PublisherOptions) -> DiskPublisher:
    return DiskPublisher(options.directory)


def receiver(device: str) -> DiskReceiver:
    return DiskReceiver()
