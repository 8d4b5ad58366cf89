"""Filling a model that was made without weights from a folder of safetensors, part by part.

No process reads, or holds, more of a tensor than it keeps: of a sharded one its own part. The bits
are those of a load by transformers (`tests/unit/learner/models/test_fill.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from cluster.contracts.errors import UserError
from learner.compute.sharding import local, local_region
from learner.models.weight_files import FIX, tensor_shapes, weight_files

_REOPEN_BYTES = 256 << 20
"""A file is mapped into memory while it is open, and what was read of it stays there: after so
much it is opened anew."""


def read_tensor(directory: str | Path, name: str) -> Tensor:
    """One whole tensor of a model directory. Raises KeyError where it has none of that name."""
    with safe_open(_contents(Path(directory))[1][name], framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(name).clone()
        return tensor


@contextmanager
def without_weights() -> Iterator[None]:
    """Modules made meanwhile have parameters without memory (on torch's meta device). Buffers are
    made as usual: those that no file holds, such as rotary tables, are then right."""
    usual = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            # A tied parameter has been here before, and stays the same object.
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        usual(module, name, parameter)

    changed: Any = nn.Module
    changed.register_parameter = register
    try:
        yield
    finally:
        changed.register_parameter = usual


@torch.no_grad()
def fill(
    module: nn.Module,
    directory: str | Path,
    *,
    named: Callable[[str], str | None] = str,
    may_miss: tuple[str, ...] = (),
) -> None:
    """Fill the parameters and persistent buffers of a module, sharded or not, from the safetensors
    files of a model directory.

    Numbers are converted to the type of the module's tensors. A tied tensor is filled once. named:
    from a name of the module to the one in the files; None for what the files have nothing of (an
    adapter, say). may_miss: prefixes of names that the files may lack. Raises UserError for files
    that are damaged, for a tensor that is missing or has another shape.
    """
    shapes, files = _contents(Path(directory))
    found, missing = dict[str, Tensor](), list[str]()
    for names, tensor in _tensors(module):
        sources = [source for name in names if (source := named(name)) is not None]
        there = next((source for source in sources if source in files), None)
        if there is not None:
            _require_shape(there, shapes[there], tuple(tensor.shape), directory)
            found[there] = tensor
        elif sources:
            missing.append(sources[0])
    missing = sorted(name for name in missing if not name.startswith(may_miss))
    if missing:
        raise UserError(
            f"the weights lack {len(missing)} tensors (first: {missing[0]}), which would start "
            "random",
            where=str(directory),
            fix=FIX,
        )
    for name, part in _parts(files, {name: local_region(t) for name, t in found.items()}):
        local(found[name]).copy_(part)


@torch.no_grad()
def fill_from(
    module: nn.Module, state: Mapping[str, Tensor], *, named: Callable[[str], str | None] = str
) -> None:
    """As `fill`, from whole tensors in memory, which every rank has. Raises KeyError for one that
    is missing."""
    for names, tensor in _tensors(module):
        sources = [source for name in names if (source := named(name)) is not None]
        if sources:
            there = next((source for source in sources if source in state), sources[0])
            local(tensor).copy_(state[there][local_region(tensor)])


def _require_shape(
    name: str, found: tuple[int, ...], wanted: tuple[int, ...], directory: str | Path
) -> None:
    if found != wanted:
        raise UserError(
            f"the weights do not fit config.json: {name} has shape {list(found)}, the config "
            f"wants {list(wanted)}",
            where=str(directory),
            fix="put back the config.json that belongs to the weights",
        )


def _contents(directory: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, Path]]:
    """Name -> shape, name -> file of all tensors."""
    shapes, files = dict[str, tuple[int, ...]](), dict[str, Path]()
    for file in weight_files(directory):
        of_file = tensor_shapes(file)
        shapes |= of_file
        files |= dict.fromkeys(of_file, file)
    return shapes, files


def _tensors(module: nn.Module) -> Iterator[tuple[list[str], Tensor]]:
    """Each parameter and persistent buffer once, with all of its names."""
    kept = module.state_dict().keys()
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    buffers = ((n, b) for n, b in module.named_buffers(remove_duplicate=False) if n in kept)
    for name, tensor in (*module.named_parameters(remove_duplicate=False), *buffers):
        names.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    yield from ((names[key], tensor.detach()) for key, tensor in tensors.items())


Region = tuple[slice, ...]


def _parts(
    files: Mapping[str, Path], regions: Mapping[str, Region]
) -> Iterator[tuple[str, Tensor]]:
    """The wanted part of each tensor, file by file."""
    for file, names in groupby(
        sorted(regions, key=lambda n: (str(files[n]), n)), files.__getitem__
    ):
        waiting = list(names)
        while waiting:
            yield from _some_parts(file, waiting, regions)


def _some_parts(
    file: Path, waiting: list[str], regions: Mapping[str, Region]
) -> Iterator[tuple[str, Tensor]]:
    """The first of the tensors that wait, taken off the list, until enough has been mapped."""
    read = 0
    with safe_open(file, framework="pt") as opened:
        while waiting and read < _REOPEN_BYTES:
            name = waiting.pop(0)
            # An empty part, and a number without dimensions, have no slice.
            region = regions[name]
            part = opened.get_slice(name)[region] if region else opened.get_tensor(name)
            read += part.nbytes
            yield name, part


def names_in_files(model: Any, directory: str | Path) -> dict[str, str] | None:
    """Name in a model of transformers -> name in its files, where transformers changes names as it
    loads; None where it also merges, splits or transposes tensors (experts, for one)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    own, (given, _) = model.state_dict(), _contents(Path(directory))
    changes = get_model_conversion_mapping(model)
    renamings: Any = [change for change in changes if isinstance(change, WeightRenaming)]
    others: Any = [change for change in changes if not isinstance(change, WeightRenaming)]
    result = {}
    for name in given:
        target, merged = rename_source_key(name, renamings, others, model.base_model_prefix, own)
        if merged is not None:
            return None
        result[target] = name
    return result
