"""The policy as an engine takes it: buckets of named arrays in its dtype, and a canary to check."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.contracts.errors import Fatal, UserError
from cluster.contracts.records import Canary, LoraUpdate
from cluster.weights.low_precision import plain
from cluster.weights.merging import base_fingerprint
from learner.compute.ranks import whole
from learner.compute.sharding import bare, call
from learner.models.heads import hidden_states, lm_head
from learner.models.lora import adapter_tensors, base_tensors, has_adapters
from learner.models.rounded import rounded
from learner.rl.forward import Networks
from learner.rl.policies import adapter_of, policies_of
from learner.settings import CANARY_PROMPT_TOKENS, CANARY_TOKENS, LearnerSettings

HostArray = np.ndarray[Any, np.dtype[Any]]


def published_tensors(policy: Any) -> dict[str, Tensor]:
    """Parameters under their Hugging Face names, a tied one once, and persistent buffers; of a
    policy with an adapter the adapter alone, under peft's names; of one with the adapters of
    several policies all of these, as ``NAME/PEFT'S NAME``."""
    if names := policies_of(policy):
        return {
            f"{name}/{key}": tensor
            for name in names
            for key, tensor in adapter_tensors(policy, adapter_of(name)).items()
        }
    if has_adapters(policy):
        return adapter_tensors(policy)
    tensors = dict(policy.named_parameters())
    # Buffers that are not saved (rotary tables, say) are computed by the engine itself.
    kept = policy.state_dict().keys()
    tensors.update({name: b for name, b in policy.named_buffers() if name in kept})
    return tensors


def buckets(
    policy: Any, dtype: str, *, on_device: bool, limit_bytes: int
) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
    """(arrays, torch dtype names) of the policy in the engine's `dtype`, a bucket at a time.

    Host arrays, bfloat16 as uint16 views, or with `on_device` tensors where the policy lies. They
    share memory with the policy where the dtype is the same: none may change before it is sent.
    A bucket holds at most `limit_bytes`, or a single tensor. A sharded policy is gathered tensor
    by tensor, on all ranks together: each has to go through all buckets.

    Raises Fatal, naming the tensor, for one that is not finite: no engine may ever get it.
    """
    wire = getattr(torch, dtype)
    bucket: dict[str, Tensor] = {}
    used = 0
    for name, tensor in published_tensors(policy).items():
        nbytes = tensor.numel() * wire.itemsize
        if bucket and used + nbytes > limit_bytes:
            yield _checked(bucket, dtype, on_device)
            bucket, used = {}, 0
        # Rounded here, once: learner and engine have to hold the same bits, or the checksums of
        # what the engine decodes with would not be those of what was published. And before it is
        # gathered: half the bytes.
        bucket[name] = whole(tensor.detach().to(wire))
        used += nbytes
    if bucket:
        yield _checked(bucket, dtype, on_device)


def _checked(
    bucket: dict[str, Tensor], dtype: str, on_device: bool
) -> tuple[dict[str, Any], dict[str, str]]:
    _require_finite(bucket)
    names = dict.fromkeys(bucket, dtype)
    if on_device:
        return bucket, names
    return {name: _host(tensor, dtype) for name, tensor in bucket.items()}, names


def _host(tensor: Tensor, dtype: str) -> HostArray:
    host = tensor.to("cpu").contiguous()
    return host.view(torch.uint16).numpy() if dtype == "bfloat16" else host.numpy()


def lora_update(networks: Networks, settings: LearnerSettings) -> LoraUpdate | None:
    """How workers make whole models of what is published; None where that is the model. Of a
    sharded policy every rank has to ask."""
    if settings.lora is None:
        return None
    dtype = settings.model.dtype
    base = ((name, plain(whole(t.detach()))) for name, t in base_tensors(networks.policy).items())
    return LoraUpdate(
        base=base_fingerprint(base, dtype),
        base_dtype=dtype,
        scale=settings.lora.scale,
        dtype=settings.rollout_dtype,
        held=settings.lora.base,
    )


def host_arrays(policy: Any, dtype: str) -> tuple[dict[str, HostArray], dict[str, str]]:
    """All `buckets` of host arrays at once: for models that are small, or sent nowhere."""
    arrays: dict[str, HostArray] = {}
    dtypes: dict[str, str] = {}
    for some, names in buckets(policy, dtype, on_device=False, limit_bytes=1 << 30):
        arrays |= some
        dtypes |= names
    return arrays, dtypes


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
    """The canary under the weights as engines hold them: adapters merged, rounded to `dtype`;
    computed in the type of the parameters."""
    row = torch.tensor([list(token_ids)], device=lm_head(bare(policy)).weight.device)
    logp = call(policy, _row_logprobs, row, dtype)
    return Canary(token_ids=tuple(token_ids), logprobs=tuple(logp.tolist()), tolerance=tolerance)


def _row_logprobs(policy: Any, row: Tensor, dtype: str) -> Tensor:
    with rounded(policy, dtype):
        hidden = hidden_states(policy, row, torch.ones_like(row))[0, :-1]
        return lm_head(policy).logprobs(hidden, row[0, 1:])[0]
