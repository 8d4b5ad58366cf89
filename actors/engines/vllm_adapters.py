"""Several LoRA adapters on one vLLM engine, each of them updated while requests are in flight.

stage: tensors ──▶ an adapter per policy, in memory, with digests of what it must compute with
swap:  all adapters change places with those in force, between two steps; the base stays
prove: what lies in the slots that the layers read is compared with the digests

vLLM's own door to adapters is a folder on a disk, and it skips tensors that it has no layer for
without a word. Here adapters come as tensors, and one that does not fit is refused.

The engine has one slot more than adapters. It stays empty: see ``lora_kernels`` on index -1.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest

from actors.engines.host_tensors import to_tensor
from actors.engines.proof import number_sum, require_none_wrong
from actors.engines.vllm_weights import WeightStage
from actors.settings import AdapterSettings
from cluster.contracts.errors import EngineFailure, Fatal, UserError, WeightMismatch

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM can be built for, ``max_lora_rank``


@dataclass(frozen=True, slots=True)
class Adapter:
    """tensors: under the names that peft gives them in its files. scale: alpha / rank."""

    number: int  # vLLM's name for it, from 1
    rank: int
    alpha: float
    tensors: Mapping[str, torch.Tensor]


def adapter_args(settings: AdapterSettings | None) -> dict[str, Any]:
    """The arguments of vLLM's engine that concern adapters."""
    if settings is None:
        return {}
    count = len(settings.names)
    return {
        "enable_lora": True,
        "max_loras": count + 1,
        "max_cpu_loras": count + 1,
        "max_lora_rank": next(rank for rank in RANKS if rank >= settings.largest_rank),
    }


class AdapterStage(WeightStage):
    """What vLLM adds to its worker class, for an engine with adapters."""

    def accord_stage_adapters(self, adapters: Iterable[Adapter]) -> None:
        """Prepare these beside those in force; any thread."""
        self._accord_next = [_prepare(self._worker_manager, adapter) for adapter in adapters]

    def accord_install_adapters(self) -> None:
        """Put what was prepared in force. Requests in flight go on with it."""
        manager = self._worker_manager._adapter_manager
        for prepared in self._accord_next:
            manager.remove_adapter(prepared.model.id)
        for prepared in self._accord_next:
            manager.add_adapter(prepared.model)
            manager.activate_adapter(prepared.model.id)
        self._accord_digests = self._in_force | {p.model.id: p.digests for p in self._accord_next}
        self._accord_next = []

    def accord_wrong_adapters(self) -> list[str]:
        """Names of layers whose slots do not hold what was installed; any thread."""
        manager = self._worker_manager._adapter_manager
        wrong = []
        for name, layer in manager.modules.items():
            for slot, number in enumerate(manager.lora_index_to_id):
                expected = self._in_force.get(number, {}).get(name, 0)
                if _slot_sum(layer, slot) != expected:
                    wrong.append(f"{name} (adapter {number})")
        missing = self._in_force.keys() - set(manager.lora_index_to_id)
        return wrong + [f"adapter {number}" for number in sorted(missing)]

    @property
    def _worker_manager(self) -> Any:
        return self.model_runner.lora_manager

    @property
    def _in_force(self) -> dict[int, dict[str, int]]:
        """Adapter -> layer -> the sum over the numbers that it must compute with."""
        held: dict[int, dict[str, int]] = getattr(self, "_accord_digests", {})
        return held


@dataclass(frozen=True, slots=True)
class _Prepared:
    model: Any
    digests: dict[str, int]


def _prepare(worker_manager: Any, adapter: Adapter) -> _Prepared:
    """The adapter as vLLM takes it. Raises WeightMismatch where a tensor of it has no layer."""
    manager = worker_manager._adapter_manager
    helper = PEFTHelper(
        r=adapter.rank, lora_alpha=adapter.alpha, target_modules=_targets(adapter.tensors)
    )
    helper.validate_legal(worker_manager.lora_config)
    mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
    dtype = worker_manager.lora_config.lora_dtype
    # Copies: vLLM multiplies B by the scale in place, and what came may be another's memory.
    own = {name: t.to(dtype, copy=True).contiguous() for name, t in adapter.tensors.items()}
    model = LoRAModel.from_lora_tensors(
        adapter.number,
        own,
        helper,
        device="cpu",
        dtype=dtype,
        weights_mapper=mapper.get_rename_mapper() if mapper is not None else None,
    )
    whole = {part: name for name, parts in manager.packed_modules.items() for part in parts}
    digests: dict[str, int] = {}
    taken = 0
    for part, weights in model.loras.items():
        name = whole.get(part, part)
        if name not in manager.modules:
            raise WeightMismatch(f"vLLM has no adapter for the layer {part!r} of this model")
        if weights.lora_a is None or weights.lora_b is None:
            raise WeightMismatch(f"the adapter's layer {part!r} lacks its A or its B")
        taken += number_sum([weights.lora_a, weights.lora_b])
        total = number_sum([weights.lora_a, weights.lora_b * weights.scaling])
        digests[name] = (digests.get(name, 0) + total) % (1 << 64)
    if taken % (1 << 64) != number_sum(own.values()):
        raise Fatal("vLLM did not take every tensor of the adapter")
    return _Prepared(model, digests)


