"""Weights through a shared directory: the slow transport every other one must agree with.

DIRECTORY/v000123/names.json    {tensor name: file name}
DIRECTORY/v000123/00000.npy     one file a tensor, in the order published
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from cluster.contracts.errors import Retryable, WeightMismatch
from cluster.contracts.records import Canary, WeightManifest
from cluster.weights.manifest import build_manifest
from cluster.weights.transports import PublisherOptions

NAME = "disk"
INDEX = "names.json"


class DiskPublisher:
    """Writes a version aside and renames it, so that a reader never sees half of one."""

    on_device = False

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory).absolute()

    def publish(
        self,
        arrays: Mapping[str, np.ndarray],
        dtypes: Mapping[str, str],
        version: int,
        canary: Canary,
    ) -> WeightManifest:
        self._directory.mkdir(parents=True, exist_ok=True)
        final = self._directory / f"v{version:06d}"
        # Hidden and unique: `retain` and readers look for `v*` only, and what a killed writer has
        # left never collides with a new one.
        aside = self._directory / f".writing-{uuid.uuid4().hex}"
        aside.mkdir()
        try:
            names = {}
            for index, (name, array) in enumerate(arrays.items()):
                names[name] = f"{index:05d}.npy"
                np.save(aside / names[name], np.asarray(array, order="C"), allow_pickle=False)
            (aside / INDEX).write_text(json.dumps(names), encoding="utf-8")
            if final.exists():  # published before a crash, and now again
                shutil.rmtree(final)
            # A rename is atomic within a directory: a reader sees the whole version or none.
            os.replace(aside, final)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return build_manifest(arrays, dtypes, version, canary, NAME, str(final))

    def retain(self, versions: Collection[int]) -> None:
        for old in self._directory.glob("v*"):
            if _version(old) not in versions:
                shutil.rmtree(old)

    def close(self) -> None:
        """Remove what was published; a checkpoint is what lasts."""
        for old in self._directory.glob("v*"):
            shutil.rmtree(old)


def _version(path: Path) -> int:
    return int(path.name.removeprefix("v"))


class DiskReceiver:
    def fetch(self, manifest: WeightManifest) -> dict[str, np.ndarray]:
        """Read-only arrays mapped from the files.

        Raises Retryable when the version is gone (two newer ones were published meanwhile),
        WeightMismatch when its files are not whole.
        """
        directory = Path(manifest.locator)
        if not directory.is_dir():
            raise Retryable(f"weights of version {manifest.version} are no longer at {directory}")
        try:
            names = json.loads((directory / INDEX).read_text(encoding="utf-8"))
            return {
                # Mapped, not read: several workers of a machine share one copy in the page cache.
                name: np.load(directory / file, mmap_mode="r", allow_pickle=False)
                for name, file in names.items()
            }
        # A version that is let go of while it is read looks torn; the folder tells which it was.
        except (OSError, ValueError, EOFError) as problem:
            if not directory.is_dir():
                raise Retryable(
                    f"weights of version {manifest.version} were removed while being read"
                ) from None
            raise WeightMismatch(
                f"weights of version {manifest.version} at {directory} are torn: {problem}"
            ) from None


def publisher(options: PublisherOptions) -> DiskPublisher:
    return DiskPublisher(options.directory)


def receiver(device: str) -> DiskReceiver:
    return DiskReceiver()
