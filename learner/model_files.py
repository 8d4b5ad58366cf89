"""The weight files of a model directory in Hugging Face's layout, written tensor by tensor: from
tensors in memory, or put together from the pieces that several processes wrote. No torch here.

    policy/model.safetensors                    or, where they are larger than one file may be:
    policy/model-00001-of-00002.safetensors …   and model.safetensors.index.json
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cluster.contracts.durable import FileDigest, digest_of, write_text
from cluster.contracts.errors import NotSaved
from learner.pieces import INDEX, Entry, FileTable, Index, read_index, row_blocks, write_tensors

POLICY, PARTS, STATE = "policy", "policy_parts", "state"
"""Folders of a checkpoint: the model; its pieces, while it is being written; all other tensors."""
LAYOUT = "layout.json"
FILE_BYTES = 5_000_000_000


@dataclass(frozen=True, slots=True)
class Layout:
    """Which file of a model holds which tensors: name in the file -> name in the learner."""

    files: Mapping[str, Mapping[str, str]]
    nbytes: int

    @staticmethod
    def of(sizes: Mapping[str, int], sources: Mapping[str, str], limit: int = FILE_BYTES) -> Layout:
        """sizes: bytes by name in the file, in the order to write them. limit: bytes of a file; a
        larger tensor gets a file of its own."""
        groups: list[list[str]] = []
        used = limit
        for name, nbytes in sizes.items():
            if used + nbytes > limit:
                groups.append([])
                used = 0
            groups[-1].append(name)
            used += nbytes
        count = len(groups)
        names = ["model.safetensors"] if count == 1 else []
        names = names or [f"model-{at + 1:05d}-of-{count:05d}.safetensors" for at in range(count)]
        files = {
            file: {name: sources[name] for name in group}
            for file, group in zip(names, groups, strict=True)
        }
        return Layout(files, sum(sizes.values()))

    def text(self) -> str:
        return json.dumps({"files": self.files, "nbytes": self.nbytes}, indent=1) + "\n"

    @staticmethod
    def read(path: Path) -> Layout:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Layout(found["files"], found["nbytes"])


def write_model(root: Path, layout: Layout, entry: Callable[[str, str], Entry]) -> list[FileDigest]:
    """Write the weight files of ``root``/policy. entry: (name in the file, name in the learner) ->
    the tensor. In memory at once: what ``Entry.blocks`` gives at once."""
    written = [
        write_tensors(
            root / POLICY / file, f"{POLICY}/{file}", [entry(*pair) for pair in names.items()]
        )
        for file, names in layout.files.items()
    ]
    if len(layout.files) > 1:
        places = {name: file for file, names in layout.files.items() for name in names}
        content = {
            "metadata": {"total_size": layout.nbytes},
            "weight_map": dict(sorted(places.items())),
        }
        path = root / POLICY / "model.safetensors.index.json"
        write_text(path, json.dumps(content, indent=2) + "\n")
        written.append(digest_of(path, f"{POLICY}/{path.name}"))
    return written


def complete(root: Path, files: Iterable[FileDigest]) -> tuple[FileDigest, ...]:
    """Finish a checkpoint of which every process has written its files below ``root``: look whether
    no piece is missing, and put the policy together. Returns the files it then has.

    Raises NotSaved where a process's file is missing or another than the index says, OSError where
    the disk does not take the policy.
    """
    written = {file.name: file for file in files}
    table = FileTable()
    try:
        if (root / STATE / INDEX).exists():
            _require_pieces(root / STATE, read_index(root / STATE), table)
        if not (root / PARTS).is_dir():
            return tuple(written[name] for name in sorted(written))
        index = read_index(root / PARTS)
        _require_pieces(root / PARTS, index, table)
        layout = Layout.read(root / PARTS / LAYOUT)
        made = write_model(root, layout, partial(_put_together, root / PARTS, index, table))
    except (ValueError, KeyError, TypeError) as problem:
        raise NotSaved(f"{root}: {type(problem).__name__}: {problem}") from problem
    shutil.rmtree(root / PARTS)
    kept = [file for name, file in written.items() if not name.startswith(f"{PARTS}/")]
    return tuple(sorted([*kept, *made], key=lambda file: file.name))


def _put_together(folder: Path, index: Index, table: FileTable, name: str, source: str) -> Entry:
    stored = index[source]
    blocks = partial(row_blocks, folder, source, stored, table)
    return Entry(name, stored.dtype, stored.shape, blocks)


def _require_pieces(folder: Path, index: Index, table: FileTable) -> None:
    """Raise NotSaved for a piece that no file holds as the index says."""
    for name, stored in index.items():
        for piece in stored.pieces:
            path = folder / piece.file
            held = table.of(path).get(name) if path.is_file() else None
            if held is None or held.shape != piece.sizes:
                raise NotSaved(f"{path} does not hold the piece of {name} that {INDEX} names")
