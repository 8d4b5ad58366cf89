"""Folders that hold rows: snapshots of a preference store, and what ``datasets`` saved to disk.

A snapshot is a folder of Parquet files, one per split, and ``snapshot.json``, which lists them with
their hashes. It never changes once it is there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cluster.contracts.durable import FileDigest, digest_of
from cluster.contracts.errors import UserError

SNAPSHOT_SCHEMA = "accord.snapshot/1"
MANIFEST = "snapshot.json"
_SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")
_AGAIN = "write it again with `accord preferences snapshot`, or copy the whole folder"


def is_snapshot(folder: Path) -> bool:
    """Whether a folder is, or was to become, a snapshot."""
    if not os.path.isdir(folder):  # False also for names that no disk takes
        return False
    return (folder / MANIFEST).exists() or any(folder.glob("t*.parquet"))


def is_saved_dataset(folder: Path) -> bool:
    return os.path.isdir(folder) and any((folder / name).is_file() for name in _SAVED)


def snapshot_hash(files: Iterable[FileDigest]) -> str:
    """Hex SHA-256 of a snapshot's content: the same rows in the same splits give the same."""
    listed = sorted((file.name, file.nbytes, file.sha256) for file in files)
    return hashlib.sha256(json.dumps([SNAPSHOT_SCHEMA, listed]).encode()).hexdigest()


def read_snapshot(folder: Path) -> Mapping[str, Any]:
    """A snapshot's manifest, once every file has been found to be as it was written. Raises
    UserError that names the file which is not."""
    manifest = _manifest(folder)
    listed = [_digest(entry) for entry in manifest["files"]]
    for file in listed:
        path = folder / file.name
        if not path.is_file():
            raise _broken(folder, f"{file.name} is missing")
        found = digest_of(path, file.name)
        if found != file:
            what = "has another length" if found.nbytes != file.nbytes else "has changed"
            raise _broken(folder, f"{file.name} {what} since it was written")
    if manifest["sha256"] != snapshot_hash(listed):
        raise _broken(folder, f"{MANIFEST} has changed since it was written")
    return manifest


def snapshot_file(folder: Path, split: str) -> Path:
    """The Parquet file of a split. Raises UserError for a split it has not, and what
    ``read_snapshot`` raises."""
    splits = [Path(entry["name"]).stem for entry in read_snapshot(folder)["files"]]
    if split not in splits:
        raise UserError(
            f"the snapshot has no split {split!r}",
            where=str(folder),
            fix=f"set data.split to one of: {', '.join(splits)}",
        )
    return folder / f"{split}.parquet"


def saved_rows(folder: Path, split: str) -> Iterable[Any]:
    """Rows of what ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote."""
    import datasets  # here, because it takes a second to import and few need it

    try:
        data = datasets.load_from_disk(str(folder))
    except Exception as problem:  # it raises a dozen types for a damaged folder
        first = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
        raise UserError(
            f"is not a readable data set: {first}",
            where=str(folder),
            fix="save it again with save_to_disk",
        ) from None
    if not isinstance(data, dict):
        return data
    if split not in data:
        raise UserError(
            f"the data set has no split {split!r}",
            where=str(folder),
            fix=f"set data.split to one of: {', '.join(data)}",
        )
    return data[split]


def _manifest(folder: Path) -> Mapping[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["schema"] == SNAPSHOT_SCHEMA and isinstance(manifest["files"], list):
            return manifest
    except FileNotFoundError:
        raise _broken(folder, f"{MANIFEST} is missing: it was not written to the end") from None
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise _broken(folder, f"{MANIFEST} is no manifest of this version of Accord")


def _digest(entry: Mapping[str, Any]) -> FileDigest:
    return FileDigest(str(entry["name"]), int(entry["nbytes"]), str(entry["sha256"]))


def _broken(folder: Path, what: str) -> UserError:
    return UserError(f"is no whole snapshot: {what}", where=str(folder), fix=_AGAIN)
