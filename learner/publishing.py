"""The policy as an engine takes it: named host arrays in its dtype, and a canary to check."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.contracts.errors import Fatal, UserError
from cluster.contracts.records import Canary
from learner.heads import hidden_states, lm_head
from learner.settings import CANARY_PROMPT_TOKENS, CANARY_TOKENS

HostArray = np.ndarray[Any, np.dtype[Any]]


def published_tensors(policy: Any) -> dict[str, Tensor]:
    """Parameters under their Hugging Face names, a tied one once, and persistent buffers."""
    tensors = dict(policy.named_parameters())
    kept = policy.state_dict().keys()
    tensors.update({name: b for name, b in policy.named_buffers() if name in kept})
    return tensors


def host_arrays(policy: Any, dtype: str) -> tuple[dict[str, HostArray], dict[str, str]]:
    """(arrays, torch dtype names) of the policy in the engine's `dtype`, bfloat16 as uint16 views.

    float32 arrays on a CPU share memory with the model: publish (copy) before training on.
    Raises Fatal, naming the tensor, for one that is not finite: no engine may ever get it.
    """
    arrays, dtypes = {}, {}
    for name, tensor in published_tensors(policy).items():
        if not bool(torch.isfinite(tensor).all()):
            raise Fatal(f"the policy's tensor {name!r} is not finite after the update")
        host = tensor.detach().to("cpu", getattr(torch, dtype)).contiguous()
        arrays[name] = host.view(torch.uint16).numpy() if dtype == "bfloat16" else host.numpy()
        dtypes[name] = dtype
    return arrays, dtypes


@torch.no_grad()
def canary_tokens(policy: Any, prompt: Sequence[int]) -> tuple[int, ...]:
    """The start of a prompt and the policy's most likely continuation, a fixed sequence for a run.

    Raises UserError for a token outside the vocabulary.
    """
    head = lm_head(policy)
    ids = [int(token) for token in prompt[:CANARY_PROMPT_TOKENS]]
    if not ids or min(ids) < 0 or max(ids) >= head.weight.shape[0]:
        raise UserError(
            f"the first prompt's token ids are empty or outside the vocabulary: {ids}",
            where="data.prompts",
            fix="tokenise the prompts with the policy's own tokenizer",
        )
    while len(ids) < CANARY_TOKENS:
        row = torch.tensor([ids], device=head.weight.device)
        last = hidden_states(policy, row, torch.ones_like(row))[:, -1]
        ids.append(int(head.logits(last).argmax()))
    return tuple(ids)


@torch.no_grad()
def canary(policy: Any, token_ids: Sequence[int], dtype: str, tolerance: float) -> Canary:
    """The canary under the weights as published: rounded to `dtype`, computed in float32."""
    head = lm_head(policy)
    row = torch.tensor([list(token_ids)], device=head.weight.device)
    with _rounded(policy, dtype):
        hidden = hidden_states(policy, row, torch.ones_like(row))[0, :-1]
        logp, _ = head.logprobs(hidden, row[0, 1:])
    return Canary(token_ids=tuple(token_ids), logprobs=tuple(logp.tolist()), tolerance=tolerance)


@contextmanager
def _rounded(policy: Any, dtype: str) -> Iterator[None]:
    """The policy's parameters rounded to `dtype` for a while, the exact ones back afterwards."""
    if dtype == "float32":
        yield
        return
    exact = [(p, p.data) for p in policy.parameters()]
    try:
        for parameter, data in exact:
            parameter.data = data.to(getattr(torch, dtype)).to(data.dtype)
        yield
    finally:
        for parameter, data in exact:
            parameter.data = data
