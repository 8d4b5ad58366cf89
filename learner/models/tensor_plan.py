"""Tensor parallelism: processes split each weight matrix between them, by transformers' plan.

Shoeybi et al., "Megatron-LM" (2019). The plan of a model names, for each linear layer, along which
dimension it is split. Its functions make the weights DTensors, also of a model without memory, and
put the exchange of activations around the layers. Two things are done differently here.

A parameter that each process applies to its own heads (Qwen3's `q_norm`) has a gradient that is to
be summed. transformers sums `.grad` in a hook of the module, which is not yet there under
`fully_shard` and is summed again with each microbatch; here the sum is a part of backward.

The vocabulary of a tied head is split together with the embedding, which the plans leave whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.distributed.tensor_parallel import (
    apply_tensor_parallelism,
    replace_layer_number_by_wildcard,
)

from cluster.contracts.errors import UserError
from learner.compute.mesh import Mesh
from learner.compute.ranks import Ranks, is_sharded

_SPLIT = {"colwise", "rowwise", "colwise_gather_output", "colwise_rep", "embedding_rowwise"}
_OWN_HEADS = "replicated_with_grad_allreduce"


def split_matrices(model: Any, mesh: Mesh, section: str) -> None:
    """Make the weights of `model` (a causal one, or a trunk) DTensors, by its plan, in place.

    Does nothing without tensor parallelism. Raises UserError for a model without a plan, with one
    that has kinds of layers not tried here, or one that did not take hold.
    """
    devices = mesh.tensor_devices
    if devices is None:
        return
    plan = _plan(model, mesh.tensor.size, section)
    tied = _tied(model)
    apply_tensor_parallelism(
        model, devices, {name: how for name, how in plan.items() if how != _OWN_HEADS}
    )
    if tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    for name, module in model.named_modules():
        if plan.get(replace_layer_number_by_wildcard(name)) == _OWN_HEADS:
            _sum_gradients(module, mesh.tensor)
    _require_split(model, plan, section)


def _plan(model: Any, size: int, section: str) -> dict[str, str]:
    plan = dict(model.tp_plan)
    problem = None
    if not any(how in _SPLIT for how in plan.values()):
        problem = "transformers has no plan that says how to split its matrices"
    elif unknown := sorted(set(plan.values()) - _SPLIT - {_OWN_HEADS}):
        problem = f"its plan splits layers in ways that were not tried here ({', '.join(unknown)})"
    if problem is not None:
        raise UserError(
            f"{type(model).__name__} cannot be split over processes: {problem}",
            where=f"{section}.tensor_parallel",
            fix=f"set {section}.tensor_parallel = 1, and {section}.sharding = 'fsdp2' to save "
            "memory",
        )
    names = {id(module): name for name, module in model.named_modules()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None:
        return plan
    plan.pop(names[id(head)], None)
    if _splits_vocabulary(model, size):
        plan[names[id(head)]] = "colwise_gather_output"
        if _tied(model):
            plan[names[id(embedding)]] = "embedding_rowwise"
    return plan


def _splits_vocabulary(model: Any, size: int) -> bool:
    """Whether each process has a part of the head's rows. A head whose logits are capped computes
    all of them at once; it, and one whose rows do not divide, is whole on each process."""
    config = model.config.get_text_config()
    capped = getattr(config, "final_logit_softcapping", None) is not None
    return not capped and model.get_output_embeddings().weight.shape[0] % size == 0


def _tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _require_split(model: Any, plan: dict[str, str], section: str) -> None:
    """transformers logs rules that fit no layer, and goes on with whole matrices."""
    split = {
        replace_layer_number_by_wildcard(name.rpartition(".")[0])
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if is_sharded(parameter)
    }
    missed = sorted(name for name, how in plan.items() if how in _SPLIT and name not in split)
    if missed:
        raise UserError(
            f"{type(model).__name__} has no such layers as its plan for tensor parallelism names, "
            f"so that they would not be split: {', '.join(missed)}",
            where=f"{section}.tensor_parallel",
            fix=f"set {section}.tensor_parallel = 1",
        )


def _sum_gradients(module: nn.Module, ranks: Ranks) -> None:
    """Have the gradients of a module's parameters summed over `ranks` in backward."""
    forward: Callable[..., Any] = module.forward

    def summed(*args: Any, **kwargs: Any) -> Any:
        # For the time of the pass only: what an optimiser or `fully_shard` holds stays itself.
        own: Any = module._parameters
        before = dict(own)
        own.update({name: _summed(p, ranks) for name, p in before.items() if p is not None})
        try:
            return forward(*args, **kwargs)
        finally:
            own.update(before)

    module.forward = summed


def _summed(parameter: Tensor, ranks: Ranks) -> Tensor:
    found: Tensor = _SummedGradient.apply(parameter, ranks)
    return found


class _SummedGradient(torch.autograd.Function):
    """The tensor itself; its gradient is the sum of those of all ranks."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone()
        ctx.ranks.sum_([total])
        return total, None
