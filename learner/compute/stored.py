"""Tensors that each process of a learner writes its own piece of, and that any number of processes
reads, sharded or not (the layout: `learner/pieces.py`).

torch.distributed.checkpoint plans both: who writes a tensor that several processes hold, where a
shard lies in the whole (any mesh), which piece of which file a process needs. Its plan is made
while the tensors are copied, between two steps, so that writing needs no word from another process
and goes on beside the steps. Its own files are not used: they hold pickles, which run code when
read.

Moments of torchao's 8-bit optimiser are stored as they are: codes, a scale for every block of 256
elements, the table of values. A reader whose blocks are the same gets the same bits. Other blocks
(a shard that does not begin at one) are quantised once more.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.contracts.durable import FileDigest, digest_of, write_text
from cluster.contracts.errors import NotSaved
from learner.compute.ranks import Ranks, is_sharded
from learner.compute.sharding import local
from learner.model_files import complete
from learner.pieces import (
    INDEX,
    Entry,
    Index,
    Piece,
    Stored,
    index_text,
    read_index,
    tensors_in,
    write_tensors,
)

_WORDS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_SCALE, _TABLE = "#scale", "#table"
_SETTINGS = ("lr", "initial_lr", "betas", "eps", "weight_decay")


def entry_of(name: str, tensor: Tensor) -> Entry:
    """A tensor in this host's memory, as it is written to a file."""
    flat = tensor.contiguous().reshape(-1)
    return Entry(
        name,
        _WORDS[tensor.dtype],
        tuple(tensor.shape),
        lambda: [flat.view(torch.uint8).numpy()] if flat.numel() else [],
    )


def nbytes_of(tensor: Tensor) -> int:
    """Of the whole tensor, in its own dtype."""
    return tensor.numel() * tensor.element_size()


@dataclass(frozen=True, slots=True, eq=False)
class Copied:
    """Copies, in this host's memory, of what one process writes. ``index``: of all tensors and the
    pieces of all processes."""

    rank: int
    index: Index
    parts: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    def write(self, root: Path, folder: str) -> list[FileDigest]:
        """Write this process's file of ``root``/``folder``, and, on the first one, the index; all
        is on disk when this returns."""
        place, written = root / folder, []
        place.mkdir(parents=True, exist_ok=True)
        if self.parts:
            name = _file_of(self.rank)
            entries = [entry_of(key, part) for key, part in self.parts.items()]
            written.append(write_tensors(place / name, f"{folder}/{name}", entries))
        if self.rank == 0:
            write_text(place / INDEX, index_text(self.index))
            written.append(digest_of(place / INDEX, f"{folder}/{INDEX}"))
        return written


@torch.no_grad()
def copied(tensors: Mapping[str, Tensor], ranks: Ranks, *, copy: bool = True) -> Copied:
    """Copy this process's share of `tensors`. Every rank gives the same names.

    copy: False where nothing changes before they are written; what is in this host's memory is then
    not copied.

    A sharded tensor is written by those who hold its shards, each of them once; one that all ranks
    hold by the rank that has least to write.
    """
    from torch.distributed.checkpoint import DefaultSavePlanner

    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors))
    coded = {name for name, tensor in tensors.items() if _is_coded(local(tensor))}
    told = ranks.gather((planner.create_local_plan(), coded))
    # Every rank makes the same plan of the same numbers, so that nobody has to hand it out.
    plans, _ = planner.create_global_plan([plan for plan, _ in told])
    pieces: dict[str, list[Piece]] = {name: [] for name in tensors}
    for rank, (plan, (_, theirs)) in enumerate(zip(plans, told, strict=True)):
        for item in plan.items:
            assert item.tensor_data is not None  # of tensors only
            chunk, name = item.tensor_data.chunk, item.index.fqn
            pieces[name].append(
                Piece(_file_of(rank), tuple(chunk.offsets), tuple(chunk.sizes), name in theirs)
            )
    index = {
        name: Stored(_WORDS[tensor.dtype], tuple(tensor.shape), tuple(pieces[name]))
        for name, tensor in tensors.items()
    }
    parts: dict[str, Tensor] = {}
    for item in plans[ranks.rank].items:
        parts |= _on_host(item.index.fqn, local(tensors[item.index.fqn]), copy)
    return Copied(ranks.rank, index, parts)


