"""What a model directory's safetensors files hold, read from their headers alone.

A file that is cut off, a tensor that is missing or of another shape than the config says: found in
milliseconds, before a cluster is started, and told better than where the weights are loaded.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cluster.contracts.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
OLD = ("pytorch_model.bin", "pytorch_model.bin.index.json")
LONGEST_HEADER = 100 << 20
FIX = "copy the complete model directory again"

Shapes = Mapping[str, tuple[int, ...]]


def check_weight_files(
    kind: Any, directory: Path, config: Any, may_miss: tuple[str, ...] = ()
) -> None:
    """Raise UserError when the weights are not those of a ``kind`` model with ``config``.

    may_miss: prefixes of names that may be missing. A directory with weights in the old format of
    torch is not looked into.
    """
    if not holds_safetensors(directory):
        if any((directory / name).exists() for name in OLD):
            return
        raise UserError(f"holds no weights ({SINGLE} is missing)", where=str(directory), fix=FIX)
    found: dict[str, tuple[int, ...]] = {}
    for file in weight_files(directory):
        found |= tensor_shapes(file)
    _compare(_expected(kind, config), found, directory, may_miss)


def holds_safetensors(directory: Path) -> bool:
    return (directory / INDEX).exists() or (directory / SINGLE).exists()


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model, by its index where it has one."""
    index = directory / INDEX
    if not index.exists():
        return [directory / SINGLE]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise UserError(f"is damaged: {problem!r}", where=str(index), fix=FIX) from None
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(names)} weight files are missing (first: {missing[0]})",
            where=str(directory),
            fix=FIX,
        )
    return [directory / name for name in names]


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a safetensors file. Raises UserError when it is damaged or cut off.

    The format: 8 bytes with the length of a JSON header, the header, the tensors' bytes
    (https://github.com/huggingface/safetensors#format).
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size, LONGEST_HEADER):
                raise ValueError("its header is cut off")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, struct.error) as problem:
        raise UserError(f"is no safetensors file: {problem}", where=str(file), fix=FIX) from None
    whole = 8 + length + end
    if size < whole:
        raise UserError(f"is cut off: it has {size} of {whole} bytes", where=str(file), fix=FIX)
    return shapes


def _expected(kind: Any, config: Any) -> tuple[Shapes, Mapping[str, str]]:
    """Name -> shape of the model's parameters; name -> name of the one whose memory it shares."""
    with torch.device("meta"):
        model = kind.from_config(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
    return shapes, tied


def _compare(
    expected: tuple[Shapes, Mapping[str, str]],
    found: Shapes,
    directory: Path,
    may_miss: tuple[str, ...],
) -> None:
    shapes, tied = expected
    for name, shape in shapes.items():
        if name in found and found[name] != shape:
            raise UserError(
                f"the weights do not fit config.json: {name} has shape {list(found[name])}, the "
                f"config wants {list(shape)}",
                where=str(directory),
                fix="put back the config.json that belongs to the weights",
            )
    # Where the file holds other names, transformers renames them; it alone knows what is missing.
    if set(found) - set(shapes) - set(tied):
        return
    # Of tied tensors the file may hold any one.
    there = {tied[name] for name in found if name in tied}
    missing = sorted(set(shapes) - set(found) - set(tied) - there)
    missing = [name for name in missing if not name.startswith(may_miss)]
    if missing:
        raise UserError(
            f"the weights lack {len(missing)} tensors (first: {missing[0]}), which would start "
            "random",
            where=str(directory),
            fix=FIX,
        )
