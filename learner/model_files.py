"""The weight files of a model directory in Hugging Face's layout, written tensor by tensor: from
tensors in memory, or put together from the pieces that several processes wrote. No torch here.

    policy/model.safetensors                    or, where they are larger than one file may be:
    policy/model-00001-of-00002.safetensors …   and model.safetensors.index.json
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from cluster.contracts.durable import FileDigest, digest_of, write_text
from cluster.contracts.errors import NotSaved
from learner.pieces import INDEX, Entry, FileTable, Index, read_index, row_blocks, write_tensors

POLICY, PARTS, STATE = "policy", "policy_parts", "state"
"""Folders of a checkpoint: the model; its pieces, while it is being written; all other tensors."""
ADAPTER, ADAPTER_FILE = "adapter", "adapter_model.safetensors"
"""Under LoRA, in place of the model: its adapter in peft's layout."""
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


def write_model(
    folder: Path, layout: Layout, entry: Callable[[str, str], Entry]
) -> list[FileDigest]:
    """Write the weight files of a model below ``folder``. entry: (name in the file, name in the
    learner) -> the tensor. In memory at once: what ``Entry.blocks`` gives at once."""
    written = [
        write_tensors(folder / file, file, [entry(*pair) for pair in names.items()])
        for file, names in layout.files.items()
    ]
    if len(layout.files) > 1:
        places = {name: file for file, names in layout.files.items() for name in names}
        content = {
            "metadata": {"total_size": layout.nbytes},
            "weight_map": dict(sorted(places.items())),
        }
        path = folder / "model.safetensors.index.json"
        write_text(path, json.dumps(content, indent=2) + "\n")
        written.append(digest_of(path, path.name))
    return written


def put_together(parts: Path, folder: Path) -> list[FileDigest]:
    """Write the weight files of a model below ``folder`` from what all processes wrote below
    ``parts``: pieces, their index, and the layout. Raises NotSaved where a piece is missing,
    OSError where the disk does not take a file."""
    table = FileTable()
    index = _read_complete(parts, table)
    try:
        layout = Layout.read(parts / LAYOUT)
        return write_model(folder, layout, partial(_from_pieces, parts, index, table))
    except (ValueError, KeyError, TypeError) as problem:
        raise NotSaved(f"{parts}: {type(problem).__name__}: {problem}") from problem


def complete(root: Path, files: Iterable[FileDigest]) -> tuple[FileDigest, ...]:
    """Finish a checkpoint of which every process has written its files below ``root``: look whether
    no piece is missing, and put the policy together. Returns the files it then has.

    Raises NotSaved where a process's file is missing or another than the index says, OSError where
    the disk does not take the policy.
    """
    written = [file for file in files if not file.name.startswith(f"{PARTS}/")]
    if (root / STATE / INDEX).exists():
        _read_complete(root / STATE, FileTable())
    if (root / PARTS).is_dir():
        made = put_together(root / PARTS, root / POLICY)
        written += [below(POLICY, file) for file in made]
        shutil.rmtree(root / PARTS)
    return tuple(sorted(written, key=lambda file: file.name))


def below(folder: str, file: FileDigest) -> FileDigest:
    return replace(file, name=f"{folder}/{file.name}")


def _from_pieces(folder: Path, index: Index, table: FileTable, name: str, source: str) -> Entry:
    stored = index[source]
    blocks = partial(row_blocks, folder, source, stored, table)
    return Entry(name, stored.dtype, stored.shape, blocks)


def _read_complete(folder: Path, table: FileTable) -> Index:
    """The index of a folder. Raises NotSaved for a piece that no file holds as it says."""
    try:
        index = read_index(folder)
        for name, stored in index.items():
            for piece in stored.pieces:
                path = folder / piece.file
                held = table.of(path).get(name) if path.is_file() else None
                if held is None or held.shape != piece.sizes:
                    raise NotSaved(f"{path} does not hold the piece of {name} that {INDEX} names")
    except (ValueError, KeyError, TypeError) as problem:
        raise NotSaved(f"{folder}: {type(problem).__name__}: {problem}") from problem
    return index