def _file_of(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _is_coded(part: Tensor) -> bool:
    return hasattr(part, "codes") and hasattr(part, "qmap")


def _on_host(name: str, part: Any, copy: bool) -> dict[str, Tensor]:
    found = {name: part}
    if _is_coded(part):
        found = {name: part.codes, name + _SCALE: part.scale, name + _TABLE: part.qmap}
    return {key: t.detach().to("cpu", copy=copy).contiguous() for key, t in found.items()}


def write_shares(
    ranks: Ranks, root: Path, write: Callable[[], Iterable[FileDigest]]
) -> tuple[FileDigest, ...]:
    """Have every rank write its share of a checkpoint below `root`, which all of them see, and the
    first one finish it; the files it then has, on every rank.

    Raises NotSaved, on all ranks, where a disk does not take what one of them writes.
    """

    def tried(work: Callable[[], Iterable[FileDigest]]) -> tuple[FileDigest, ...] | str:
        try:
            return tuple(work())
        except (OSError, NotSaved) as problem:
            return str(problem)

    def all_of(told: list[tuple[FileDigest, ...] | str]) -> list[FileDigest]:
        for said in told:
            if isinstance(said, str):
                raise NotSaved(f"{root}: {said}")
        return [file for files in told for file in files if isinstance(file, FileDigest)]

    files = all_of(ranks.gather(tried(write)))
    finish: Callable[[], Iterable[FileDigest]] = partial(complete, root, files)
    return tuple(all_of(ranks.gather(tried(finish if ranks.first else tuple))))


class StoredTensors:
    """Tensors of a folder, to be read slice by slice; used as a context, which closes the files."""

    def __init__(self, folder: Path, index: Index) -> None:
        self._folder, self.index = folder, index
        self._files: dict[str, Any] = {}
        self._open = contextlib.ExitStack()

    @staticmethod
    def indexed(folder: Path) -> StoredTensors:
        return StoredTensors(folder, read_index(folder))

    @staticmethod
    def whole(folder: Path, files: Iterable[Path]) -> StoredTensors:
        """Of ordinary safetensors files, such as a model's."""
        index = {
            name: Stored(
                held.dtype, held.shape, (Piece(file.name, (0,) * len(held.shape), held.shape),)
            )
            for file in files
            for name, held in tensors_in(file).items()
        }
        return StoredTensors(folder, index)

    def __enter__(self) -> StoredTensors:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.clear()
        self._open.close()

    @torch.no_grad()
    def fill(self, name: str, target: Tensor) -> None:
        """Fill `target`, or this rank's part of it, with the tensor `name`; no other part of it is
        read. Raises KeyError where there is none, ValueError for another shape or dtype."""
        stored = self.index[name]
        if tuple(target.shape) != stored.shape:
            raise ValueError(f"{name} has shape {list(stored.shape)}, not {list(target.shape)}")
        if _WORDS[target.dtype] != stored.dtype:
            raise ValueError(f"{name} is {stored.dtype}, not {_WORDS[target.dtype]}")
        part: Any = local(target)
        reads = _reads(name, stored, target)
        if sum(math.prod(read.lengths) for read in reads) != part.numel():
            raise ValueError(f"{name}: its pieces do not cover the whole tensor")
        if not _is_coded(part):
            self._fill_values(part, name, reads)
        elif not self._fill_codes(part, name, reads):
            values = torch.empty(part.shape, dtype=part.dtype)
            self._fill_values(values, name, reads)
            part.copy_(values.to(part.device))

    def _fill_values(self, values: Tensor, name: str, reads: Sequence[_Read]) -> None:
        for read in reads:
            file = self._file(read.piece.file)
            inside = _box(read.from_, read.lengths)
            if read.piece.coded:
                scale, table = (file.get_tensor(name + key) for key in (_SCALE, _TABLE))
                block = _decoded(file.get_tensor(name), scale, table)[inside]
            else:
                block = file.get_slice(name)[inside] if inside else file.get_tensor(name)
            values[_box(read.to, read.lengths)].copy_(block)

    def _fill_codes(self, part: Any, name: str, reads: Sequence[_Read]) -> bool:
        """Fill 8-bit moments with the bits that were stored; False, and nothing is changed, where
        the blocks of a piece are not blocks of this part."""
        size, row = part.block_size, math.prod(part.shape[1:])
        for read in reads:
            rows_only = read.lengths[1:] == read.piece.sizes[1:] == tuple(part.shape[1:])
            numbers = (read.from_[0] * row, read.to[0] * row, read.lengths[0] * row)
            if not (read.piece.coded and rows_only) or any(n % size for n in numbers):
                return False
            file = self._file(read.piece.file)
            stored_blocks = file.get_slice(name + _SCALE).get_shape()[0]
            same_table = torch.equal(file.get_tensor(name + _TABLE), part.qmap.cpu())
            if stored_blocks * size != math.prod(read.piece.sizes) or not same_table:
                return False
        for read in reads:
            file = self._file(read.piece.file)
            start, at, n = read.from_[0], read.to[0], read.lengths[0]
            part.codes[at : at + n].copy_(file.get_slice(name)[start : start + n])
            first, to, blocks = start * row // size, at * row // size, n * row // size
            scales = file.get_slice(name + _SCALE)[first : first + blocks]
            part.scale[to : to + blocks].copy_(scales)
        return True

    def _file(self, name: str) -> Any:
        if name not in self._files:
            from safetensors import safe_open

            opened = safe_open(self._folder / name, framework="pt")
            self._files[name] = self._open.enter_context(opened)
        return self._files[name]


@dataclass(frozen=True, slots=True)
class _Read:
    """`lengths` elements of a piece, from `from_` on; they go to `to` on in this rank's part."""

    piece: Piece
    from_: tuple[int, ...]
    to: tuple[int, ...]
    lengths: tuple[int, ...]


def _reads(name: str, stored: Stored, target: Any) -> list[_Read]:
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        TensorProperties,
        TensorStorageMetadata,
    )
    from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

    def chunk(offsets: Iterable[int], sizes: Iterable[int]) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))

    if is_sharded(target):
        wanted = target.__create_chunk_list__()
    else:
        wanted = [chunk([0] * target.ndim, target.shape)]
    known = TensorStorageMetadata(
        TensorProperties(dtype=target.dtype),
        torch.Size(stored.shape),
        [chunk(piece.offsets, piece.sizes) for piece in stored.pieces],
    )
    return [
        _Read(
            stored.pieces[item.storage_index.index or 0],
            tuple(item.storage_offsets),
            tuple(item.dest_offsets),
            tuple(item.lengths),
        )
        for item in create_read_items_for_chunk_list(name, known, wanted)
        if math.prod(item.lengths)
    ]


