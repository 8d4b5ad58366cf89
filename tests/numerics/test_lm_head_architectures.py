"""Trunk + `lm_head` must be the model itself, or every log-probability is wrong in silence."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import transformers

from cluster.contracts.errors import UserError
from learner.compute.microbatches import pad_rows, token_row
from learner.models import heads
from learner.models.heads import LmHead, check_lm_head, hidden_states, lm_head, token_logprobs

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "mistral": {"sliding_window": 4},
    "gemma": {},
    "gemma2": {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0},
    "gemma3_text": {"final_logit_softcapping": 3.0},
    "cohere": {"logit_scale": 0.0625},
    "granite": {"logits_scaling": 8.0},
}


@pytest.fixture(params=sorted(ARCHITECTURES))
def policy(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        request.param, **SIZES, **ARCHITECTURES[request.param]
    )
    return transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture
def rows() -> Any:
    rng = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 61, (n,), generator=rng).tolist() for n in (9, 4, 7)]
    return pad_rows([token_row(i, [False] * 2 + [True] * (len(i) - 2)) for i in ids], pad_id=0)


@torch.no_grad()
def test_trunk_and_head_give_the_models_own_logits(policy: Any, rows: Any) -> None:
    own = policy(
        input_ids=rows.input_ids,
        attention_mask=rows.attention_mask,
        position_ids=rows.position_ids,
    ).logits
    ours = lm_head(policy).logits(hidden_states(policy, rows.input_ids, rows.attention_mask))
    real = rows.attention_mask.bool()
    torch.testing.assert_close(ours[real], own[real], rtol=1e-5, atol=1e-6)
    assert own[real].std() > 0.05  # not a comparison of zeros
    check_lm_head(policy)


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs_are_those_of_the_models_logits(
    policy: Any, rows: Any, temperature: float
) -> None:
    logp, entropy, _ = token_logprobs(policy, rows, temperature, entropy=True)
    for b in range(3):
        length = int(rows.attention_mask[b].sum())
        alone = policy(input_ids=rows.input_ids[b : b + 1, :length]).logits[0]
        whole = (alone / temperature).log_softmax(-1)
        assert entropy is not None
        for t in range(rows.input_ids.shape[1]):
            if not rows.loss_mask[b, t]:
                assert logp[b, t] == 0
                continue
            expected = whole[t - 1, rows.input_ids[b, t]]
            torch.testing.assert_close(logp[b, t], expected, rtol=1e-4, atol=1e-5)
            spread = -(whole[t - 1].exp() * whole[t - 1]).sum()
            torch.testing.assert_close(entropy[b, t], spread, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_chunked_and_whole_logits_agree_with_gradients(
    monkeypatch: pytest.MonkeyPatch, scale: float
) -> None:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(13, 8, generator=generator, requires_grad=True)
    weight = torch.randn(11, 8, generator=generator, requires_grad=True)
    labels = torch.randint(0, 11, (13,), generator=generator)
    results = []
    # Rebuilt in backward chunk by chunk, kept chunk by chunk, kept whole.
    for chunk, kept in ((11, 0), (22, 1 << 23), (1 << 23, 1 << 23)):
        for name, number in (("LOGITS_AT_ONCE", chunk), ("KEPT_PROBABILITIES", kept)):
            changed = dataclasses.replace(getattr(heads, name), cpu=number)
            monkeypatch.setattr(heads, name, changed)
        head = LmHead(weight, None, scale)
        logp, entropy = head.logprobs(hidden, labels, 0.8, entropy=True)
        assert entropy is not None
        grads = torch.autograd.grad(logp.sum(), [hidden, weight])
        results.append((logp, entropy, *grads))
    for rebuilt, chunked, whole in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(rebuilt, whole, rtol=1e-5, atol=1e-6)


def test_a_model_with_its_own_idea_of_logits_is_refused() -> None:
    config = transformers.AutoConfig.for_model("llama", **SIZES)
    policy = transformers.AutoModelForCausalLM.from_config(config).eval()
    policy.lm_head.register_forward_hook(lambda module, inputs, output: output * 2)
    with pytest.raises(UserError, match="in a way Accord does not know"):
        check_lm_head(policy)
