"""A frozen model in half the memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

from learner.compute.optimizer import compute_in
from learner.models.halved import halve_frozen
from learner.models.heads import hidden_states, lm_head


def outputs(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.arange(2, 22).view(2, 10)
    with torch.no_grad(), compute_in("bfloat16", "cpu"):
        hidden = hidden_states(model, ids, torch.ones_like(ids))
    logp, _ = lm_head(model).logprobs(hidden[0], ids[0], reduced=True)
    return hidden, logp.detach()


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gemma"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_a_halved_model_computes_the_same_bits(kind: str, stored: torch.dtype) -> None:
    config = transformers.AutoConfig.for_model(
        kind,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=kind != "llama",
        pad_token_id=0,
    )
    torch.manual_seed(0)
    exact = transformers.AutoModelForCausalLM.from_config(config).to(stored).float().eval()
    half = copy.deepcopy(exact)
    halve_frozen(half)
    for ours, theirs in zip(outputs(half), outputs(exact), strict=True):
        assert torch.equal(ours, theirs)
    size = [sum(p.nbytes for p in model.parameters()) for model in (half, exact)]
    if stored == torch.bfloat16 and kind != "gemma":
        assert size[0] < 0.52 * size[1]
    else:  # what rounding would change, or what computes with its weight, stays
        assert size[0] < 0.9 * size[1]
