"""Rows packed end to end in one, each attending to itself only, and rows split over processes.

transformers calls the attention function registered here. With `Spans` it runs variable-length
attention: flash attention on a GPU in half precision, else blocks of like samples. With a
`SequencePart` it exchanges positions for heads around attention. Without either it is
transformers' own sdpa, so the same model still takes whole padded rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cluster.contracts.devices import PACKED_ROWS
from cluster.contracts.errors import Fatal, UserError
from learner.compute.ulysses import SequencePart
from learner.models.padded_blocks import PaddedBlock, block_attention, padded_blocks

NAME = "accord_packed"

_PACK = ContextVar[list[str] | None]("accord_pack", default=None)
"""While packed or split rows are run: the layers that met a part of rows. No mask is made then.
(Masks are made once a forward, never when activations are computed again for gradient
checkpointing; what describes the rows travels as arguments.)"""

_DEAF = (
    "is not told by its model that rows are packed or split: set packing = 'padded' and "
    "sequence_parallel = 1"
)

HALVES = (torch.float16, torch.bfloat16)  # all that flash attention knows


@dataclass(frozen=True, eq=False)
class Spans:
    """offsets: int32 [b + 1] on the device, first positions of the samples in the pack and its end.
    lengths: the samples' tokens. positions: int64 [1, T], counted from 0 in each sample."""

    offsets: Tensor
    lengths: tuple[int, ...]
    positions: Tensor

    @cached_property
    def blocks(self) -> tuple[PaddedBlock, ...]:
        """In which the samples attend where there is no flash attention."""
        return padded_blocks(self.lengths, self.offsets.device)

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str) -> Spans:
        sizes = np.asarray(lengths, dtype=np.int64)
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        positions = np.arange(offsets[-1]) - np.repeat(offsets[:-1], sizes)
        return cls(
            torch.from_numpy(offsets.astype(np.int32)).to(device),
            tuple(int(size) for size in sizes),
            torch.from_numpy(positions)[None].to(device),
        )


def run_trunk(
    trunk: Any, input_ids: Tensor, spans: Spans | None, part: SequencePart | None = None
) -> Tensor:
    """[b, T, H] last hidden states of [b, T]: of a pack (b = 1), or of a part of rows that are
    packed or padded on the right (what is real does not attend to what comes after it)."""
    positions = spans.positions if part is None and spans is not None else None
    if part is not None:
        positions = part.positions
    seen: list[str] = []
    token = _PACK.set(seen)
    try:
        result = trunk(
            input_ids=input_ids,
            attention_mask=None,
            position_ids=positions,
            use_cache=False,
            accord_spans=spans,
            accord_part=part,
        )
    finally:
        _PACK.reset(token)
    # Attention that is not the one registered here would look at its own part of the rows only.
    if part is not None and not seen:
        raise Fatal(f"{type(trunk).__name__} {_DEAF}")
    hidden: Tensor = result.last_hidden_state
    return hidden


def is_plain_causal(config: Any) -> bool:
    """Whether the attention here computes what this architecture does: causal, uncapped scores, no
    sliding window."""
    text = config.get_text_config()
    capped = getattr(text, "attn_logit_softcapping", None) is not None
    kinds = getattr(text, "layer_types", None) or ()
    window = getattr(text, "sliding_window", None)
    windowed = window is not None and getattr(text, "use_sliding_window", True)
    return not capped and not windowed and all(kind == "full_attention" for kind in kinds)


def choose_layout(packing: str, device: torch.device, compute_dtype: str, policy: Any) -> bool:
    """True for packed microbatches, from `learner.packing`.

    "auto" packs on a CPU, and where flash attention is to be had (a GPU, bfloat16), if the
    architecture allows it. Raises UserError for "packed" with an architecture that does not.
    """
    able = is_plain_causal(policy.config)
    if packing == "packed" and not able:
        raise UserError(
            f"{type(policy).__name__} attends in a way that packed rows cannot (capped scores or "
            "a sliding window)",
            where="learner.packing",
            fix="set learner.packing = 'padded'",
        )
    if packing == "auto":
        kernel = device.type == "cpu" or compute_dtype == "bfloat16"
        return able and PACKED_ROWS.on(device) and kernel
    return packing == "packed"


def require_plain_causal(policy: Any, section: str) -> None:
    """Raise UserError for a model whose rows cannot be split over processes."""
    if not is_plain_causal(policy.config):
        raise UserError(
            f"{type(policy).__name__} attends in a way that rows split over processes cannot "
            "(capped scores or a sliding window)",
            where=f"{section}.sequence_parallel",
            fix=f"set {section}.sequence_parallel = 1",
        )


def use_packed_attention(*models: nn.Module | None) -> None:
    """Let these transformers models (None is skipped) take packs, and parts of rows, as well as
    whole padded rows."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    for model in models:
        if model is not None:
            model.set_attn_implementation(NAME)  # type: ignore[operator]


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return sdpa_mask(*args, **kwargs) if _PACK.get() is None else None


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    accord_spans: Spans | None = None,
    accord_part: SequencePart | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [b, heads, T, D], key and value [b, kv heads, T, D] -> [b, T, heads, D]."""
    if accord_part is not None:
        if (seen := _PACK.get()) is not None:
            seen.append(type(module).__name__)
        query, key, value = accord_part.to_heads(query, key, value)
        whole = _whole_rows(query, key, value, scaling, accord_spans)
        return accord_part.to_positions(whole), None
    if accord_spans is None:
        if _PACK.get() is not None:
            raise Fatal(f"{type(module).__name__} {_DEAF}")
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return result
    return _whole_rows(query, key, value, scaling, accord_spans), None


def _whole_rows(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, spans: Spans | None
) -> Tensor:
    """Causal attention over a pack, or (without spans) over rows padded on the right."""
    if spans is None:
        out = nn.functional.scaled_dot_product_attention(
            query,
            key,
            value.to(query.dtype),
            is_causal=True,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out.transpose(1, 2)
    # Rotary embeddings leave float32 under autocast: the value says what is computed in.
    if query.device.type == "cuda" and value.dtype in HALVES:
        return _flash(query, key, value, scaling, spans)
    return block_attention(query, key, value.to(query.dtype), scaling, spans.blocks)


def _flash(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, spans: Spans
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
    longest = max(spans.lengths)
    more: dict[str, Any] = {}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in signature(varlen_attn).parameters:
            more = {"enable_gqa": True}
        else:  # torch before 2.13
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    out = varlen_attn(
        q,
        k,
        v,
        spans.offsets,
        spans.offsets,
        longest,
        longest,
        scale=scaling,
        window_size=(-1, 0),
        **more,
    )
    assert isinstance(out, Tensor)
    return out[None]
