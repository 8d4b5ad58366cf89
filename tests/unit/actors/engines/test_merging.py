"""An adapter comes, the whole model goes to the engine: the same bits as at the learner."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from actors.engines import merging
from actors.engines.merging import Merger
from actors.engines.transformers_engine import TransformersEngine
from actors.settings import EngineSettings
from cluster.contracts.config.lora import LoraConfig
from cluster.contracts.errors import WeightMismatch
from cluster.contracts.records import LoraUpdate
from cluster.weights.merging import base_fingerprint
from learner.models.lora import (
    adapter_layers,
    adapter_tensors,
    add_adapter,
    base_tensors,
    hold_base_in,
    merged_tensors,
)

KEYS = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
LORA = LoraConfig(rank=4)


def settings(path: Path, dtype: str = "float32") -> EngineSettings:
    return EngineSettings(
        model_path=str(path), dtype=dtype, max_tokens=4, stop_token_ids=(1,), max_model_len=16
    )


def adapted(path: Path, dtype: str) -> Any:
    """The learner's policy, after its adapter has learnt something."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    hold_base_in(model, dtype)
    add_adapter(model, LORA)
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            layer.lora_B["default"].weight.normal_(0, 0.1)
    return model


def sent(model: Any) -> list[tuple[str, Any]]:
    return [(name, t.detach().numpy()) for name, t in adapter_tensors(model).items()]


def update_of(model: Any, base_dtype: str, dtype: str) -> LoraUpdate:
    base = base_fingerprint(base_tensors(model).items(), base_dtype)
    return LoraUpdate(base=base, base_dtype=base_dtype, scale=LORA.scale, dtype=dtype)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    config = transformers.Qwen2Config(**KEYS)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("files", [True, False], ids=["mapped", "loaded"])
@pytest.mark.parametrize(
    ("base_dtype", "dtype"),
    [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")],
)
def test_a_worker_merges_the_bits_that_the_learner_would(
    path: Path, base_dtype: str, dtype: str, files: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not files:
        monkeypatch.setattr(merging, "_from_files", lambda *given: None)
    model = adapted(path, base_dtype)
    update = update_of(model, base_dtype, dtype)
    merger = Merger(settings(path, dtype), "cpu")
    for _ in range(2):  # the base is as it was, after a merge
        found = dict(merger.whole(update, sent(model)))
        wanted = dict(merged_tensors(model, getattr(torch, dtype)))
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert torch.equal(found[name], tensor), name
            assert found[name].dtype == tensor.dtype


def test_an_engine_serves_the_merged_model_and_proves_it(path: Path) -> None:
    model = adapted(path, "float32")
    engine = TransformersEngine(dataclasses.replace(settings(path), weights="published"))
    engine.stage(
        Merger(settings(path), "cpu").whole(update_of(model, "float32", "float32"), sent(model)), 1
    )
    engine.swap(1)
    engine.prove()
    ids = [5, 6, 7, 8]
    with torch.no_grad():
        every = model(torch.tensor([ids])).logits[0, :-1].log_softmax(dim=-1)
    wanted = every.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    found = torch.tensor(engine.sequence_logprobs(ids))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_what_does_not_fit_the_base_is_refused_and_says_why(path: Path) -> None:
    model = adapted(path, "float32")
    update, merger = update_of(model, "float32", "float32"), Merger(settings(path), "cpu")
    other = dataclasses.replace(update, base="of another model")
    with pytest.raises(WeightMismatch, match="not the one that the learner has"):
        list(merger.whole(other, sent(model)))
    with pytest.raises(WeightMismatch, match="an A and no B"):
        list(merger.whole(update, sent(model)[:1]))
    strange = [(name.replace("q_proj", "z_proj"), array) for name, array in sent(model)]
    with pytest.raises(WeightMismatch, match="z_proj"):
        list(merger.whole(update, strange))
    short = [(n, array[:, :8] if "lora_A" in n else array) for n, array in sent(model)]
    with pytest.raises(WeightMismatch, match="came for a weight of"):
        list(merger.whole(update, short))
