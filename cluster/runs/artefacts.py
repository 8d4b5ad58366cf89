"""The hash of what a run learns from and of what it produces: a model's folder, a snapshot, a file.

A file is hashed once per process: its size, times of change and inode tell whether it is the same
still. So a policy that three stages of a pipeline start from is read once. A file that changed a
moment ago is hashed again, because a second change may not show in these times.
"""

from __future__ import annotations

import hashlib
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cluster.contracts.durable import digest_of

CARDS = ("model_card.md", "data_card.md")
"""They describe an artefact, and may be written anew: no part of its hash."""
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