def _box(offsets: tuple[int, ...], lengths: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))


def _decoded(codes: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    values = table[codes.int()].view(scale.shape[0], -1) * scale.view(-1, 1)
    return values.view(codes.shape)


def moments_of(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Tensor]:
    """An optimiser's tensors as NAME/exp_avg and so on. names: of parameters, by their id."""
    return {
        f"{names[id(parameter)]}/{key}": value
        for group in optimizer.param_groups
        for parameter in group["params"]
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_moments(
    optimizer: torch.optim.Optimizer,
    stored: StoredTensors,
    names: Mapping[int, str],
    separator: str = "/",
) -> None:
    """Fill an optimiser that has not done a step with what `moments_of` gave, sharded or not, in 8
    bits or not. names: of parameters, by their id; separator: between them and exp_avg."""
    keys: dict[str, dict[str, str]] = {}
    for name in stored.index:
        parameter, _, key = name.rpartition(separator)
        keys.setdefault(parameter, {})[key] = name
    optimizer.state.clear()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            row: dict[str, Tensor] = {}
            for key, name in keys.get(names[id(parameter)], {}).items():
                if key == "step":
                    # Fused kernels read the count of steps where the parameter lies.
                    device = parameter.device if group.get("fused") else torch.device("cpu")
                    row[key] = torch.empty((), device=device)
                else:
                    row[key] = _empty_moment(optimizer, parameter, key)
                stored.fill(name, row[key])
            if row:
                optimizer.state[parameter] = row


def _empty_moment(optimizer: Any, parameter: Tensor, key: str) -> Tensor:
    # An optimiser that keeps some moments in 8 bits, or elsewhere, alone decides which.
    make = getattr(optimizer, "empty_moment", None)
    if make is None:
        return torch.zeros_like(parameter, memory_format=torch.preserve_format)
    moment: Tensor = make(parameter, key)
    return moment


def plain_groups(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str]
) -> list[dict[str, Any]]:
    """What the groups of an optimiser are set to, as JSON can hold it. names: of parameters, by
    their id."""
    return [
        {key: group[key] for key in _SETTINGS if key in group}
        | {"params": [names[id(parameter)] for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]


def restore_groups(
    optimizer: torch.optim.Optimizer,
    groups: Iterable[Mapping[str, Any]],
    names: Mapping[int, str],
) -> None:
    """By the names of parameters: another mesh may divide them into other groups. Raises KeyError
    for a parameter that was in none."""
    of_parameter = {str(name): group for group in groups for name in group["params"]}
    for own in optimizer.param_groups:
        group = of_parameter[names[id(own["params"][0])]]
        for key in _SETTINGS:
            if key in group:
                # JSON has no tuples; a resumed optimiser holds what a fresh one does.
                value = group[key]
                own[key] = tuple(value) if isinstance(value, list) else value