def _slot_sum(layer: Any, slot: int) -> int:
    held = (layer.lora_a_stacked, layer.lora_b_stacked)
    # A layer with one part holds a tensor, one that fuses several a tuple of them.
    stacked = [t for one in held for t in ((one,) if isinstance(one, torch.Tensor) else one)]
    return number_sum(tensor[slot] for tensor in stacked)


def _targets(tensors: Iterable[str]) -> list[str]:
    return sorted({name.rsplit(".lora_", 1)[0].rpartition(".")[2] for name in tensors})


class ServedAdapters:
    """The adapters of one engine, by name: what came last of each, and what is in force.

    ``call`` runs a method of ``AdapterStage`` in vLLM's worker.
    """

    def __init__(self, settings: AdapterSettings, call: Any) -> None:
        self._settings = settings
        self._call = call
        self._numbers = {name: place for place, name in enumerate(settings.names, start=1)}
        self._shapes: dict[str, tuple[int, ...]] = {}  # of an update, once there was one
        self._served: set[str] = set()
        fixed = [self._from_folder(name, folder) for name, folder, _ in settings.fixed]
        if fixed:
            try:
                self._call("accord_stage_adapters", (fixed,))
            except (WeightMismatch, ValueError) as problem:
                folders = ", ".join(folder for _, folder, _ in settings.fixed)
                raise UserError(
                    f"the adapter does not fit the model: {problem}",
                    where=folders,
                    fix="give an adapter that was trained on this model",
                ) from problem
            self.install({name for name, _, _ in settings.fixed})

    def request(self, name: str, version: int) -> LoRARequest | None:
        """How vLLM is told whose request it is. The version is part of a cached block's key."""
        if not name:
            return None
        if name not in self._served:
            raise EngineFailure(f"adapter {name!r} was asked for before its weights came")
        return LoRARequest(name, self._numbers[name], f"accord:{name}@{version}")

    def check(self, name: str) -> None:
        """Raise UserError for a name that the engine does not know."""
        if name and name not in self._numbers:
            raise UserError(
                f"this engine has no adapter {name!r}",
                fix=f"use one of {', '.join(self._numbers)}",
            )

    def stage(self, arrays: Mapping[str, Any]) -> None:
        """arrays: ``NAME/PEFT NAME`` -> array, of all adapters that are trained. Raises
        WeightMismatch for an update that does not fit; those in force stay."""
        self._check_update(arrays)
        updated: dict[str, dict[str, torch.Tensor]] = {name: {} for name in self._settings.trained}
        for key, array in arrays.items():
            name, _, tensor = key.partition("/")
            updated[name][tensor] = to_tensor(array)
        self._call(
            "accord_stage_adapters",
            (
                [
                    Adapter(self._numbers[name], self._settings.rank, self._settings.alpha, tensors)
                    for name, tensors in updated.items()
                ],
            ),
        )

    def install(self, names: Iterable[str] | None = None) -> None:
        self._call("accord_install_adapters", ())
        self._served |= set(self._settings.trained if names is None else names)

    def prove(self, engine: str, version: int) -> None:
        require_none_wrong(self._call("accord_wrong_adapters", ()), engine, version)

    def _check_update(self, arrays: Mapping[str, Any]) -> None:
        trained = set(self._settings.trained)
        owners = {key.partition("/")[0] for key in arrays}
        if owners != trained:
            raise WeightMismatch(
                f"the update is of the adapters {sorted(owners)}, the engine serves "
                f"{sorted(trained)}"
            )
        shapes = {key: tuple(array.shape) for key, array in arrays.items()}
        if self._shapes and shapes != self._shapes:
            differ = sorted(dict(shapes.items() ^ self._shapes.items()))
            raise WeightMismatch(f"the update does not fit the one before it: {differ[:3]}")
        for key, shape in shapes.items():
            place = 0 if ".lora_A." in key else 1
            if shape[place] != self._settings.rank:
                raise WeightMismatch(
                    f"{key!r} is {shape}, the engine serves rank {self._settings.rank}"
                )
        self._shapes = shapes

    def _from_folder(self, name: str, folder: str) -> Adapter:
        config, tensors = read_adapter(folder)
        return Adapter(self._numbers[name], int(config["r"]), float(config["lora_alpha"]), tensors)


def read_adapter(folder: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(adapter_config.json, tensors) of a folder that peft wrote. Raises UserError."""
    root = Path(folder)
    try:
        config = json.loads((root / "adapter_config.json").read_text("utf-8"))
        return config, load_file(root / "adapter_model.safetensors")
    except (OSError, ValueError) as problem:
        raise UserError(
            f"this is not the folder of a LoRA adapter: {problem}",
            where=folder,
            fix="give a folder with adapter_config.json and adapter_model.safetensors",
        ) from None
