"""Weights of which each process of a learner holds a part (FSDP2: `fully_shard`).

Zhao et al., "PyTorch FSDP" (2023), in its per-parameter form: a layer's weights are gathered when
it runs and given back after it; its gradients are summed and dealt out again at once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """How `fully_shard` deals a model out.

    on: False leaves modules as they are. mesh: the processes that get a part each; None: all.
    bfloat16: weights are gathered in bfloat16 and layers compute in it; parts, gradients and
    moments stay float32, and gradients are summed in float32. reshard, prefetch, on_host: see
    `reshard_after_forward`, `prefetch_layers` and `offload` of `ComputeConfig`.
    """

    on: bool = True
    mesh: Any = None
    bfloat16: bool = False
    reshard: bool = True
    prefetch: int = 1
    on_host: bool = False

    def apply(self, module: nn.Module, *, exact: bool = False) -> None:
        """Shard what of a module is not sharded yet. Gradients are summed over ranks, not averaged.

        exact: compute in float32 whatever `bfloat16` says.
        """
        if not self.on:
            return
        from torch.distributed.fsdp import (
            CPUOffloadPolicy,
            MixedPrecisionPolicy,
            OffloadPolicy,
            fully_shard,
        )

        # Nothing here changes what a pass returned in place, which is what this warns of.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        mixed = MixedPrecisionPolicy()
        if self.bfloat16 and not exact:
            mixed = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        offload = OffloadPolicy()
        if self.on_host:
            offload = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
        # The root, too, gives its weights back after a forward pass: outside of passes, parameters
        # are then always the sharded ones.
        sharded: Any = fully_shard(
            module,
            mesh=self.mesh,
            reshard_after_forward=self.reshard or isinstance(module, Gathered),
            mp_policy=mixed,
            offload_policy=offload,
        )
        if not self.reshard:
            # A backward pass would give the weights back; without one they would stay, and
            # parameters would be whole where everybody expects parts.
            module.register_forward_hook(_give_back_without_gradient)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)


def _give_back_without_gradient(module: Any, inputs: Any, output: Any) -> None:
    if not torch.is_grad_enabled():
        module.reshard()


def shard_model(model: Any, trunk: nn.Module, layers: int, how: Sharding | None = None) -> Gathered:
    """Shard `model` in place, each of the trunk's `layers` decoder layers by itself.

    Raises UserError for a model without such a list of layers.
    """
    how = how or Sharding()
    shard_layers(trunk, layers, how)
    root = Gathered(model)
    how.apply(root)
    return root


def shard_layers(trunk: nn.Module, layers: int, how: Sharding) -> None:
    """Shard each decoder layer of a trunk, and say which are gathered ahead of which."""
    lists = (m for m in trunk.modules() if isinstance(m, nn.ModuleList) and len(m) == layers)
    found: Any = next(lists, None)
    if found is None:
        raise UserError(
            f"{type(trunk).__name__} has no list of its {layers} layers, which could be sharded",
            where="learner.sharding",
            fix="set learner.sharding = 'none'",
        )
    for layer in found:
        how.apply(layer)
    # One layer ahead is what fully_shard does by itself.
    if how.prefetch > 1:
        for at, layer in enumerate(found):
            ahead, behind = found[at + 1 :][: how.prefetch], found[:at][::-1][: how.prefetch]
            layer.set_modules_to_forward_prefetch(list(ahead))
            layer.set_modules_to_backward_prefetch(list(behind))


def reduce_gradients(modules: Iterable[nn.Module | None], now: bool) -> None:
    """Whether the next backward pass sums the gradients of these sharded modules over ranks; until
    one does, each rank adds up whole gradients of its own."""
    from torch.distributed.fsdp import FSDPModule

    for module in modules:
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(now)
            module.set_is_last_backward(now)


def local_region(tensor: Tensor) -> tuple[slice, ...]:
    """Which part of the whole tensor this rank holds: one slice for each dimension."""
    if not is_sharded(tensor):
        return tuple(slice(0, size) for size in tensor.shape)
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert isinstance(tensor, DTensor)
    mesh, where = tensor.device_mesh, tensor.placements
    sizes, starts = compute_local_shape_and_global_offset(tensor.shape, mesh, where)
    return tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))


def materialise(
    module: nn.Module, device: torch.device | str, *, weights_on_host: bool = False
) -> None:
    """Give memory on `device` to what of a module has none yet, a tied parameter once; the numbers
    in it are arbitrary. Move the rest there."""
    home = "cpu" if weights_on_host else device

    def place(tensor: Tensor) -> Tensor:
        where = home if isinstance(tensor, nn.Parameter) else device
        return torch.empty_like(tensor, device=where) if tensor.is_meta else tensor.to(where)

    tied = _tied(module)
    module._apply(place)
    for first, *others in tied:
        for name in others:
            owner, _, last = name.rpartition(".")
            setattr(module.get_submodule(owner), last, module.get_parameter(first))


def _tied(module: nn.Module) -> list[list[str]]:
    """The names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [found for found in names.values() if len(found) > 1]


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


def sharded_as(part: Tensor, example: Tensor) -> Tensor:
    """This rank's `part` of a tensor that is sharded as `example` is; it may lie on the host."""
    from torch.distributed.tensor import DTensor

    assert isinstance(example, DTensor)
    sharded = DTensor.from_local(
        part,
        example.device_mesh,
        example.placements,
        run_check=False,
        shape=example.shape,
        stride=example.stride(),
    )
    # torch has moved it to the devices of the mesh.
    return sharded.to(part.device)


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
