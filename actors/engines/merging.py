"""LoRA on a worker: an adapter comes, the whole model goes to the engine.

The engine serves plain weights at full speed and knows nothing of adapters: canary and proof of a
swap are those of a whole update. The base is read from the model's files, again for each update and
from the operating system's cache, so that it takes no memory of the process's own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from actors.engines.host_tensors import parameter_shapes, published_tensors, to_tensor
from actors.settings import EngineSettings
from cluster.contracts.errors import WeightMismatch
from cluster.contracts.records import LoraUpdate
from cluster.weights.low_precision import round_trip
from cluster.weights.merging import base_fingerprint, factors_by_weight, merged_weight

Read = Callable[[str], Tensor]


class Base:
    """The weights of the model that adapters are merged into, by their published names."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self.names = tuple(parameter_shapes(settings))
        self._read = _from_files(settings, self.names) or _from_transformers(settings)
        self._fingerprints: dict[tuple[str, str], str] = {}

    def tensor(self, name: str, update: LoraUpdate, adapted: Collection[str]) -> Tensor:
        """As the learner's base has it, on the host; only to be read. adapted: the weights with an
        adapter, which may be held in fewer bits."""
        tensor = self._read(name).to(getattr(torch, update.base_dtype))
        return round_trip(tensor, update.held) if name in adapted else tensor

    def fingerprint(self, update: LoraUpdate, adapted: Collection[str]) -> str:
        """Of all of it; computed once."""
        key = (update.base_dtype, update.held)
        if key not in self._fingerprints:
            every = ((name, self.tensor(name, update, adapted)) for name in self.names)
            self._fingerprints[key] = base_fingerprint(every, update.base_dtype)
        return self._fingerprints[key]


class Unmerged:
    """In place of a `Merger` for an engine that computes with adapters beside its base: they reach
    it as they are, once the base is known to be the learner's."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._checked: str | None = None

    def whole(
        self, update: LoraUpdate, tensors: Iterable[tuple[str, Any]]
    ) -> Iterable[tuple[str, Any]]:
        """Raises WeightMismatch for a base other than the learner's."""
        if self._checked != update.base:
            _require_same_base(Base(self._settings), update, (), self._settings)
            self._checked = update.base
        return tensors


class Merger:
    """Makes whole updates of adapters. device: where it computes, which is the engine's."""

    def __init__(self, settings: EngineSettings, device: str) -> None:
        self._settings, self._device = settings, torch.device(device)
        self._base: Base | None = None

    def whole(
        self, update: LoraUpdate, tensors: Iterable[tuple[str, Any]]
    ) -> Iterator[tuple[str, Tensor]]:
        """(name, weight) of the whole model in the engine's type, one at a time.

        tensors: of the adapter, checked as they come. Raises WeightMismatch for a base other than
        the learner's, and for an adapter that does not fit it.
        """
        # All of it before the first weight is made: what is missing is known then. Copied, because
        # the transport may take its memory back when the next tensors come.
        factors = factors_by_weight({name: to_tensor(array).clone() for name, array in tensors})
        if self._base is None:
            self._base = Base(self._settings)
        base = self._base
        _require_same_base(base, update, factors, self._settings)
        if unknown := factors.keys() - set(base.names):
            raise WeightMismatch(f"the adapter changes {min(unknown)!r}, which the base lacks")
        for name in base.names:
            yield (
                name,
                self._merged(update, base.tensor(name, update, factors), factors.get(name)),
            )

    def _merged(
        self, update: LoraUpdate, weight: Tensor, factors: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        weight = weight.to(self._device)
        if factors is not None:
            a, b = (factor.to(self._device) for factor in factors)
            if (b.shape[0], a.shape[1]) != tuple(weight.shape) or a.shape[0] != b.shape[1]:
                raise WeightMismatch(
                    f"an adapter of {tuple(b.shape)} x {tuple(a.shape)} came for a weight of "
                    f"{tuple(weight.shape)}"
                )
            weight = merged_weight(weight, a, b, update.scale)
        # Rounded once, from float32, as the learner rounds what it publishes whole.
        return weight.to(getattr(torch, update.dtype)) if weight.is_floating_point() else weight


def _require_same_base(
    base: Base, update: LoraUpdate, adapted: Collection[str], settings: EngineSettings
) -> None:
    if base.fingerprint(update, adapted) != update.base:
        raise WeightMismatch(
            f"the base model in {settings.model_path} is not the one that the learner has: its "
            "adapters belong to other weights"
        )


def _from_files(settings: EngineSettings, names: tuple[str, ...]) -> Read | None:
    """Reads single tensors out of the safetensors files, which stay mapped; None where these do not
    hold the model under its own names."""
    folder = Path(settings.model_path)
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    where: dict[str, Any] = {}
    for file in files:
        opened = safe_open(file, framework="pt")
        where |= dict.fromkeys(opened.keys(), opened)
    if not where.keys() >= set(names):
        return None
    return lambda name: where[name].get_tensor(name)


def _from_transformers(settings: EngineSettings) -> Read:
    """For models whose names transformers changes as it loads them, and for those of a hub."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        settings.model_path,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
        dtype="auto",
    )
    tensors: Mapping[str, Tensor] = published_tensors(model)
    return lambda name: tensors[name].detach()
