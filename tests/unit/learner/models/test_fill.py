"""Models that are made without memory and filled from their files part by part.

Sharded over several processes: `tests/unit/learner/compute/test_sharded_models.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from cluster.contracts.config.base import ModelConfig
from cluster.contracts.errors import UserError
from learner.models.files import Placing
from learner.models.fill import without_weights
from learner.models.load import load_policy, load_sequence_classifier, load_trunk

SMALL: dict[str, Any] = {
    "vocab_size": 33,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"tie_word_embeddings": True},
    "llama": {},
    "gemma3_text": {"layer_types": ["full_attention", "full_attention"]},
    "gpt_neox": {},  # its norms have other names in old files, and are renamed
    "qwen3_moe": EXPERTS,  # its experts are merged at load: read whole
}


def saved(kind: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    config = transformers.AutoConfig.for_model(kind, **{**SMALL, **FAMILIES[kind]})
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    model.generation_config.eos_token_id = [2, 5]
    model.save_pretrained(folder, max_shard_size="10KB")
    return folder


def here(prepare: Callable[[Any], Any] = lambda model: model, **given: Any) -> Placing:
    return Placing(prepare=prepare, device=torch.device("cpu"), **given)


def whole_state(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = load_policy(ModelConfig(path=str(folder))).state_dict()
    return state


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_filled_model_has_the_bits_of_a_loaded_one_and_no_memory_before(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, empty = saved(kind, tmp_path), []

    def look(model: Any) -> Any:
        empty.append(all(parameter.is_meta for parameter in model.parameters()))
        return model

    with caplog.at_level(logging.WARNING):
        model = load_policy(ModelConfig(path=str(folder)), here(look))
    assert empty == [True]
    assert ("reads the whole model" in caplog.text) == (kind == "qwen3_moe")
    expected = load_policy(ModelConfig(path=str(folder)))
    assert model.generation_config.eos_token_id == [2, 5]
    assert model.training is False
    for (name, ours), (_, theirs) in zip(
        [*model.named_parameters(), *model.named_buffers()],
        [*expected.named_parameters(), *expected.named_buffers()],
        strict=True,
    ):
        assert torch.equal(ours, theirs), name
        assert ours.dtype == theirs.dtype
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected(input_ids=ids).logits)


def test_a_tied_head_is_one_tensor_under_whichever_name_the_file_has(tmp_path: Path) -> None:
    folder = saved("qwen2", tmp_path)
    expected = whole_state(folder)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if "model.embed_tokens.weight" in tensors:
            tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
            save_file(tensors, file, metadata={"format": "pt"})
    model = load_policy(ModelConfig(path=str(folder)), here())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, expected["lm_head.weight"])


def test_a_trunk_and_a_classifier_are_filled_from_the_files_of_a_policy(tmp_path: Path) -> None:
    cfg = ModelConfig(path=str(saved("llama", tmp_path)))
    expected = whole_state(tmp_path)
    trunk = load_trunk(cfg, here(dtype=torch.bfloat16))
    for name, tensor in trunk.named_parameters():
        assert torch.equal(tensor, expected[f"model.{name}"].bfloat16()), name
    model = load_sequence_classifier(cfg, pad_token_id=0, heads=2, placing=here())
    assert torch.equal(model.score.weight, torch.zeros(2, 32))
    assert torch.equal(model.model.norm.weight, expected["model.norm.weight"])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "lack 1 tensors"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(7)}), "has shape \\[7\\]"),
    ],
)
def test_files_that_are_not_the_model_are_refused_by_name(
    tmp_path: Path, damage: Callable[[Any], Any], says: str
) -> None:
    folder = saved("llama", tmp_path)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if "model.norm.weight" in tensors:
            damage(tensors)
            save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=says):
        load_policy(ModelConfig(path=str(folder)), here())


def test_a_cut_off_file_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    file = min(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(UserError, match="is cut off"):
        load_policy(ModelConfig(path=str(folder)), here(lambda _: pytest.fail("made")))


def test_buffers_have_their_numbers_where_parameters_have_no_memory() -> None:
    config = transformers.AutoConfig.for_model("qwen2", **{**SMALL, "tie_word_embeddings": True})
    with without_weights():
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert float(model.model.rotary_emb.inv_freq[0]) == 1.0
    assert not torch.nn.Linear(2, 2).weight.is_meta
