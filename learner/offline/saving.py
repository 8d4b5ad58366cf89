"""The trained model as files, however many processes hold it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from learner.compute.ranks import Ranks, whole
from learner.compute.sharding import Gathered, bare
from learner.compute.stored import copied
from learner.model_files import LAYOUT, put_together
from learner.models.export import layout_of, stored_tensors, write_small_files
from learner.models.files import replace_directory
from learner.models.load import save_policy
from learner.models.lora import adapter_tensors, has_adapters, merged_tensors, save_adapter


def save_trained(policy: Any, tokenizer: Any, run_dir: Path, base: str, ranks: Ranks) -> Path:
    """Write run_dir/policy, a complete model directory, of what `policy_at` returned, and of an
    adapted one also run_dir/adapter; `base`: the path or hub id that this names. Every rank calls
    it; the first one writes, and none returns before the files are there."""
    directory, model = run_dir / "policy", bare(policy)
    with parts_on_disk(policy, directory, ranks) as parts:
        if parts is None:
            tensors = whole_tensors(policy, ranks.first)
            if ranks.first:
                save_policy(model, tokenizer, directory, tensors)
        elif ranks.first:
            pieces = parts

            def write(folder: Path) -> None:
                write_small_files(model, tokenizer, folder)
                put_together(pieces, folder)

            replace_directory(directory, write)
    save_adapters(policy, run_dir, base, ranks)
    ranks.barrier()
    return directory


@contextmanager
def parts_on_disk(model: Any, directory: Path, ranks: Ranks) -> Iterator[Path | None]:
    """A folder beside `directory` into which each rank has written its part of a sharded model, for
    the first one to put together tensor by tensor (`put_together`). Afterwards the folder is gone,
    and all ranks have met. Every rank has to call it; all of them see `directory`.

    None for a model that is not sharded, or whose files hold other tensors than it does (an adapted
    one, and see `layout_of`): that is gathered by `whole_tensors`.
    """
    own, parts = bare(model), directory.with_name(f".{directory.name}.parts")
    sharded = isinstance(model, Gathered) and not has_adapters(own)
    layout = layout_of(own) if sharded else None
    try:
        if layout is not None:
            if ranks.first:
                shutil.rmtree(parts, ignore_errors=True)
            ranks.barrier()
            copied(stored_tensors(own), ranks, copy=False).write(parts.parent, parts.name)
            if ranks.first:
                (parts / LAYOUT).write_text(layout.text(), encoding="utf-8")
            ranks.barrier()
        yield None if layout is None else parts
    finally:
        if ranks.first:
            shutil.rmtree(parts, ignore_errors=True)
    ranks.barrier()


def save_adapters(model: Any, run_dir: Path, base: str, ranks: Ranks) -> None:
    """run_dir/adapter in peft's layout, of a model that has one. Every rank has to call it."""
    model = bare(model)
    if not has_adapters(model):
        return
    tensors = {name: whole(t.detach()).cpu() for name, t in adapter_tensors(model).items()}
    if ranks.first:
        write = partial(save_adapter, model, base=base, tensors=tensors)
        replace_directory(run_dir / "adapter", write)


def whole_tensors(model: Any, keep: bool) -> dict[str, Tensor] | None:
    """The state dict to be saved, on the CPU of the ranks that `keep` it: of a sharded model put
    together, of an adapted one merged; all of it is in one host's memory. None where the model's
    own will do. Every rank has to ask. Tied parameters share memory."""
    inner = bare(model)
    if has_adapters(inner):
        merged = ((name, tensor.cpu()) for name, tensor in merged_tensors(inner))
        return {name: tensor.clone().contiguous() for name, tensor in merged if keep}
    if not isinstance(model, Gathered):
        return None
    found: dict[str, Tensor] = {}
    for name, tensor in inner.state_dict().items():
        full = whole(tensor.detach())
        if keep:
            found[name] = full.to("cpu", copy=True).contiguous()
    first: dict[int, str] = {}
    for name, parameter in inner.named_parameters(remove_duplicate=False):
        if name in found:
            found[name] = found[first.setdefault(id(parameter), name)]
    return found
