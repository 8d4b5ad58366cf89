"""Sizes from a model's config.json, for the families' different names of the same thing."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from cluster.assembly.model_facts import facts_of, read_model_facts
from cluster.contracts.config.base import ModelConfig

QWEN_HALF_B: dict[str, Any] = {
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151_936,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
}
LLAMA_7B: dict[str, Any] = {  # of before grouped-query attention: it names no key-value heads
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11_008,
    "vocab_size": 32_000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
GPT2: dict[str, Any] = {
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_positions": 1024,
    "vocab_size": 50_257,
}


@pytest.mark.parametrize(
    ("tree", "parameters", "cache_bytes", "context"),
    [
        (QWEN_HALF_B, 494e6, 24 * 2 * 2 * 64 * 2, 32_768),
        (LLAMA_7B, 6.74e9, 32 * 2 * 4096 * 2, 4096),
        (GPT2, 124e6, 12 * 2 * 768 * 2, 1024),
        ({"text_config": QWEN_HALF_B, "vision_config": {}}, 494e6, 24 * 2 * 2 * 64 * 2, 32_768),
    ],
    ids=["qwen2", "llama", "gpt2", "multi-modal"],
)
def test_sizes(tree: dict[str, Any], parameters: float, cache_bytes: int, context: int) -> None:
    facts = facts_of(tree)
    assert facts.parameters == pytest.approx(parameters, rel=0.02)
    assert facts.cache_bytes(2) == cache_bytes
    assert facts.context == context


def test_a_mixture_of_experts_counts_all_of_them() -> None:
    one = facts_of(QWEN_HALF_B).parameters
    eight = facts_of({**QWEN_HALF_B, "num_experts": 8}).parameters
    assert eight - one == pytest.approx(7 * 24 * 3 * 896 * 4864)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"hidden_size": "wide"}', '{"hidden_size": 8}'])
def test_a_config_without_shapes_gives_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert read_model_facts(ModelConfig(path=str(tmp_path))) is None


def test_a_missing_directory_gives_none(tmp_path: Path) -> None:
    assert read_model_facts(ModelConfig(path=str(tmp_path / "none"))) is None
    assert read_model_facts(ModelConfig(path=str(tmp_path))) is None


def test_a_directory_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN_HALF_B))
    found = read_model_facts(ModelConfig(path=str(tmp_path)))
    assert found == facts_of(QWEN_HALF_B)


def test_without_a_network_a_hub_id_is_given_up_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def read(*args: Any, local_files_only: bool = False, **rest: Any) -> None:
        asked.append(local_files_only)
        raise OSError("not here")

    def unknown(*args: Any) -> None:
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr("transformers.PretrainedConfig.get_config_dict", read)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr("learner.models.files.getproxies", dict)
    assert read_model_facts(ModelConfig(path="owner/name")) is None
    assert asked == [True]
    monkeypatch.setattr("learner.models.files.getproxies", lambda: {"https": "proxy"})
    assert read_model_facts(ModelConfig(path="owner/name")) is None
    assert asked == [True, True, False]
