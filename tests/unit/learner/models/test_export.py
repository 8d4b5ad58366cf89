"""A model's files written tensor by tensor are the ones that `save_pretrained` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from learner.compute.ranks import SINGLE
from learner.compute.stored import copied, entry_of
from learner.model_files import LAYOUT, PARTS, POLICY, Layout, below, complete, write_model
from learner.models.export import converted, layout_of, stored_tensors, write_small_files
from learner.models.load import load_tokenizer

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}


def made(arch: str, **changes: Any) -> Any:
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(arch, **SMALL, **changes)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def written(model: Any, root: Path) -> dict[str, torch.Tensor]:
    """As a checkpoint of one process writes it."""
    tensors, layout = stored_tensors(model), layout_of(model)
    if layout is None:
        tensors = converted(model, tensors)
        sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
        layout = Layout.of(sizes, {name: name for name in sizes})
    write_model(
        root / POLICY, layout, lambda name, source: entry_of(name, tensors[source].detach())
    )
    return load_file(root / POLICY / "model.safetensors")


@pytest.mark.parametrize(
    ("model", "streams"),
    [
        (lambda: made("qwen2", tie_word_embeddings=True), True),
        (lambda: made("llama", tie_word_embeddings=False), True),
        (lambda: made("gemma", tie_word_embeddings=True, head_dim=8), True),
        # Its experts are one tensor in memory and many in the files.
        (lambda: made("mixtral", num_local_experts=2), False),
    ],
    ids=["tied", "untied", "gemma", "experts"],
)
def test_names_and_numbers_are_those_of_save_pretrained(
    model: Any, streams: bool, tmp_path: Path
) -> None:
    given = model()
    assert (layout_of(given) is not None) == streams
    found = written(given, tmp_path)
    given.save_pretrained(tmp_path / "theirs")
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    assert found.keys() == theirs.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in theirs.items())


def test_a_model_in_several_files_put_together_from_pieces_loads(
    tiny: Path, tmp_path: Path
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny).eval()
    layout = layout_of(model, limit=30_000)
    assert layout is not None
    small = write_small_files(model, load_tokenizer(tiny), tmp_path / POLICY)
    files = [below(POLICY, file) for file in small]
    files += copied(stored_tensors(model), SINGLE).write(tmp_path, PARTS)
    (tmp_path / PARTS / LAYOUT).write_text(layout.text())
    finished = {file.name: file for file in complete(tmp_path, files)}
    weights = sorted(name for name in finished if name.startswith("policy/model-"))
    assert len(weights) > 2
    assert all((tmp_path / name).stat().st_size < 60_000 for name in weights[1:])
    assert not (tmp_path / PARTS).exists()
    assert finished.keys() == {
        path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()
    }
    index = json.loads((tmp_path / POLICY / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(layout_names(layout))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / POLICY)
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name
    assert (tmp_path / POLICY / "tokenizer.json").exists()
    assert again.generation_config.eos_token_id == model.generation_config.eos_token_id


def layout_names(layout: Layout) -> list[str]:
    return [name for names in layout.files.values() for name in names]
