"""Loading: one clear message for each thing that can be wrong. Saving: complete or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.contracts.chat import render_answered, render_prompt
from cluster.contracts.config.base import ModelConfig
from cluster.contracts.errors import UserError
from learner.models.files import replace_directory
from learner.models.heads import SharedValueHead
from learner.models.load import ValueModel, load_policy, load_tokenizer, save_policy, stop_token_ids
from learner.models.reward_artifact import tokenizer_fingerprint
from learner.models.tiny import fresh_model, train_tokenizer


@pytest.fixture
def copied(tiny_policy: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_policy, tmp_path / "policy"))


def policy_at(path: Any) -> Any:
    return load_policy(ModelConfig(path=str(path)))


def test_a_policy_is_float32_trainable_and_without_dropout(tiny_policy: Path) -> None:
    policy = policy_at(tiny_policy)
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in policy.parameters())
    assert not policy.training


def test_paths_that_are_no_model(tiny_policy: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "none", "./none", "runs/a/policy", "cluster/none"):
        with pytest.raises(UserError, match="no such model directory"):
            policy_at(path)
    with pytest.raises(UserError, match=r"holds no model \(config.json"):
        policy_at(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        policy_at(tiny_policy / "config.json")
    with pytest.raises(UserError, match=r"cannot load the tokenizer|holds no model"):
        load_tokenizer(tmp_path)


def test_a_directory_without_tokenizer_files(copied: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copied / name).unlink()
    with pytest.raises(UserError, match=r"holds no tokenizer|cannot load the tokenizer") as caught:
        load_tokenizer(copied)
    assert str(copied) in caught.value.where


def test_a_hub_id_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.is_offline_mode", lambda: True)
    with pytest.raises(UserError, match="hub id reachable from here"):
        policy_at("no-one/no-such-model")


def test_an_unknown_architecture(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "model_type": "alien"}))
    with pytest.raises(UserError, match=r"cannot load the model.*alien"):
        policy_at(copied)


@pytest.mark.parametrize("damage", ["half", "gone", "lacking"])
def test_weights_that_are_damaged_missing_or_incomplete(copied: Path, damage: str) -> None:
    from safetensors.torch import load_file, save_file

    weights = copied / "model.safetensors"
    if damage == "half":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "gone":
        weights.unlink()
    else:
        tensors = load_file(weights)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    expected = {
        "half": "is no safetensors file|is cut off",
        "gone": "holds no weights",
        "lacking": "lack 1 tensors.*up_proj",
    }
    with pytest.raises(UserError, match=expected[damage]):
        policy_at(copied)


def test_a_saved_policy_is_the_same_policy(copied: Path, tmp_path: Path) -> None:
    policy, tokenizer = policy_at(copied), load_tokenizer(copied)
    with torch.no_grad():
        policy.get_input_embeddings().weight.add_(0.01)
    place = tmp_path / "out" / "policy"
    place.mkdir(parents=True)
    (place / "leftover").touch()
    save_policy(policy, tokenizer, place)
    assert sorted(p.name for p in place.parent.iterdir()) == ["policy"]
    assert not (place / "leftover").exists()
    again = policy_at(place)
    for (name, a), (_, b) in zip(policy.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert tokenizer_fingerprint(load_tokenizer(place)) == tokenizer_fingerprint(tokenizer)


def test_a_failed_save_leaves_what_was_there(tmp_path: Path) -> None:
    place = tmp_path / "policy"
    replace_directory(place, lambda folder: (folder / "a").touch())

    def fails(folder: Path) -> None:
        (folder / "half").touch()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_directory(place, fails)
    assert [p.name for p in tmp_path.iterdir()] == ["policy"]
    assert [p.name for p in place.iterdir()] == ["a"]


def test_stop_tokens_are_the_tokenizers_and_the_models(copied: Path) -> None:
    tokenizer = load_tokenizer(copied)
    end = tokenizer.eos_token_id
    assert stop_token_ids(copied, tokenizer) == (end,)
    config = json.loads((copied / "generation_config.json").read_text())
    config["eos_token_id"] = [7, end]
    (copied / "generation_config.json").write_text(json.dumps(config))
    assert stop_token_ids(copied, tokenizer) == (end, 7)
    save_policy(policy_at(copied), tokenizer, copied)
    assert stop_token_ids(copied, tokenizer) == (end, 7)


def test_a_template_can_be_given(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ messages[0]['content'] }}!")
    cfg = ModelConfig(path=str(copied), chat_template=str(tmp_path / "t.jinja"))
    given = load_tokenizer(cfg)
    assert given.chat_template.endswith("!")
    assert tokenizer_fingerprint(given) != tokenizer_fingerprint(load_tokenizer(copied))
    with pytest.raises(UserError, match="cannot read the chat template"):
        load_tokenizer(ModelConfig(path=str(copied), chat_template=str(tmp_path / "none")))


def test_the_fresh_tokenizer_and_template(tiny_policy: Path) -> None:
    tokenizer = load_tokenizer(tiny_policy)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    text = "Größe 7 日本\n\n  x"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    messages = [{"role": "system", "content": "good"}, {"role": "user", "content": "how long"}]
    prompt, answer = render_answered(tokenizer, messages, "ten hours")
    assert prompt == render_prompt(tokenizer, messages)
    assert tokenizer.decode(prompt) == "<|system|>good<|end|><|user|>how long<|end|><|assistant|>"
    assert tokenizer.decode(answer) == "ten hours<|end|>"
    assert answer[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("arch", ["qwen2", "llama", "qwen3", "gemma", "mistral"])
def test_fresh_models_load_and_depend_on_their_seed(
    tiny_policy: Path, tmp_path: Path, arch: Any
) -> None:
    tokenizer = load_tokenizer(tiny_policy)
    sizes: Any = {"hidden": 16, "layers": 1, "heads": 2, "intermediate": 24, "arch": arch}
    paths = [
        fresh_model(tokenizer, tmp_path / name, **sizes, seed=seed)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    a, b, c = (policy_at(path).get_input_embeddings().weight for path in paths)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert policy_at(paths[0]).get_output_embeddings().weight.shape == a.shape


def test_a_vocabulary_smaller_than_the_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least 261 tokens"):
        train_tokenizer(["a"], 200, tmp_path)


def test_values_start_at_zero_and_their_trunk_is_a_copy(tiny_policy: Path) -> None:
    policy = policy_at(tiny_policy)
    values = ValueModel.from_policy(policy)
    ids = torch.tensor([[5, 6, 7]])
    assert values(ids, torch.ones_like(ids)).abs().max() == 0
    assert SharedValueHead(4)(torch.randn(2, 3, 4)).shape == (2, 3)
    shared = {id(p) for p in policy.parameters()} & {id(p) for p in values.parameters()}
    assert not shared
