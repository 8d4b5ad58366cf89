"""Adapters in the model's own class: the base stays exact, and peft and transformers read them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from cluster.contracts.config.base import ModelConfig
from cluster.contracts.config.lora import LoraConfig
from cluster.contracts.errors import UserError
from learner.models.load import load_policy
from learner.models.lora import (
    adapter_dropout,
    adapter_layers,
    adapter_tensors,
    add_adapter,
    base_tensors,
    initialise_adapter,
    load_adapter,
    merged_tensors,
    save_adapter,
    without_adapters,
)

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
ALL = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture
def policy(tiny_policy: Path) -> Any:
    return load_policy(ModelConfig(path=str(tiny_policy)))


def moved(policy: Any, cfg: LoraConfig | None = None) -> Any:
    """An adapter that has learnt something."""
    adapted = copy.deepcopy(policy)
    add_adapter(adapted, cfg or LoraConfig(rank=4))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in adapter_layers(adapted).values():
            layer.lora_B["default"].weight.normal_(0, 0.1, generator=generator)
    return adapted


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(IDS).logits
    return result


def test_a_fresh_adapter_changes_nothing_and_is_all_that_trains(policy: Any) -> None:
    adapted = copy.deepcopy(policy)
    add_adapter(adapted, LoraConfig(rank=4))
    assert torch.equal(logits(adapted), logits(policy))
    trained = {id(p) for p in adapted.parameters() if p.requires_grad}
    assert trained == {id(p) for p in adapter_tensors(adapted).values()}
    assert {name.rpartition(".")[2] for name in adapter_layers(adapted)} == ALL
    assert list(base_tensors(adapted)) == list(base_tensors(policy))


def test_the_base_is_exact_without_adapters_and_a_waiting_backward_goes_on(policy: Any) -> None:
    adapted = moved(policy)
    waiting = adapted(IDS).logits.sum()
    with without_adapters(adapted):
        assert torch.equal(logits(adapted), logits(policy))
    waiting.backward()
    assert all(p.grad is not None for p in adapter_tensors(adapted).values())
    assert not torch.allclose(logits(adapted), logits(policy), atol=1e-3)


def test_merged_weights_are_plain_and_leave_the_model_as_it_is(policy: Any) -> None:
    adapted = moved(policy)
    before = {name: t.clone() for name, t in base_tensors(adapted).items()}
    merged = dict(merged_tensors(adapted))
    plain = copy.deepcopy(policy)
    plain.load_state_dict(merged, strict=False)
    assert merged.keys() == dict(policy.named_parameters()).keys()
    torch.testing.assert_close(logits(plain), logits(adapted), rtol=0, atol=2e-6)
    assert all(torch.equal(t, before[name]) for name, t in base_tensors(adapted).items())
    rounded = dict(merged_tensors(adapted, torch.bfloat16))
    assert all(torch.equal(t, merged[name].bfloat16()) for name, t in rounded.items())


def test_a_base_in_bfloat16_keeps_adapters_in_float32(policy: Any) -> None:
    adapted = moved(policy.to(torch.bfloat16))
    assert {t.dtype for t in adapter_tensors(adapted).values()} == {torch.float32}
    assert {t.dtype for t in base_tensors(adapted).values()} == {torch.bfloat16}
    layer = next(iter(adapter_layers(adapted).values()))
    change = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    exact = layer.base_layer.weight.float() + 2.0 * change
    name = next(iter(adapter_layers(adapted))) + ".weight"
    torch.testing.assert_close(dict(merged_tensors(adapted))[name], exact)


def test_what_a_starts_from_depends_on_seed_and_layer_alone(policy: Any) -> None:
    made = [copy.deepcopy(policy) for _ in range(3)]
    for model, seed in zip(made, (7, 7, 8), strict=True):
        torch.rand(5)
        add_adapter(model, LoraConfig(rank=4), seed=seed)
    first, same, other = (adapter_tensors(model) for model in made)
    assert all(torch.equal(t, same[name]) for name, t in first.items())
    assert not all(torch.equal(t, other[name]) for name, t in first.items())
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(policy.config)
        add_adapter(empty, LoraConfig(rank=4))
    empty.to_empty(device="cpu")
    initialise_adapter(empty, seed=7)
    assert all(torch.equal(t, first[name]) for name, t in adapter_tensors(empty).items())


def test_two_adapters_on_one_base(policy: Any) -> None:
    add_adapter(policy, LoraConfig(rank=4), "maths", seed=1)
    add_adapter(policy, LoraConfig(rank=2, targets=["q_proj"], alpha=6), "law", seed=1)
    assert adapter_tensors(policy, "maths").keys() > adapter_tensors(policy, "law").keys()
    scales = [next(iter(adapter_layers(policy, n).values())).scaling[n] for n in ("maths", "law")]
    assert scales == [2.0, 3.0]
    assert len(base_tensors(policy)) == len(dict(merged_tensors(policy, name="law")))


def test_peft_and_transformers_load_what_is_written(
    policy: Any, tiny_policy: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    adapted = moved(policy, LoraConfig(rank=4, alpha=4, targets=["q_proj", "down_proj"]))
    save_adapter(adapted, tmp_path / "adapter", str(tiny_policy))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_policy)
    assert config["target_modules"] == ["down_proj", "q_proj"]
    wrapped = PeftModel.from_pretrained(copy.deepcopy(policy), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(wrapped), logits(adapted), rtol=0, atol=0)
    policy.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(policy.eval()), logits(adapted), rtol=0, atol=0)


def test_a_reward_models_head_is_trained_whole_and_written(policy: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    kind = transformers.AutoModelForSequenceClassification
    config = copy.deepcopy(policy.config)
    config.num_labels, config.pad_token_id = 1, 0
    base = kind.from_config(config).eval()
    adapted = copy.deepcopy(base)
    add_adapter(adapted, LoraConfig(rank=4))
    assert adapted.score.weight.requires_grad
    with torch.no_grad():
        adapted.score.weight.normal_()
    save_adapter(adapted, tmp_path, "base")
    wrapped = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(logits(wrapped), logits(adapted))


def test_an_adapter_is_loaded_whole_or_not_at_all(policy: Any) -> None:
    adapted, fresh = moved(policy), copy.deepcopy(policy)
    add_adapter(fresh, LoraConfig(rank=4), seed=9)
    tensors = {name: t.detach().clone() for name, t in adapter_tensors(adapted).items()}
    load_adapter(fresh, tensors)
    assert torch.equal(logits(fresh), logits(adapted))
    name, tensor = tensors.popitem()
    with pytest.raises(RuntimeError, match="other tensors"):
        load_adapter(fresh, tensors)
    with pytest.raises(RuntimeError, match=r"lora_"):
        load_adapter(fresh, {**tensors, name: tensor[:1]})


def test_dropout_is_on_only_when_asked_for(policy: Any) -> None:
    adapted = moved(policy, LoraConfig(rank=4, dropout=0.5))
    assert torch.equal(logits(adapted), logits(adapted))
    with adapter_dropout(adapted):
        assert not torch.equal(logits(adapted), logits(adapted))
    assert torch.equal(logits(adapted), logits(adapted))


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "query"])
def test_targets_that_cannot_be_adapted_are_refused_with_those_that_can(
    policy: Any, target: str
) -> None:
    with pytest.raises(UserError, match=target) as caught:
        add_adapter(policy, LoraConfig(targets=["q_proj", target]))
    assert "down_proj, gate_proj, k_proj" in (caught.value.fix or "")


def test_a_model_without_linear_layers_is_refused() -> None:
    bare = nn.Module()
    bare.config = transformers.PretrainedConfig()  # type: ignore[assignment]
    with pytest.raises(UserError, match="no linear layer"):
        add_adapter(bare, LoraConfig())


def test_a_config_says_what_is_wrong_with_it() -> None:
    for bad in ({"rank": 0}, {"dropout": 1.0}, {"targets": []}, {"alpha": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            LoraConfig(**bad)  # type: ignore[arg-type]
    assert LoraConfig(rank=8, alpha=4).scale == 0.5
