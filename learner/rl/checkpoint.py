"""The learner's part of a checkpoint, exact: safetensors and JSON, no pickle.

    policy/                          Hugging Face layout with tokenizer: usable as a model
    value.safetensors                a value network or head, if there is one
    optimizer_policy.safetensors     moments by parameter index; optimizer_value likewise
    rng.safetensors                  torch's generators
    trainer.json                     version, KL controller, canary, optimiser settings

A learner of several processes writes the same files: sharded tensors are put together, and dealt
out again by whatever number of processes reads them.

The order of samples needs no state: it is a function of (seed, step, epoch). A checkpoint is
copied in memory between two steps and written while training goes on. The caller puts the directory
in place (temp-then-rename).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cluster.contracts.config.base import ModelConfig
from cluster.contracts.crash_points import passing
from cluster.contracts.durable import FileDigest, digests_below, sync_tree
from cluster.contracts.errors import NotSaved, UserError
from learner.algorithms.kl import AdaptiveKL, FixedKL
from learner.compute.optimizer_step import SkipCounter
from learner.compute.ranks import whole
from learner.compute.sharding import load_full, split_like
from learner.models.load import load_policy, save_policy
from learner.rl.forward import Networks
from learner.rl.update import Optimizers

SCHEMA = "accord.trainer/1"


@dataclass(slots=True, kw_only=True, eq=False)
class TrainerState:
    """Everything that changes as a learner trains."""

    networks: Networks
    tokenizer: Any
    optimizers: Optimizers
    kl: FixedKL | AdaptiveKL
    version: int
    canary_ids: tuple[int, ...]


@dataclass(slots=True, kw_only=True, eq=False)
class Snapshot:
    """Copies, in the memory of this host, of all that a checkpoint holds: training may go on while
    they are written. ``policy``, ``value``, ``moments``, ``random_states``: tensors by name."""

    model: Any
    tokenizer: Any
    policy: dict[str, Tensor]
    value: dict[str, Tensor] | None
    moments: dict[str, dict[str, Tensor]]
    random_states: dict[str, Tensor]
    trainer: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        parts = [self.policy, self.value or {}, *self.moments.values(), self.random_states]
        # A tensor under two names is written once.
        found = {id(tensor): tensor.nbytes for part in parts for tensor in part.values()}
        return sum(found.values())

    def write(self, directory: str | Path) -> tuple[FileDigest, ...]:
        """Write everything below ``directory`` (made if missing); complete and synced on return.
        Raises NotSaved where the disk does not take it."""
        root = Path(directory)
        try:
            root.mkdir(parents=True, exist_ok=True)
            save_policy(self.model, self.tokenizer, root / "policy", self.policy)
            passing("learner.mid_save")
            if self.value is not None:
                save_file(self.value, root / "value.safetensors")
            for name, tensors in self.moments.items():
                save_file(tensors, root / f"optimizer_{name}.safetensors")
            save_file(self.random_states, root / "rng.safetensors")
            text = json.dumps(self.trainer, indent=2, allow_nan=False) + "\n"
            (root / "trainer.json").write_text(text, encoding="utf-8")
            # The caller renames the directory next: the name must not reach the disk before the
            # data.
            sync_tree(root)
            return digests_below(root)
        except (OSError, SafetensorError) as problem:
            raise NotSaved(f"{root}: {problem}") from problem


def snapshot(state: TrainerState) -> Snapshot | None:
    """Copy what a checkpoint holds; None on all ranks but the first. Every rank has to call this.

    Memory: as much as the policy, the value network and the optimisers' moments take.
    """
    networks = state.networks
    keep = networks.ranks.first
    # The other ranks hold the same, or are needed below to gather what is sharded.
    if not keep and not networks.sharded:
        return None
    policy = _plain(networks.policy.state_dict(), keep)
    value = None if networks.value is None else _plain(networks.value.state_dict(), keep)
    optimizers = _optimizers(state.optimizers)
    moments = {
        name: _flat(optimizer.state_dict()["state"], keep)
        for name, (optimizer, _) in optimizers.items()
    }
    if not keep:
        return None
    described = {
        name: {
            "param_groups": optimizer.state_dict()["param_groups"],
            "skipped": skips.total,
            "skipped_in_a_row": skips.in_a_row,
        }
        for name, (optimizer, skips) in optimizers.items()
    }
    trainer = {
        "schema": SCHEMA,
        "version": state.version,
        "value": _value_kind(networks),
        "kl": {"controller": type(state.kl).__name__, **state.kl.state_dict()},
        "canary_ids": list(state.canary_ids),
        "optimizers": described,
    }
    return Snapshot(
        model=networks.policy,
        tokenizer=state.tokenizer,
        policy=_tied_again(policy, networks.policy),
        value=value,
        moments=moments,
        random_states=random_states(),
        # Plain values of now: the optimisers' own change as training goes on.
        trainer=json.loads(json.dumps(trainer, allow_nan=False)),
    )


def restore_state(state: TrainerState, directory: str | Path) -> None:
    """Fill `state`, built from the same settings, with what `Snapshot.write` wrote.

    Raises UserError where files are missing or damaged or come from other settings (another value
    network, KL controller or model shape).
    """
    root = Path(directory)
    try:
        trainer = json.loads((root / "trainer.json").read_text(encoding="utf-8"))
        # Before anything is overwritten: settings that do not fit leave the state as it was built.
        _check_fits(trainer, state, root)
        _restore_policy(state.networks.policy, root)
        if state.networks.value is not None:
            load_full(state.networks.value, load_file(root / "value.safetensors"))
        for name, (optimizer, skips) in _optimizers(state.optimizers).items():
            _restore_optimizer(optimizer, skips, trainer["optimizers"][name], root, name)
        kl = {key: value for key, value in trainer["kl"].items() if key != "controller"}
        state.kl.load_state_dict(kl)
        # After the networks, whose loading may draw random numbers.
        set_random_states(load_file(root / "rng.safetensors"))
        state.version = int(trainer["version"])
        state.canary_ids = tuple(trainer["canary_ids"])
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as problem:
        raise UserError(
            f"the checkpoint cannot be read: {type(problem).__name__}: {problem}",
            where=str(root),
            fix="resume from another checkpoint of this run, with the settings it was made with",
        ) from problem


def _check_fits(trainer: Mapping[str, Any], state: TrainerState, root: Path) -> None:
    if trainer["schema"] != SCHEMA:
        raise UserError(
            f"a checkpoint of layout {trainer['schema']!r}, this Accord reads {SCHEMA!r}",
            where=str(root / "trainer.json"),
            fix="resume with the version of Accord that wrote it",
        )
    pairs = {
        "the value network": (trainer["value"], _value_kind(state.networks)),
        "the KL controller": (trainer["kl"]["controller"], type(state.kl).__name__),
    }
    for what, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise UserError(
                f"{what} of the checkpoint is {theirs!r}, of the settings {ours!r}",
                where=str(root / "trainer.json"),
                fix="resume with the settings the checkpoint was made with",
            )


def _value_kind(networks: Networks) -> str:
    if networks.value is None:
        return "none"
    return "shared" if networks.shared else "own"


def _optimizers(
    optimizers: Optimizers,
) -> dict[str, tuple[torch.optim.Optimizer, SkipCounter]]:
    found = {"policy": (optimizers.policy, optimizers.policy_skips)}
    if optimizers.value is not None:
        found["value"] = (optimizers.value, optimizers.value_skips)
    return found


def _restore_policy(policy: Any, root: Path) -> None:
    saved = load_policy(ModelConfig(path=str(root / "policy")))
    load_full(policy, saved.state_dict())


def _flat(moments: Mapping[int, Mapping[str, Tensor]], keep: bool) -> dict[str, Tensor]:
    return _plain(
        {f"{index}.{key}": value for index, row in moments.items() for key, value in row.items()},
        keep,
    )


def _restore_optimizer(
    optimizer: torch.optim.Optimizer,
    skips: SkipCounter,
    described: Mapping[str, Any],
    root: Path,
    name: str,
) -> None:
    # torch numbers parameters across groups in this order, in the file as here.
    params = [p for group in optimizer.param_groups for p in group["params"]]
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in load_file(root / f"optimizer_{name}.safetensors").items():
        index, part = key.split(".", 1)
        param = params[int(index)]
        if value.shape == param.shape:  # not the count of steps
            value = split_like(value, param)
        moments.setdefault(int(index), {})[part] = value
    # JSON has no tuples; a resumed optimiser holds what a fresh one does.
    groups = [{**group, "betas": tuple(group["betas"])} for group in described["param_groups"]]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    skips.total, skips.in_a_row = described["skipped"], described["skipped_in_a_row"]


def _plain(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Copies on the CPU, whole, of tensors that may share memory, which safetensors refuses; none
    on a rank that does not keep them."""
    copies = {}
    for name, tensor in tensors.items():
        # On every rank and in the same order, since it is a collective where tensors are sharded.
        full = whole(tensor.detach())
        if keep:
            copies[name] = full.to("cpu", copy=True).contiguous()
    return copies


def _tied_again(copies: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Names of one parameter get one copy, from which `save_pretrained` sees that they are tied."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    for name, parameter in parameters.items():
        if name in copies:
            copies[name] = copies[first.setdefault(id(parameter), name)]
    return copies


def random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
