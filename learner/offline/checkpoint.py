"""Checkpoints of the offline loop: safetensors and JSON, written whole or not at all.

    checkpoints/step-00000500/  model.safetensors  optimizer.safetensors  state.json

`model.safetensors` holds what is trained.

`state.json` carries a fingerprint of configuration and data: continuing another run's checkpoint
would train something nobody asked for.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cluster.contracts.config.offline import FitConfig
from cluster.contracts.errors import UserError
from learner.compute.ranks import SINGLE, Ranks, whole
from learner.compute.sharding import local, split_like
from learner.models.files import replace_directory

SCHEMA = "accord.fit/1"
KEEP = 2
HOW = {
    *("threads", "checkpoint_every", "eval_every"),
    *("processes", "sharding", "tensor_parallel", "sequence_parallel", "offload"),
    *("gradient_checkpointing", "reshard_after_forward", "prefetch_layers"),
}
"""Keys of FitConfig that change how a run is computed, but not what it learns."""


@dataclass(slots=True)
class FitState:
    """step: optimiser steps done. seconds: time trained so far. skipped: steps left out."""

    step: int
    seconds: float
    skipped: int


def fingerprint(config: FitConfig, seed: int, costs: Sequence[tuple[int, float]]) -> str:
    """Hash of all that decides the course of a run: config, seed, length and weight of each row."""
    relevant = config.model_dump(mode="json", exclude=HOW)
    text = json.dumps([relevant, seed, list(costs)], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


class FitCheckpoints:
    """The checkpoints of one run in `folder`; the newest KEEP are kept."""

    def __init__(self, folder: Path, run: str, ranks: Ranks = SINGLE) -> None:
        self.folder, self.run, self.ranks = folder, run, ranks

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, state: FitState) -> Path:
        """Every rank has to call it; the first one writes."""
        names: dict[Tensor, str] = {p: name for name, p in _trained(model).items()}
        content = {"schema": SCHEMA, "run": self.run, **asdict(state)}
        weights = _whole({name: p for p, name in names.items()})
        moments = _whole(_flatten(optimizer, names))
        directory = self.folder / f"step-{state.step:08d}"

        def write(fresh: Path) -> None:
            save_file(weights, fresh / "model.safetensors")
            save_file(moments, fresh / "optimizer.safetensors")
            (fresh / "state.json").write_text(json.dumps(content, indent=2), encoding="utf-8")

        if self.ranks.first:
            replace_directory(directory, write)
            for old in self._all()[:-KEEP]:
                shutil.rmtree(old)
        self.ranks.barrier()
        return directory

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> FitState | None:
        """Load the newest checkpoint into model and optimizer; None where there is none.

        Raises UserError for a damaged one and for one of another run.
        """
        found = self._all()
        if not found:
            return None
        where, fix = str(found[-1]), f"remove {self.folder} to start anew, or give another run.name"
        try:
            content = json.loads((found[-1] / "state.json").read_text(encoding="utf-8"))
            if content["schema"] != SCHEMA:
                raise ValueError(f"its schema is {content['schema']}, not {SCHEMA}")
            if content["run"] != self.run:
                raise UserError(
                    "the checkpoint is of a run with another configuration or other data",
                    where=where,
                    fix=fix,
                )
            _fill(model, load_file(found[-1] / "model.safetensors"))
            _unflatten(optimizer, model, load_file(found[-1] / "optimizer.safetensors"))
            return FitState(content["step"], content["seconds"], content["skipped"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as problem:
            raise UserError(f"damaged: {problem}", where=where, fix=fix) from problem

    def _all(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if path.is_dir())


def _whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put together from all ranks where they are sharded, in the order that all of them have."""
    return {name: whole(tensor.detach()).contiguous() for name, tensor in tensors.items()}


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What a step changes; a frozen base comes from its own files."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _flatten(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    return {
        f"{names[parameter]}/{key}": value
        for parameter, entries in optimizer.state.items()
        for key, value in entries.items()
    }


def _unflatten(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]
) -> None:
    parameters = _trained(model)
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        parameter = parameters[name]
        state: dict[str, Any] = optimizer.state.setdefault(parameter, {})
        # The count of steps is whole everywhere; moments lie as their parameter does.
        like = parameter if value.shape == parameter.shape else value
        state[entry] = split_like(value.to(parameter.device), like)


@torch.no_grad()
def _fill(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    parameters = _trained(model)
    if parameters.keys() != tensors.keys():
        raise ValueError(
            f"its tensors differ from the model's: {sorted(parameters.keys() ^ tensors.keys())[:3]}"
        )
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}")
        local(parameter).copy_(local(split_like(tensors[name], parameter)))
