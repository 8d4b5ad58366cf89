"""Tensors of a checkpoint on disk, of which each process of a learner writes its own piece.

No torch here: the driver puts a model's files together, and loads no torch for it.

    index.json             name -> dtype, shape, and where in the whole tensor each piece lies
    rank-00000.safetensors  the pieces of one process, under the tensors' names

torch.distributed.checkpoint has writers of its own, which are not used: `FileSystemWriter` writes
pickles, and `HuggingFaceStorageWriter` no index, so that a lost file would make a tensor smaller
without a word.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster.contracts.durable import CHUNK, FileDigest

INDEX = "index.json"
_ALIGNMENT = 8  # bytes; of the first tensor in a file, as the safetensors format asks
_LONGEST_HEADER = 100 << 20
_ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2} | {
    name: 1 for name in ("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2")
}

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A block of a tensor in ``file`` (relative to the index's folder): ``sizes`` from ``offsets``
    of the whole on. ``coded``: stored as 8-bit codes, beside their scales and their table."""

    file: str
    offsets: Shape
    sizes: Shape
    coded: bool = False


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of `shape`. ``dtype``: the word of the safetensors format for it."""

    dtype: str
    shape: Shape
    pieces: tuple[Piece, ...]

    def require_whole(self, name: str) -> None:
        """Raise ValueError where the pieces are not as large as the tensor."""
        found = sum(math.prod(piece.sizes) for piece in self.pieces)
        if found != math.prod(self.shape):
            raise ValueError(f"{name}: pieces of {found} elements for {math.prod(self.shape)}")


Index = Mapping[str, Stored]


def index_text(index: Index) -> str:
    rows = {
        name: {
            "dtype": stored.dtype,
            "shape": stored.shape,
            "pieces": [
                {"file": p.file, "offsets": p.offsets, "sizes": p.sizes, "coded": p.coded}
                for p in stored.pieces
            ],
        }
        for name, stored in index.items()
    }
    return json.dumps(rows, indent=1) + "\n"


def read_index(folder: Path) -> dict[str, Stored]:
    """Raises OSError, ValueError, KeyError or TypeError for an index that is damaged."""
    rows = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    index = {}
    for name, row in rows.items():
        pieces = tuple(
            Piece(_plain_name(p["file"]), tuple(p["offsets"]), tuple(p["sizes"]), p["coded"])
            for p in row["pieces"]
        )
        index[name] = Stored(row["dtype"], tuple(row["shape"]), pieces)
        index[name].require_whole(name)
    return index


def _plain_name(name: str) -> str:
    if name != Path(name).name:
        raise ValueError(f"{name!r} is not the name of a file beside the index")
    return name


@dataclass(frozen=True, slots=True)
class Held:
    """Where the bytes of a tensor lie in a safetensors file."""

    dtype: str
    shape: Shape
    begin: int


def tensors_in(file: Path) -> dict[str, Held]:
    """By name. Raises ValueError for a file that is cut off or is none of safetensors.

    The format: 8 bytes with the length of a JSON header, the header, the tensors' bytes
    (https://github.com/huggingface/safetensors#format).
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size + 1
        if length > min(size, _LONGEST_HEADER):
            raise ValueError(f"{file}: its header is cut off")
        text = stream.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        held = {
            name: Held(row["dtype"], tuple(row["shape"]), 8 + length + row["data_offsets"][0])
            for name, row in header.items()
        }
        whole = 8 + length + max((row["data_offsets"][1] for row in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as problem:
        raise ValueError(f"{file} is no safetensors file: {problem!r}") from None
    if size < whole:
        raise ValueError(f"{file} is cut off: it has {size} of {whole} bytes")
    return held


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to be written. ``blocks``: its bytes, in order."""

    name: str
    dtype: str
    shape: Shape
    blocks: Callable[[], Iterable[Any]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


def write_tensors(path: Path, name: str, entries: Sequence[Entry]) -> FileDigest:
    """Write a safetensors file and hash it on the way; it is on disk when this returns.

    Other threads run meanwhile and no tensor is copied, both unlike safetensors' own `save_file`.
    Raises ValueError where a tensor's blocks are not as long as its shape says.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        offsets = [end, end := end + entry.nbytes]
        shape = list(entry.shape)
        header[entry.name] = {"dtype": entry.dtype, "shape": shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    hasher, nbytes = hashlib.sha256(), 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb", buffering=0) as file:
        for part in _whole_file(text, entries):
            for block in _cut(part):
                hasher.update(block)
                _write_all(file, block)
                nbytes += len(block)
        os.fsync(file.fileno())
    if nbytes != 8 + len(text) + end:
        raise ValueError(f"{path}: {nbytes} bytes for {8 + len(text) + end}")
    return FileDigest(name, nbytes, hasher.hexdigest())


def _whole_file(header: bytes, entries: Sequence[Entry]) -> Iterator[Any]:
    yield struct.pack("<Q", len(header)) + header
    for entry in entries:
        yield from entry.blocks()


def _cut(part: Any) -> Iterator[memoryview]:
    if not memoryview(part).nbytes:
        return  # a view of nothing cannot be cast
    view = memoryview(part).cast("B")
    for start in range(0, len(view), CHUNK):
        yield view[start : start + CHUNK]


def _write_all(file: Any, block: memoryview) -> None:
    while len(block):
        block = block[file.write(block) :]


def row_blocks(folder: Path, name: str, stored: Stored, files: FileTable) -> Iterator[Any]:
    """The bytes of a whole tensor, put together from its pieces, at most CHUNK (or one row) of
    them in memory."""
    item = np.dtype(f"V{_ITEM_BYTES[stored.dtype]}")
    # A tensor without dimensions is a row of one element.
    shape = stored.shape or (1,)
    maps = []
    for piece in stored.pieces:
        if not math.prod(piece.sizes):
            continue
        held = files.of(folder / piece.file)[name]
        sizes = piece.sizes or (1,)
        if (held.dtype, held.shape) != (stored.dtype, piece.sizes):
            raise ValueError(f"{piece.file}: {name} is {held.dtype} {list(held.shape)}")
        block = np.memmap(folder / piece.file, item, "r", held.begin, sizes)
        maps.append((piece.offsets or (0,), sizes, block))
    row_bytes = math.prod(shape[1:]) * item.itemsize
    step = max(1, CHUNK // max(1, row_bytes))
    for first in range(0, shape[0], step):
        last = min(first + step, shape[0])
        rows = np.empty((last - first, *shape[1:]), item)
        for offsets, sizes, block in maps:
            begin, end = max(first, offsets[0]), min(last, offsets[0] + sizes[0])
            if begin < end:
                beside = tuple(slice(o, o + n) for o, n in zip(offsets[1:], sizes[1:], strict=True))
                part = block[begin - offsets[0] : end - offsets[0]]
                rows[(slice(begin - first, end - first), *beside)] = part
        yield rows.reshape(-1).view(np.uint8)


class FileTable:
    """The headers of safetensors files, each read once."""

    def __init__(self) -> None:
        self._known: dict[Path, dict[str, Held]] = {}

    def of(self, file: Path) -> dict[str, Held]:
        if file not in self._known:
            self._known[file] = tensors_in(file)
        return self._known[file]
