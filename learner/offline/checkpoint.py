"""Checkpoints of the offline loop: safetensors and JSON, written whole or not at all.

    checkpoints/step-00000500/  model.safetensors  optimizer.safetensors  state.json

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
from learner.models.files import replace_directory

SCHEMA = "accord.fit/1"
KEEP = 2


@dataclass(slots=True)
class FitState:
    """step: optimiser steps done. seconds: time trained so far. skipped: steps left out."""

    step: int
    seconds: float
    skipped: int


def fingerprint(config: FitConfig, seed: int, costs: Sequence[tuple[int, float]]) -> str:
    """Hash of all that decides the course of a run: config, seed, length and weight of each row."""
    relevant = config.model_dump(mode="json", exclude={"threads", "checkpoint_every", "eval_every"})
    text = json.dumps([relevant, seed, list(costs)], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


class FitCheckpoints:
    """The checkpoints of one run in `folder`; the newest KEEP are kept."""

    def __init__(self, folder: Path, run: str) -> None:
        self.folder, self.run = folder, run

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, state: FitState) -> Path:
        names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        content = {"schema": SCHEMA, "run": self.run, **asdict(state)}

        def write(fresh: Path) -> None:
            weights = {name: p.detach().contiguous() for p, name in names.items()}
            save_file(weights, fresh / "model.safetensors")
            save_file(_flatten(optimizer, names), fresh / "optimizer.safetensors")
            (fresh / "state.json").write_text(json.dumps(content, indent=2), encoding="utf-8")

        directory = replace_directory(self.folder / f"step-{state.step:08d}", write)
        for old in self._all()[:-KEEP]:
            shutil.rmtree(old)
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


def _flatten(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    return {
        f"{names[parameter]}/{key}": value.detach().contiguous()
        for parameter, entries in optimizer.state.items()
        for key, value in entries.items()
    }


def _unflatten(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]
) -> None:
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        name, _, entry = key.rpartition("/")
        parameter = parameters[name]
        state: dict[str, Any] = optimizer.state.setdefault(parameter, {})
        state[entry] = value.to(parameter.device)


@torch.no_grad()
def _fill(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    if parameters.keys() != tensors.keys():
        raise ValueError(
            f"its tensors differ from the model's: {sorted(parameters.keys() ^ tensors.keys())[:3]}"
        )
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}")
        parameter.copy_(tensors[name])
