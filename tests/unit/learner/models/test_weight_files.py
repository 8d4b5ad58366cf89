"""What is wrong with weight files, seen in their headers alone."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.contracts.errors import UserError
from learner.models.files import check_causal_model
from learner.models.tiny import fresh_model, train_tokenizer
from learner.models.weight_files import tensor_shapes


@pytest.fixture
def copied(tiny_policy: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_policy, tmp_path / "policy"))


def check(path: Path) -> None:
    check_causal_model(str(path), None, False)


@pytest.mark.parametrize("arch", ["qwen2", "llama", "qwen3", "gemma", "mistral"])
def test_a_complete_model_of_each_family_passes(tmp_path: Path, arch: str) -> None:
    tokenizer = train_tokenizer(["a few words"] * 3, 320, tmp_path)
    fresh_model(tokenizer, tmp_path, hidden=64, layers=2, heads=2, intermediate=64, arch=arch)  # type: ignore[arg-type]
    check(tmp_path)


def test_a_file_cut_off_anywhere_is_named(copied: Path) -> None:
    file = copied / "model.safetensors"
    whole = file.read_bytes()
    for size in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"model.safetensors: is (cut off|no safetensors file)"):
            check(copied)


@pytest.mark.parametrize(
    "header",
    [b"[]", b"{}x", b'{"a": 1}', b'{"a": {"shape": 3}}', b'{"a": {"shape": [1]}}', b"\xff"],
)
def test_a_damaged_header_is_named(tmp_path: Path, header: bytes) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(UserError, match="is no safetensors file"):
        tensor_shapes(file)


def test_tensors_of_another_shape_or_missing(copied: Path) -> None:
    file = copied / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    cut = {**tensors, name: torch.zeros(3, 4)}
    save_file(cut, file)
    with pytest.raises(UserError, match=rf"{name} has shape \[3, 4\], the config wants \["):
        check(copied)
    del cut[name]
    save_file(cut, file)
    with pytest.raises(UserError, match=rf"lack 1 tensors \(first: {name}\)"):
        check(copied)


def test_names_that_only_transformers_knows_are_left_to_it(copied: Path) -> None:
    file = copied / "model.safetensors"
    tensors = load_file(file)
    save_file({f"old.{name}": tensor for name, tensor in tensors.items()}, file)
    check(copied)


def test_shards_are_looked_for_by_the_index(copied: Path) -> None:
    tensors = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, own in halves.items():
        save_file({name: tensors[name] for name in own}, copied / file)
    weight_map = {name: file for file, own in halves.items() for name in own}
    index = copied / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    check(copied)
    (copied / "b.safetensors").unlink()
    with pytest.raises(UserError, match=r"1 of 2 weight files are missing \(first: b.safetensors"):
        check(copied)
    index.write_text("{")
    with pytest.raises(UserError, match=r"index.json: is damaged"):
        check(copied)


def test_no_weights_at_all(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no weights \(model.safetensors is missing"):
        check(copied)
    (copied / "pytorch_model.bin").touch()  # in torch's old format: left to transformers
    check(copied)
