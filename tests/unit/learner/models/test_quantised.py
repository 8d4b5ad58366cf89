"""A base in 8 or 4 bits: its size, what it computes, and adapters that learn on it."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers

from actors.engines.merging import Merger
from actors.settings import EngineSettings
from cluster.contracts.config.lora import LoraConfig
from cluster.contracts.errors import UserError, WeightMismatch
from cluster.contracts.records import StepInput
from cluster.weights.low_precision import Precision, held_bytes, plain, quantised, round_trip
from learner.models.lora import add_adapter, merged_tensors
from learner.models.quantised import base_bytes, quantise_base
from learner.rl.learner import PPOLearner

pytestmark = pytest.mark.torchao
IDS = torch.arange(3, 43)[None, :] % 60


def model() -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    add_adapter(made, LoraConfig(rank=4))
    return made


def loss(made: Any) -> torch.Tensor:
    return made(input_ids=IDS, labels=IDS).loss


@pytest.mark.parametrize(("precision", "bytes_each"), [("8bit", 1.07), ("4bit", 0.54)])
def test_a_weight_takes_so_many_bytes_and_stands_for_the_same_numbers_each_time(
    precision: Precision, bytes_each: float
) -> None:
    weight = torch.randn(256, 128, generator=torch.Generator().manual_seed(0))
    held = quantised(weight, precision)
    assert held_bytes(held) / weight.numel() <= bytes_each
    again = round_trip(weight, precision)
    assert torch.equal(plain(held), again)
    assert again.dtype == weight.dtype
    assert float((again - weight).abs().mean()) < 0.12 * float(weight.abs().mean())
    x = torch.randn(3, 128, requires_grad=True)
    y = torch.nn.functional.linear(x, held)
    torch.testing.assert_close(y, x @ again.t(), atol=1e-4, rtol=1e-4)
    y.sum().backward()
    torch.testing.assert_close(x.grad, again.sum(0).expand(3, -1), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("precision", "share", "near"), [("8bit", 0.4, 1e-2), ("4bit", 0.3, 0.2)])
def test_a_quantised_base_starts_near_the_whole_one_and_its_adapters_learn(
    precision: Precision, share: float, near: float
) -> None:
    made = model()
    whole, start = base_bytes(made), float(loss(made).detach())
    quantise_base(made, precision)
    assert base_bytes(made) < share * whole
    assert abs(float(loss(made).detach()) - start) < near
    params = [p for p in made.parameters() if p.requires_grad]
    assert len(params) == 2 * 7 * 2
    optimizer = torch.optim.AdamW(params, lr=1e-2)
    for _ in range(12):
        optimizer.zero_grad()
        loss(made).backward()
        optimizer.step()
    assert float(loss(made).detach()) < start - 0.5


@pytest.mark.parametrize("precision", ["8bit", "4bit"])
def test_what_is_exported_is_what_was_trained(precision: Precision) -> None:
    made = model()
    plain_copy = copy.deepcopy(made)
    quantise_base(made, precision)
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
    merged = dict(merged_tensors(made))
    for module in list(plain_copy.modules()):
        if hasattr(module, "base_layer"):
            module._disable_adapters = True
    named = {n.replace(".base_layer.", "."): p for n, p in plain_copy.named_parameters()}
    for name, tensor in merged.items():
        named[name].data.copy_(tensor)
    torch.testing.assert_close(loss(plain_copy), loss(made), atol=1e-4, rtol=1e-4)


def test_a_shape_without_a_four_bit_form_is_said() -> None:
    with pytest.raises(UserError, match=r"blocks of 64 .*no 4-bit form"):
        quantised(torch.randn(10, 10), "4bit")


@pytest.mark.parametrize("precision", ["8bit", "4bit"])
def test_a_worker_merges_into_the_numbers_that_the_learner_computed_with(
    world: ModuleType, tiny: Path, precision: str
) -> None:
    publisher = world.KeepingPublisher()
    lora = LoraConfig.model_validate({"rank": 4, "base": precision})
    settings = world.make_settings(
        tiny,
        learner={"lr": 0.1, "eps": 1e-3},
        algorithm={"advantage": "grpo", "kl": {"coef": 0.1, "estimator": "k1"}},
        lora=lora,
    )
    learner = PPOLearner(settings, publisher)
    learner.start()
    source = transformers.AutoModelForCausalLM.from_pretrained(tiny).eval()
    table = world.table_of(world.make_groups(source))
    result = learner.step(StepInput(step=0, group_ids=(0, 1, 2, 3), payloads=(table,)))
    update = result.manifest.lora
    assert update is not None
    assert update.held == precision
    engine = EngineSettings(
        model_path=str(tiny), max_tokens=4, stop_token_ids=(1,), max_model_len=32
    )
    merger = Merger(engine, "cpu")
    whole = dict(merger.whole(update, publisher.arrays.items()))
    moved = max(float((whole[n] - p).abs().max()) for n, p in source.named_parameters())
    assert moved > 1e-4
    for name, parameter in source.named_parameters():
        parameter.data.copy_(whole[name])
    canary = result.manifest.canary
    ids = torch.tensor([canary.token_ids])
    with torch.no_grad():
        every = source(ids).logits[0, :-1].log_softmax(dim=-1)
    wanted = every.gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(canary.logprobs), wanted, rtol=0, atol=2e-5)
    with pytest.raises(WeightMismatch, match="other weights"):
        list(merger.whole(dataclasses.replace(update, held="full"), publisher.arrays.items()))
