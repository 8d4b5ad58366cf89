"""The policy as an engine takes it: named host arrays in its dtype, and a canary to check."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.contracts.errors import Fatal, UserError
from cluster.contracts.records import Canary
from learner.compute.ranks import is_sharded, whole
from learner.compute.sharding import Gathered, bare, call, local
from learner.models.heads import hidden_states, lm_head
from learner.settings import CANARY_PROMPT_TOKENS, CANARY_TOKENS

HostArray = np.ndarray[Any, np.dtype[Any]]


def published_tensors(policy: Any) -> dict[str, Tensor]:
    """Parameters under their Hugging Face names, a tied one once, and persistent buffers."""
    tensors = dict(policy.named_parameters())
    # Buffers that are not saved (rotary tables, say) are computed by the engine itself.
    kept = policy.state_dict().keys()
    tensors.update({name: b for name, b in policy.named_buffers() if name in kept})
    return tensors


def host_arrays(
    policy: Any, dtype: str, keep: bool = True
) -> tuple[dict[str, HostArray], dict[str, str]]:
    """(arrays, torch dtype names) of the policy in the engine's `dtype`, bfloat16 as uint16 views.

    keep: False on a rank that publishes nothing: it helps to gather sharded tensors, one at a time.

    float32 arrays on a CPU share memory with the model: publish (copy) before training on.
    Raises Fatal, naming the tensor, for one that is not finite: no engine may ever get it.
    """
    arrays, dtypes = {}, {}
    for name, tensor in _finite_tensors(policy):
        # Not before: the loop is what gathers the next sharded tensor, on all ranks together.
        if not keep:
            continue
        # Rounded here, once: learner and engine have to hold the same bits, or the checksums of
        # what the engine decodes with would not be those of what was published.
        host = tensor.to("cpu", getattr(torch, dtype)).contiguous()
        arrays[name] = host.view(torch.uint16).numpy() if dtype == "bfloat16" else host.numpy()
        dtypes[name] = dtype
    return arrays, dtypes


def device_tensors(
    policy: Any, dtype: str, keep: bool = True
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As `host_arrays`, but tensors where the policy lies; they share its memory where the dtype
    is the same. Raises Fatal as `host_arrays` does."""
    wanted = getattr(torch, dtype)
    tensors = {name: t.to(wanted) for name, t in _finite_tensors(policy) if keep}
    return tensors, dict.fromkeys(tensors, dtype)


def _finite_tensors(policy: Any) -> Iterator[tuple[str, Tensor]]:
    """`published_tensors`, each whole and checked. Raises Fatal for one that is not finite."""
    named = {name: tensor.detach() for name, tensor in published_tensors(policy).items()}
    # All at once where they are whole, which is one look at the device instead of hundreds.
    if not any(is_sharded(tensor) for tensor in named.values()):
        _require_finite(named)
        yield from named.items()
        return
    for name, tensor in named.items():
        full = whole(tensor)
        if full.is_floating_point():
            _require_finite({name: full})
        yield name, full


@torch.no_grad()
def _require_finite(named: dict[str, Tensor]) -> None:
    """Raise Fatal, naming the tensor. A finite norm says it all in one pass and one look at the
    device, ten times as fast as `isfinite` on a CPU; one that is not may be an overflow."""
    floats = {n: t for n, t in named.items() if t.is_floating_point()}
    norms = torch.stack([x.float() for x in torch._foreach_norm(list(floats.values()))]).tolist()
    for (name, tensor), norm in zip(floats.items(), norms, strict=True):
        # Squares of finite numbers may overflow, so a norm that is not finite proves nothing yet.
        if not math.isfinite(norm) and not bool(torch.isfinite(tensor).all()):
            raise Fatal(f"the policy's tensor {name!r} is not finite after the update")


@torch.no_grad()
def canary_tokens(policy: Any, prompt: Sequence[int]) -> tuple[int, ...]:
    """The start of a prompt and the policy's most likely continuation, a fixed sequence for a run.

    Raises UserError for a token outside the vocabulary.
    """
    head = lm_head(bare(policy))
    ids = [int(token) for token in prompt[:CANARY_PROMPT_TOKENS]]
    if not ids or min(ids) < 0 or max(ids) >= head.weight.shape[0]:
        raise UserError(
            f"the first prompt's token ids are empty or outside the vocabulary: {ids}",
            where="data.prompts",
            fix="tokenise the prompts with the policy's own tokenizer",
        )
    # The policy's own continuation, not random tokens: it lies where the policy is used.
    while len(ids) < CANARY_TOKENS:
        row = torch.tensor([ids], device=head.weight.device)
        ids.append(int(call(policy, _last_logits, row).argmax()))
    return tuple(ids)


def _last_logits(policy: Any, row: Tensor) -> Tensor:
    return lm_head(policy).logits(hidden_states(policy, row, torch.ones_like(row))[:, -1])


@torch.no_grad()
def canary(policy: Any, token_ids: Sequence[int], dtype: str, tolerance: float | None) -> Canary:
    """The canary under the weights as published: rounded to `dtype`, computed in float32."""
    row = torch.tensor([list(token_ids)], device=lm_head(bare(policy)).weight.device)
    with _rounded(policy, dtype):
        logp = call(policy, _row_logprobs, row)
    return Canary(token_ids=tuple(token_ids), logprobs=tuple(logp.tolist()), tolerance=tolerance)


def _row_logprobs(policy: Any, row: Tensor) -> Tensor:
    hidden = hidden_states(policy, row, torch.ones_like(row))[0, :-1]
    return lm_head(policy).logprobs(hidden, row[0, 1:])[0]


@contextmanager
def _rounded(policy: Any, dtype: str) -> Iterator[None]:
    """The policy's parameters rounded to `dtype` for a while, the exact ones back afterwards."""
    if dtype == "float32":
        yield
        return
    if isinstance(policy, Gathered):
        with _rounded_parts(policy, dtype):
            yield
        return
    # References, not copies: rounding makes new tensors and the exact ones stay as they were.
    exact = [(p, p.data) for p in policy.parameters()]
    try:
        for parameter, data in exact:
            parameter.data = data.to(getattr(torch, dtype)).to(data.dtype)
        yield
    finally:
        for parameter, data in exact:
            parameter.data = data


@contextmanager
def _rounded_parts(policy: Gathered, dtype: str) -> Iterator[None]:
    """As `_rounded`, in place: it is this rank's own memory that is gathered."""
    parts = [local(p.detach()) for p in policy.parameters()]
    # Copied, because the rounding below is written into the parts themselves.
    exact = [part.clone() for part in parts]
    try:
        for part in parts:
            part.copy_(part.to(getattr(torch, dtype)))
        yield
    finally:
        for part, saved in zip(parts, exact, strict=True):
            part.copy_(saved)
