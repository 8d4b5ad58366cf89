"""The trained model as files, however many processes hold it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from learner.compute.ranks import Ranks, whole
from learner.compute.sharding import Gathered, bare
from learner.models.files import replace_directory
from learner.models.load import save_policy
from learner.models.lora import adapter_tensors, has_adapters, merged_tensors, save_adapter


def save_trained(policy: Any, tokenizer: Any, run_dir: Path, base: str, ranks: Ranks) -> Path:
    """Write run_dir/policy, a complete model directory, of what `policy_at` returned, and of an
    adapted one also run_dir/adapter; `base`: the path or hub id that this names. Every rank calls
    it; the first one writes, and none returns before the files are there."""
    directory = run_dir / "policy"
    tensors = whole_tensors(policy, ranks.first)
    if ranks.first:
        save_policy(bare(policy), tokenizer, directory, tensors)
    save_adapters(policy, run_dir, base, ranks)
    ranks.barrier()
    return directory


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
    together, of an adapted one merged. None where the model's own will do. Every rank has to ask.
    Tied parameters share memory."""
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
