"""The trained model as files, however many processes hold it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from learner.compute.ranks import Ranks, whole
from learner.compute.sharding import Gathered, bare
from learner.models.load import save_policy


def save_trained(policy: Any, tokenizer: Any, directory: Path, ranks: Ranks) -> Path:
    """`save_policy` of what `placed` returned. Every rank calls it; the first one writes, and none
    returns before the files are there."""
    tensors = whole_tensors(policy, ranks.first)
    if ranks.first:
        save_policy(bare(policy), tokenizer, directory, tensors)
    ranks.barrier()
    return directory


def whole_tensors(model: Any, keep: bool) -> dict[str, Tensor] | None:
    """The state dict of a sharded model, put together on the CPU of the ranks that `keep` it; None
    where the model's own is whole. Every rank has to ask. Tied parameters share memory."""
    if not isinstance(model, Gathered):
        return None
    found: dict[str, Tensor] = {}
    for name, tensor in model.model.state_dict().items():
        full = whole(tensor.detach())
        if keep:
            found[name] = full.to("cpu", copy=True).contiguous()
    first: dict[int, str] = {}
    for name, parameter in model.model.named_parameters(remove_duplicate=False):
        if name in found:
            found[name] = found[first.setdefault(id(parameter), name)]
    return found
