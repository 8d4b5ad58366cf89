"""The hash of what a run learns from and of what it produces: a model's folder, a snapshot, a file.
A run's manifest has them: ``parent_hashes`` from its begin, ``outputs`` from its end.

A file is hashed once per process: its size, times of change and inode tell whether it is the same
still. So a policy that three stages of a pipeline start from is read once. A file that changed a
moment ago is hashed again, because a second change may not show in these times.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cluster.contracts.durable import digest_of

CARDS = ("model_card.md", "data_card.md")
"""They describe an artefact, and may be written anew: no part of its hash."""
MODELS = ("policy", "reward_model")  # folders of a run that hold what it trained
PRODUCED = (
    *MODELS,
    "adapter",
    "snapshot",
    "completions.jsonl",
    "best.jsonl",
    "sft.jsonl",
    "samples.jsonl",
    "evaluation.json",
)
"""What commands leave in their run directory for others to use."""
_READERS = 8  # files are hashed side by side
_SETTLED_NS = 2_000_000_000  # since the last change of a file whose hash is kept

_Stamp = tuple[str, int, int, int, int]
_known: dict[_Stamp, str] = {}


def artefact_hash(path: Path) -> str:
    """Hex SHA-256. Of a file: of its bytes. Of a folder: over the names and hashes of the files in
    it and below, in the order of names; hidden files and cards are left out.

    The content counts, not where it lies: what is copied or moved keeps its hash. Raises OSError
    where there is nothing, or it cannot be read.
    """
    if not path.is_dir():
        return _file_hash(path)
    files = sorted(file for file in path.rglob("*") if file.is_file() and _counts(file, path))
    with ThreadPoolExecutor(_READERS) as readers:
        hashes = list(readers.map(_file_hash, files))
    names = [file.relative_to(path).as_posix() for file in files]
    rows = [list(row) for row in zip(names, hashes, strict=True)]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def parent_hashes(
    parents: Mapping[str, str], revisions: Mapping[str, str]
) -> dict[str, str | None]:
    """Role -> hash of what the run grew from; of a hub model its name and revision.

    ``parents``: role -> path or hub id. ``revisions``: hub id -> commit. None for what cannot be
    known by its hash: what is not on this host, and a preference store, which grows (the manifest
    names the snapshot of it instead).
    """
    return {role: _parent_hash(origin, revisions) for role, origin in parents.items()}


def _parent_hash(origin: str, revisions: Mapping[str, str]) -> str | None:
    if origin in revisions:
        return f"{origin}@{revisions[origin]}"
    try:
        path = Path(origin).expanduser()
        return None if path.suffix == ".db" else artefact_hash(model_of(path))
    except (OSError, ValueError, RuntimeError):  # also names that no disk takes
        return None


def model_of(path: Path) -> Path:
    """Of a run directory, the model in it; else the path itself."""
    if (path / "manifest.json").is_file():
        return next((path / name for name in MODELS if (path / name).is_dir()), path)
    return path


def changed_roles(before: Mapping[str, str | None], now: Mapping[str, str | None]) -> list[str]:
    """Parents whose hash is known from before and now, and is another."""
    both = [role for role in now if before.get(role) is not None and now[role] is not None]
    return [role for role in both if before[role] != now[role]]


def output_hashes(run: Path) -> dict[str, str]:
    """Name -> hash of what the run has produced so far."""
    return {name: artefact_hash(run / name) for name in PRODUCED if (run / name).exists()}


def revisions_in(config: Mapping[str, Any]) -> dict[str, str]:
    """Hub id -> commit, of every model that a config names with a revision."""
    return dict(_revisions(config))


def _revisions(tree: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _revisions(value)
        elif key.endswith("path") and isinstance(value, str):
            revision = tree.get(f"{key.removesuffix('path')}revision")
            if isinstance(revision, str) and not Path(value).expanduser().exists():
                yield value, revision


def _counts(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return not hidden and file.name not in CARDS


def _file_hash(file: Path) -> str:
    status = file.stat()
    changed = (status.st_mtime_ns, status.st_ctime_ns)
    stamp = (str(file.resolve()), status.st_size, *changed, status.st_ino)
    if stamp in _known:
        return _known[stamp]
    found = digest_of(file, file.name).sha256
    if time.time_ns() - max(changed) > _SETTLED_NS:
        _known[stamp] = found
    return found
