"""Checkpoints of the offline loop: safetensors and JSON, written whole or not at all.

    checkpoints/step-00000500/  state.json
                                state/  index.json  rank-00000.safetensors …

Each process writes its own part of what is trained and of the optimiser's moments, and any number
of processes reads it (`learner/compute/stored.py`). What is frozen is not in it.
Those of older versions ("accord.fit/1": `model.safetensors`, `optimizer.safetensors`, whole) are
read, too.

`state.json` carries a fingerprint of configuration and data: continuing another run's checkpoint
would train something nobody asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from cluster.contracts.config.offline import FitConfig
from cluster.contracts.durable import sync, write_text
from cluster.contracts.errors import UserError
from learner.compute.ranks import SINGLE, Ranks
from learner.compute.stored import StoredTensors, copied, moments_of, restore_moments, write_shares
from learner.model_files import STATE

SCHEMA = "accord.fit/2"
_WHOLE_SCHEMA = "accord.fit/1"
KEEP = 2
HOW = {
    *("threads", "checkpoint_every", "eval_every"),
    *("processes", "sharding", "tensor_parallel", "sequence_parallel", "offload"),
    *("gradient_checkpointing", "reshard_after_forward", "prefetch_layers", "gradient_reduction"),
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
    """The checkpoints of one run in `folder`, which all ranks see; the newest KEEP are kept."""

    def __init__(self, folder: Path, run: str, ranks: Ranks = SINGLE) -> None:
        self.folder, self.run, self.ranks = folder, run, ranks

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, state: FitState) -> Path:
        """Every rank has to call it, and writes its share. Raises NotSaved on all of them where a
        disk does not take it."""
        directory = self.folder / f"step-{state.step:08d}"
        fresh = directory.with_name(f".{directory.name}.new")
        if self.ranks.first:
            shutil.rmtree(fresh, ignore_errors=True)
        self.ranks.barrier()
        names = {id(p): name for name, p in model.named_parameters()}
        tensors = _trained(model) | moments_of(optimizer, names)
        # Not copied: training waits until it is written.
        shares = copied(tensors, self.ranks, copy=False)
        write_shares(self.ranks, fresh, lambda: shares.write(fresh, STATE))
        if self.ranks.first:
            content = {"schema": SCHEMA, "run": self.run, **asdict(state)}
            write_text(fresh / "state.json", json.dumps(content, indent=2))
            for folder in (fresh / STATE, fresh):
                sync(folder)
            before = directory.with_name(f".{directory.name}.old")
            shutil.rmtree(before, ignore_errors=True)
            if directory.exists():
                directory.rename(before)
            os.replace(fresh, directory)
            shutil.rmtree(before, ignore_errors=True)
            for old in self._all()[:-KEEP]:
                shutil.rmtree(old)
        self.ranks.barrier()
        return directory

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> FitState | None:
        """Load the newest checkpoint into model and optimizer, each rank its part; None where there
        is none.

        Raises UserError for a damaged one and for one of another run.
        """
        found = self._all()
        if not found:
            return None
        where, fix = str(found[-1]), f"remove {self.folder} to start anew, or give another run.name"
        try:
            content = json.loads((found[-1] / "state.json").read_text(encoding="utf-8"))
            if content["schema"] not in (SCHEMA, _WHOLE_SCHEMA):
                raise ValueError(f"its schema is {content['schema']}, not {SCHEMA}")
            if content["run"] != self.run:
                raise UserError(
                    "the checkpoint is of a run with another configuration or other data",
                    where=where,
                    fix=fix,
                )
            with _stored(found[-1], content["schema"]) as stored:
                trained = _trained(model)
                there = {name for name in stored.index if "/" not in name}
                # An older one holds what is frozen, too.
                if missing := sorted(trained.keys() - there):
                    raise ValueError(f"its tensors lack those of the model: {missing[:3]}")
                for name, parameter in trained.items():
                    stored.fill(name, parameter)
                names = {id(p): name for name, p in model.named_parameters()}
                restore_moments(optimizer, stored, names)
            return FitState(content["step"], content["seconds"], content["skipped"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as problem:
            raise UserError(f"damaged: {problem}", where=where, fix=fix) from problem

    def _all(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if path.is_dir())


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What a step changes; a frozen base comes from its own files."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _stored(checkpoint: Path, schema: str) -> StoredTensors:
    """The same names in both layouts."""
    if schema == SCHEMA:
        return StoredTensors.indexed(checkpoint / STATE)
    files = [checkpoint / f"{name}.safetensors" for name in ("model", "optimizer")]
    return StoredTensors.whole(checkpoint, files)
