"""A complete model directory of a base and an adapter: what engines, evaluations and people load.

One tensor is in memory at a time, so that it needs no machine that could train the model. The
merged weights are those that the workers served, in the type that the learner held the base in.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from cluster.contracts.config.base import DType, ModelConfig
from cluster.contracts.errors import UserError
from cluster.weights.merging import factors_by_weight, merged_weight
from learner.compute.stored import entry_of
from learner.model_files import ADAPTER_FILE, write_model
from learner.models.export import converted, layout_of, stored_tensors, write_small_files
from learner.models.files import checked_config, load_checked, replace_directory
from learner.models.fill import names_in_files, without_weights
from learner.models.hub import hub_snapshot
from learner.models.load import load_tokenizer
from learner.models.weight_files import holds_safetensors, weight_files
from learner.pieces import Entry

Read = Callable[[str], Tensor]


@torch.no_grad()
def write_merged(adapter: Path, base: ModelConfig, target: Path, dtype: DType) -> Path:
    """Merge the adapter in `adapter` (with the tokenizer) into `base`; `target` is the model
    directory, which appears whole or not at all. dtype: of the base, and of what is written.

    Raises UserError where the base is not there or is another model than the adapter is for.
    """
    staging = target.with_name(f".{target.name}.merging")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        _write(adapter, base, staging, dtype)
        shutil.rmtree(target, ignore_errors=True)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def hand_over_adapter(adapter: Path, base: str, target: Path) -> Path:
    """A copy of an adapter's folder that names its base as `base`; the learner may have had it
    under another path. Whole or not at all."""

    def write(folder: Path) -> None:
        shutil.copytree(adapter, folder, dirs_exist_ok=True)
        place = folder / "adapter_config.json"
        config = json.loads(place.read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = base
        place.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    return replace_directory(target, write)


def _write(adapter: Path, base: ModelConfig, root: Path, dtype: DType) -> None:
    factors, scale = factors_by_weight(load_file(adapter / ADAPTER_FILE)), _scale(adapter)
    model, read = _opened(base, dtype)
    own = {name for name, _ in model.named_parameters()}
    if unknown := factors.keys() - own:
        raise UserError(
            f"is no adapter of {base.path}: it changes {min(unknown)}, which that model lacks",
            where=str(adapter),
            fix="give the model that the adapter was trained on",
        )

    def merged(name: str) -> Tensor:
        held = read(name)
        # What the learner froze: the base in its own type.
        tensor = held.to(getattr(torch, dtype)) if held.is_floating_point() else held
        if name in factors:
            tensor = merged_weight(tensor, *factors[name], scale).to(tensor.dtype)
        return tensor.contiguous()

    root.mkdir(parents=True)
    write_small_files(model, load_tokenizer(adapter), root)
    layout, shapes = layout_of(model), stored_tensors(model)

    def entry(name: str, source: str) -> Entry:
        # Read and merged when it is written, not before.
        return replace(
            entry_of(name, shapes[source]), blocks=lambda: entry_of(name, merged(source)).blocks()
        )

    if layout is not None:
        write_model(root, layout, entry)
        return
    # Of a model that keeps other tensors in its files than in memory (experts): all at once.
    whole = converted(model, {name: merged(name) for name in own})
    save_file(whole, root / "model.safetensors", metadata={"format": "pt"})


def _scale(adapter: Path) -> float:
    config: Mapping[str, Any] = json.loads((adapter / "adapter_config.json").read_text())
    return float(config["lora_alpha"]) / int(config["r"])


def _opened(base: ModelConfig, dtype: DType) -> tuple[Any, Read]:
    """(the base without memory, what reads its tensors by name)."""
    kind = transformers.AutoModelForCausalLM
    common = {"revision": base.revision, "trust_remote_code": base.trust_remote_code}
    config = checked_config(kind, base.path, common)
    with without_weights():
        model = kind.from_config(config, dtype=getattr(torch, dtype))
    model.generation_config = _generation_config(base, model)
    folder = hub_snapshot(base.path, base.revision) or Path(base.path)
    names = names_in_files(model, folder) if holds_safetensors(folder) else None
    if names is None:
        state = load_checked(kind, base.path, base.revision, base.trust_remote_code).state_dict()
        return model, lambda name: state[name]
    places: dict[str, Path] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as opened:
            places |= dict.fromkeys(opened.keys(), file)

    def read(name: str) -> Tensor:
        source = next(n for n in (names.get(name, name), name) if n in places)
        with safe_open(places[source], framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(source)
            return tensor

    return model, read


def _generation_config(base: ModelConfig, model: Any) -> Any:
    try:
        return transformers.GenerationConfig.from_pretrained(base.path, revision=base.revision)
    except OSError:
        return model.generation_config
