"""A frozen model in half the memory that computes what it computed before, bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def halve_frozen(model: Any) -> None:
    """Put weights of a causal model that is computed in bfloat16 (autocast) into bfloat16, in
    place, where that changes no result.

    Autocast rounds the matrices of the trunk's linear layers anyway. Embeddings and the head are
    rounded only if that loses nothing, which is so for a model whose files are bfloat16. Norms
    and biases stay float32: they are small, and autocast does not round them.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is nn.Embedding and _exact(embedding.weight):
        embedding.weight.data = embedding.weight.data.bfloat16()
        embedding.register_forward_hook(_in_float32)
    # An embedding of another class may compute with its weight (Gemma scales it): it is left alone,
    # and so is a head that is tied to it.
    tied = head is not None and head.weight is embedding.weight
    for module in model.modules():
        if module is head and (tied or not _exact(module.weight)):
            continue
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.data.bfloat16()


def _exact(weight: Tensor) -> bool:
    return weight.dtype == torch.bfloat16 or torch.equal(weight, weight.bfloat16().float())


def _in_float32(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.float()
