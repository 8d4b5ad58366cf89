"""What a model's config.json tells of its size. Weights are not read, torch is not imported."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.contracts.config.base import ModelConfig
from learner.models.files import hub_has_an_address

LAYERS = ("num_hidden_layers", "n_layer")
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """Shapes of a decoder. parameters: estimated from the shapes, good to some per cent.

    layer_parameters: of one decoder layer. outer_parameters: of embeddings and head. intermediate:
    width inside a feed-forward (of all active experts). These and heads are 0 where only sizes of
    the whole are wanted. context: tokens it can attend to, None when
    its config does not say.
    """

    parameters: int
    layers: int
    hidden: int
    kv_heads: int
    head_size: int
    vocabulary: int
    context: int | None
    layer_parameters: int = 0
    outer_parameters: int = 0
    intermediate: int = 0
    heads: int = 0

    def adapter_parameters(self, rank: int) -> int:
        """Numbers of LoRA factors of this rank on all linear layers of a dense decoder."""
        attention = self.head_size * (self.heads + 2 * self.kv_heads)  # out of q, k, v
        ends = 4 * self.hidden + attention + self.head_size * self.heads  # q, k, v, o
        ends += 3 * (self.hidden + self.intermediate)  # gate, up, down
        return self.layers * rank * ends

    def cache_bytes(self, width: int) -> int:
        """Bytes of the keys and values of one token, ``width`` bytes a number."""
        return 2 * self.layers * self.kv_heads * self.head_size * width

    def activation_bytes(self, width: int) -> int:
        """Bytes a token that autograd keeps of one decoder layer with flash attention: what goes
        into each matrix, the gate and its product, and the norms' float32 copies."""
        attention = self.head_size * (2 * self.heads + 2 * self.kv_heads)
        numbers = 4 * self.hidden + attention + 4 * self.intermediate
        return width * numbers + 2 * 4 * self.hidden


def read_model_facts(model: ModelConfig) -> ModelFacts | None:
    """None for a model whose config cannot be read or names no shapes; whether that is a mistake
    is told by those who load it."""
    tree = _config_of(model)
    try:
        return None if tree is None else facts_of(tree)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


def _config_of(model: ModelConfig) -> dict[str, Any] | None:
    place = Path(model.path)
    try:
        if place.exists():
            found = json.loads((place / "config.json").read_text(encoding="utf-8"))
            return found if isinstance(found, dict) else None
        if model.path.count("/") > 1 or model.path.startswith((".", "~", "/")):
            return None  # a path, not a hub id
        return _of_hub(model)
    except (OSError, ValueError):
        return None


def _of_hub(model: ModelConfig) -> dict[str, Any]:
    """What was downloaded before is not asked for again: a resumed run starts without a network."""
    from transformers import PretrainedConfig

    read = functools.partial(PretrainedConfig.get_config_dict, model.path, revision=model.revision)
    with suppress(OSError):
        return dict(read(local_files_only=True)[0])
    return dict(read()[0]) if hub_has_an_address() else {}


def facts_of(tree: Mapping[str, Any]) -> ModelFacts:
    """Raises KeyError for a shape that the config lacks. The text part of a multi-modal model."""
    text = tree["text_config"] if isinstance(tree.get("text_config"), Mapping) else tree
    hidden, layers = _number(text, "hidden_size", "n_embd"), _number(text, *LAYERS)
    heads = _number(text, "num_attention_heads", "n_head")
    kv_heads = _number(text, "num_key_value_heads", default=heads)
    head_size = _number(text, "head_dim", default=hidden // heads)
    inner = _number(text, "intermediate_size", "n_inner", default=4 * hidden)
    vocabulary = _number(text, "vocab_size")
    tied = text.get("tie_word_embeddings", tree.get("tie_word_embeddings", True))
    attention = 2 * hidden * head_size * (heads + kv_heads)
    experts = _number(text, "num_experts", "num_local_experts", "n_routed_experts", default=1)
    expert = 3 * hidden * _number(text, "moe_intermediate_size", default=inner)
    # GPT-2's feed-forward has two matrices instead of three.
    feed_forward = 2 * hidden * inner if "n_embd" in text else experts * expert
    layer = attention + feed_forward
    outer = (1 if tied else 2) * vocabulary * hidden
    active = _number(text, "num_experts_per_tok", default=1) if experts > 1 else 1
    return ModelFacts(
        parameters=layers * layer + outer,
        layer_parameters=layer,
        outer_parameters=outer,
        layers=layers,
        hidden=hidden,
        intermediate=expert // (3 * hidden) * active if experts > 1 else inner,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        vocabulary=vocabulary,
        context=_number(text, *CONTEXT_KEYS, default=0) or None,
    )


def _number(tree: Mapping[str, Any], *names: str, default: int | None = None) -> int:
    """The first of the names that is set: families name the same thing differently."""
    for name in names:
        if tree.get(name) is not None:
            return int(tree[name])
    if default is None:
        raise KeyError(names[0])
    return default
