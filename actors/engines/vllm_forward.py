"""The forward pass of a plain Qwen2 or Llama on a CPU, straight from vLLM's own kernels.

vLLM's modules spend more time between their kernels than in them when the model is small: module
calls, custom operators, and norms out of eight torch operators. The weights, their packed form,
the cache and the kernels are the same here, only what lies between them is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import embedding, silu
from vllm import _custom_ops as ops
from vllm import envs
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

FAMILIES = (Qwen2ForCausalLM, LlamaForCausalLM)

Product = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Rows:
    """Where the tokens of one forward pass stand.

    ids, positions, slots: int64 [tokens], those of one sequence side by side; a slot is a place in
    the cache. starts: int32 [sequences + 1], where the tokens of each sequence begin. lengths:
    int32 [sequences], tokens of each sequence, these included. blocks: int32 [sequences, most
    blocks], the sequence's blocks in the cache.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    blocks: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Layer:
    """What one layer computes with until the next swap."""

    before: torch.Tensor
    qkv: Product
    keys: torch.Tensor
    values: torch.Tensor
    out: Product
    between: torch.Tensor
    gate_up: Product
    down: Product


class PlainForward:
    """Reads the model anew at every ``bind``: a swap exchanges tensors and kernels in place."""

    def __init__(self, model: Any, builder: CPUAttentionMetadataBuilder) -> None:
        """Raises ValueError, with the reason, for a model that this does not cover."""
        if type(model) not in FAMILIES:
            raise ValueError(f"{type(model).__name__} is not one of the covered families")
        self._model = model
        self._builder = builder
        layers = list(model.model.layers)
        for layer in layers:
            _check(layer, builder)
        attention = layers[0].self_attn
        self._q_size, self._kv_size = attention.q_size, attention.kv_size
        self._shape = (attention.num_heads, attention.num_kv_heads, attention.head_dim)
        self._scale = attention.attn.impl.scale
        self._epsilon = model.model.norm.variance_epsilon
        self._rotary = attention.rotary_emb
        self._layers: list[_Layer] = []

    def bind(self) -> None:
        """Take up the weights in force. To be called after every swap, before the next pass."""
        inner = self._model.model
        self._embedding = inner.embed_tokens.weight
        self._cosines = self._rotary._match_cos_sin_cache_dtype(self._embedding)
        self._last_norm = inner.norm.weight
        self._layers = [_bound(layer) for layer in inner.layers]

    def logits(self, rows: Rows, chosen: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [tokens, vocabulary] after each token; chosen: of these tokens only."""
        hidden = self._hidden(rows)
        if chosen is not None:
            hidden = hidden[chosen]
        return self._model.compute_logits(hidden).float()

    def _hidden(self, rows: Rows) -> torch.Tensor:
        heads, kv_heads, width = self._shape
        plan = self._plan(rows)
        residual = embedding(rows.ids, self._embedding)
        x = torch.empty_like(residual)
        torch.ops._C.rms_norm.default(x, residual, self._layers[0].before, self._epsilon)
        for number, layer in enumerate(self._layers):
            if number:
                self._add_norm(x, residual, layer.before)
            qkv = layer.qkv(x)
            q, k, v = qkv.split((self._q_size, self._kv_size, self._kv_size), dim=-1)
            torch.ops._C.rotary_embedding.default(
                rows.positions, q, k, width, self._cosines, self._rotary.is_neox_style
            )
            k, v = k.unflatten(-1, (kv_heads, width)), v.unflatten(-1, (kv_heads, width))
            ops.cpu_attn_reshape_and_cache(
                k, v, layer.keys, layer.values, rows.slots, self._builder.isa
            )
            attended = torch.empty(len(qkv), heads, width, dtype=qkv.dtype)
            self._attend(q.unflatten(-1, (heads, width)), layer, attended, rows, plan)
            x = layer.out(attended.view(len(qkv), -1))
            self._add_norm(x, residual, layer.between)
            gate, up = layer.gate_up(x).chunk(2, dim=-1)
            x = layer.down(silu(gate).mul_(up))
        self._add_norm(x, residual, self._last_norm)
        return x

    def _add_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> None:
        """In place: residual += x, then x = the norm of that."""
        torch.ops._C.fused_add_rms_norm.default(x, residual, weight, self._epsilon)

    def _plan(self, rows: Rows) -> torch.Tensor:
        """vLLM's division of the attention into pieces of work."""
        builder = self._builder
        plan: torch.Tensor = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(rows.lengths),
            num_heads=builder.num_heads,
            num_kv_heads=builder.num_kv_heads,
            head_dim=builder.head_dim,
            seq_lens=rows.lengths,
            dtype=builder.dtype,
            query_start_loc=rows.starts,
            causal=True,
            sliding_window_size=-1,
            isa=builder.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        )
        return plan

    def _attend(
        self, q: torch.Tensor, layer: _Layer, out: torch.Tensor, rows: Rows, plan: torch.Tensor
    ) -> None:
        ops.cpu_attention_with_kv_cache(
            query=q,
            key_cache=layer.keys,
            value_cache=layer.values,
            output=out,
            query_start_loc=rows.starts,
            seq_lens=rows.lengths,
            scale=self._scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=rows.blocks,
            softcap=0,
            scheduler_metadata=plan,
            s_aux=None,
        )


def _check(layer: Any, builder: CPUAttentionMetadataBuilder) -> None:
    """Raises ValueError unless the layer is what `PlainForward` computes."""
    attention, mlp = layer.self_attn, layer.mlp
    implementation = attention.attn.impl
    fits = {
        "attention": type(implementation) is CPUAttentionBackendImpl
        and implementation.sliding_window == -1
        and implementation.alibi_slopes is None
        and implementation.sinks is None
        and not implementation.logits_soft_cap
        and implementation.kv_sharing_target_layer_name is None
        and implementation.kv_cache_dtype == "auto"
        and not getattr(attention, "qk_norm", False)
        and builder.window_size == -1,
        "rotary embedding": type(attention.rotary_emb).forward_cpu is RotaryEmbedding.forward_cpu,
        "norm": all(
            type(norm) is RMSNorm and norm.has_weight and norm.variance_size_override is None
            for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        ),
        "activation": type(mlp.act_fn) is SiluAndMul,
        "linear layers": all(
            type(linear.quant_method) is UnquantizedLinearMethod and hasattr(linear, "cpu_linear")
            for linear in (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)
        ),
    }
    unknown = [name for name, known in fits.items() if not known]
    if unknown:
        raise ValueError(f"its {' and '.join(unknown)} is not of the plain kind")


def _bound(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    cache = attention.attn.kv_cache
    blocks, heads, size, _ = cache.shape
    keys, values = cache.view(blocks, heads, 2 * size, -1).chunk(2, dim=2)
    return _Layer(
        before=layer.input_layernorm.weight,
        qkv=_product(attention.qkv_proj),
        keys=keys,
        values=values,
        out=_product(attention.o_proj),
        between=layer.post_attention_layernorm.weight,
        gate_up=_product(mlp.gate_up_proj),
        down=_product(mlp.down_proj),
    )


def _product(linear: Any) -> Product:
    kernel, weight, bias = linear.cpu_linear, linear.weight, linear.bias
    return lambda x: kernel(x, weight, bias)
