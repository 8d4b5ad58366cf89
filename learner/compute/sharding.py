"""Weights of which each process of a learner holds a part (FSDP2: `fully_shard`).

Zhao et al., "PyTorch FSDP" (2023), in its per-parameter form: a layer's weights are gathered when
it runs and given back after it; its gradients are summed and dealt out again at once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cluster.contracts.errors import UserError
from learner.compute.ranks import is_sharded

T = TypeVar("T")


class Gathered(nn.Module):
    """A sharded model. `root(function, ...)` is function(model, ...) with the parameters that
    belong to no layer (embeddings, head, last norm) gathered meanwhile.

    function has to return tensors in tuples or lists, which is where backward is noticed.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(self.model, *args)


def call(model: Any, function: Callable[..., T], *args: Any) -> T:
    """function(model, *args), for a model that may be `Gathered`."""
    if isinstance(model, Gathered):
        result: T = model(function, *args)
        return result
    return function(model, *args)


def bare(model: Any) -> Any:
    """The model itself of one that may be `Gathered`."""
    return model.model if isinstance(model, Gathered) else model


def shard_model(model: Any, trunk: nn.Module, layers: int) -> Gathered:
    """Shard `model` in place over all ranks, each of the trunk's `layers` decoder layers by itself.

    Raises UserError for a model without such a list of layers.
    """
    shard_layers(trunk, layers)
    root = Gathered(model)
    shard_whole(root)
    return root


def shard_layers(trunk: nn.Module, layers: int) -> None:
    """Shard each decoder layer of a trunk."""
    lists = (m for m in trunk.modules() if isinstance(m, nn.ModuleList) and len(m) == layers)
    found = next(lists, None)
    if found is None:
        raise UserError(
            f"{type(trunk).__name__} has no list of its {layers} layers, which could be sharded",
            where="learner.sharding",
            fix="set learner.sharding = 'none'",
        )
    for layer in found:
        shard_whole(layer)


def shard_whole(module: nn.Module) -> None:
    """Shard what of a module is not sharded yet. Gradients are summed over ranks, not averaged."""
    from torch.distributed.fsdp import fully_shard

    # Nothing here changes what a pass returned in place, which is what this warns of.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    # The root, too, gives its weights back after a forward pass: outside of passes, parameters
    # are then always the sharded ones.
    sharded: Any = fully_shard(module, reshard_after_forward=True)
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)


def summed_already(grad: Tensor) -> bool:
    """Whether `fully_shard` has added this gradient up over ranks when it dealt it out."""
    names = grad.device_mesh.mesh_dim_names if is_sharded(grad) else ("tensor",)  # type: ignore[attr-defined]
    return names != ("tensor",)


def by_mesh(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Tensors in groups that one operation can take together: whole ones, and sharded ones by the
    mesh over which they are."""
    found: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(getattr(tensor, "device_mesh", None), []).append(tensor)
    return list(found.values())


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing its memory; all of one that is not sharded."""
    if not is_sharded(tensor):
        return tensor
    part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def split_like(full: Tensor, example: Tensor) -> Tensor:
    """`full`, the same on every rank, sharded as `example` is (unchanged if that is not)."""
    if not is_sharded(example):
        return full
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(example, DTensor)
    mesh, where = example.device_mesh, example.placements
    return distribute_tensor(full.to(example.device), mesh, where, src_data_rank=None)


@torch.no_grad()
def load_full(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Fill a module, sharded or not, with a complete state dict.

    Raises RuntimeError where names or shapes are not the module's.
    """
    own = module.state_dict()
    if not any(is_sharded(tensor) for tensor in own.values()):
        module.load_state_dict(state)
        return
    if own.keys() != state.keys():
        raise RuntimeError(f"other tensors: {sorted(own.keys() ^ state.keys())}")
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise RuntimeError(f"{name}: {tuple(state[name].shape)} for {tuple(tensor.shape)}")
        local(tensor).copy_(local(split_like(state[name], tensor)))
