"""The learner's part of a checkpoint, exact: safetensors and JSON, no pickle.

    policy/             Hugging Face layout with tokenizer: usable as a model; under LoRA instead:
    adapter/            peft's layout, with the tokenizer; the base is the model that the run
                        started from (`learner.models.merged_export` makes a model of the two)
    state/              everything else that is a tensor: value network or head, moments
      index.json          name -> dtype, shape, and which file holds which piece of it
      rank-00000.safetensors …  what each process wrote
    rng.safetensors     torch's generators
    trainer.json        version, KL controller, canary, optimisers' settings

A checkpoint is copied in memory between two steps and written while training goes on. Each process
copies and writes its own share, which needs no word from another one. Of a sharded policy each
writes its pieces into `policy_parts/`; once the files of all processes lie in one folder,
`learner.model_files.complete` puts `policy/` together, tensor by tensor, and removes the pieces.
Any number of processes reads it, each only the slices it needs (`learner/compute/stored.py`).
What is written is no checkpoint before the caller has given it a manifest and its name.

Checkpoints of older versions ("accord.trainer/1": `value.safetensors`, `optimizer_*.safetensors`,
all whole) are read, too.

The order of samples needs no state: it is a function of (seed, step, epoch).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cluster.contracts.config.base import ModelConfig
from cluster.contracts.crash_points import passing
from cluster.contracts.durable import FileDigest, digest_of, digests_below, sync, write_text
from cluster.contracts.errors import NotSaved, UserError
from cluster.contracts.records import LoraUpdate
from learner.algorithms.kl import AdaptiveKL, FixedKL
from learner.compute.optimizer_step import SkipCounter
from learner.compute.ranks import Ranks, is_sharded, whole
from learner.compute.sharding import load_full
from learner.compute.stored import (
    Copied,
    StoredTensors,
    copied,
    entry_of,
    moments_of,
    plain_groups,
    restore_groups,
    restore_moments,
)
from learner.model_files import (
    ADAPTER,
    ADAPTER_FILE,
    LAYOUT,
    PARTS,
    POLICY,
    STATE,
    Layout,
    below,
    write_model,
)
from learner.models.export import converted, layout_of, stored_tensors, write_small_files
from learner.models.load import load_policy
from learner.models.lora import adapter_tensors, has_adapters, save_adapter
from learner.models.weight_files import weight_files
from learner.pieces import write_tensors
from learner.rl.forward import Networks
from learner.rl.update import Optimizers
from learner.trainer_file import TRAINER

SCHEMA = "accord.trainer/2"
_WHOLE_SCHEMA = "accord.trainer/1"
_RANDOM = "rng.safetensors"


@dataclass(slots=True, kw_only=True, eq=False)
class TrainerState:
    """Everything that changes as a learner trains.

    policy: its name, where a run has several; others: those of the further ones, which have the
    same version.
    """

    networks: Networks
    tokenizer: Any
    optimizers: Optimizers
    kl: FixedKL | AdaptiveKL
    version: int
    canary_ids: tuple[int, ...]
    lora: LoraUpdate | None = None
    policy: str = ""
    others: tuple[TrainerState, ...] = ()

    def each(self) -> tuple[TrainerState, ...]:
        """Of every policy, in the order of the config."""
        return (self, *self.others)


@dataclass(slots=True, kw_only=True, eq=False)
class Snapshot:
    """Copies, in the memory of this host, of this process's share of a checkpoint: training may go
    on while they are written. ``policy``: what `policy/` is made of, whole tensors on the first
    process or pieces on all (then the ``layout`` of the files they will be). Without a layout it
    is the model's ``adapter`` of this name."""

    ranks: Ranks
    model: Any
    tokenizer: Any
    policy: Mapping[str, Tensor] | Copied
    adapter: str
    layout: Layout | None
    state: Copied
    random_states: dict[str, Tensor]
    trainer: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        """Of this process's share."""
        policy = self.policy
        parts = policy.parts if isinstance(policy, Copied) else policy
        tensors = [*parts.values(), *self.random_states.values()]
        return sum(tensor.nbytes for tensor in tensors) + self.state.nbytes

    def write(self, directory: str | Path) -> tuple[FileDigest, ...]:
        """Write this process's files below ``directory`` (made if missing), synced on return. What
        all processes have written becomes a checkpoint by `learner.model_files.complete`.
        Raises NotSaved where the disk does not take it."""
        root, first = Path(directory), self.ranks.first
        try:
            root.mkdir(parents=True, exist_ok=True)
            written = self._write_policy(root)
            passing("learner.mid_save")
            written += self.state.write(root, STATE)
            if first:
                entries = [entry_of(name, state) for name, state in self.random_states.items()]
                written.append(write_tensors(root / _RANDOM, _RANDOM, entries))
                write_text(
                    root / TRAINER, json.dumps(self.trainer, indent=2, allow_nan=False) + "\n"
                )
                written.append(digest_of(root / TRAINER, TRAINER))
            # The caller renames the directory next: the name must not reach the disk before the
            # data.
            for folder in (root, root / POLICY, root / ADAPTER, root / PARTS, root / STATE):
                if folder.is_dir():
                    sync(folder)
            return tuple(sorted(written, key=lambda file: file.name))
        except (OSError, SafetensorError) as problem:
            raise NotSaved(f"{root}: {problem}") from problem

    def _write_policy(self, root: Path) -> list[FileDigest]:
        policy, layout, found = self.policy, self.layout, list[FileDigest]()
        if layout is None:
            return self._write_adapter(root) if self.ranks.first else []
        if self.ranks.first:
            found += write_small_files(self.model, self.tokenizer, root / POLICY)
            if not isinstance(policy, Copied):
                found += write_model(
                    root / POLICY, layout, lambda name, source: entry_of(name, policy[source])
                )
        written = [below(POLICY, file) for file in found]
        if isinstance(policy, Copied):
            written += policy.write(root, PARTS)
            if self.ranks.first:
                write_text(root / PARTS / LAYOUT, layout.text())
                written.append(digest_of(root / PARTS / LAYOUT, f"{PARTS}/{LAYOUT}"))
        return written

    def _write_adapter(self, root: Path) -> list[FileDigest]:
        assert not isinstance(self.policy, Copied)
        base = str(self.model.config.name_or_path)
        save_adapter(self.model, root / ADAPTER, base, self.adapter, tensors=self.policy)
        self.tokenizer.save_pretrained(root / ADAPTER)
        return [below(ADAPTER, file) for file in digests_below(root / ADAPTER)]


def snapshot(state: TrainerState) -> Snapshot:
    """Copy this process's share of a checkpoint. Every rank has to call this.

    Memory: a sharded tensor costs each process its shard. What all processes hold is shared out,
    but for an unsharded policy, which is copied by the first.
    """
    networks, optimizers = state.networks, _optimizers(state.optimizers)
    policy, layout = _policy_copies(networks)
    names = _parameter_names(networks)
    tensors = _value_tensors(networks)
    for optimizer, _ in optimizers.values():
        tensors |= moments_of(optimizer, names)
    described = {
        name: {
            "param_groups": plain_groups(optimizer, names),
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
    if state.lora is not None:
        trainer["lora"] = asdict(state.lora)
    return Snapshot(
        ranks=networks.ranks,
        model=networks.policy,
        tokenizer=state.tokenizer,
        policy=policy,
        adapter=networks.adapter,
        layout=layout,
        state=copied(tensors, networks.ranks),
        random_states=random_states() if networks.ranks.first else {},
        # Plain values of now: the optimisers' own change as training goes on.
        trainer=json.loads(json.dumps(trainer, allow_nan=False)),
    )


def _policy_copies(networks: Networks) -> tuple[Mapping[str, Tensor] | Copied, Layout | None]:
    if has_adapters(networks.policy):
        own = adapter_tensors(networks.policy, networks.adapter)
        return _whole_copies(own, networks.ranks.first), None
    tensors, layout = stored_tensors(networks.policy), layout_of(networks.policy)
    if layout is not None and any(is_sharded(tensor) for tensor in tensors.values()):
        return copied(tensors, networks.ranks), layout
    keep = networks.ranks.first
    whole_ones = _whole_copies(tensors, keep)
    if layout is None:
        whole_ones = converted(networks.policy, whole_ones) if keep else {}
        sizes = {name: tensor.nbytes for name, tensor in sorted(whole_ones.items())}
        layout = Layout.of(sizes, {name: name for name in sizes})
    return whole_ones, layout


@torch.no_grad()
def _whole_copies(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """On the CPU. A process that does not keep them helps to gather what is sharded."""
    copies = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if keep:
            copies[name] = full.to("cpu", copy=True).contiguous()
    return copies


def restore_state(state: TrainerState, directory: str | Path) -> None:
    """Fill `state`, built from the same settings, with what was written below `directory`, by any
    number of processes: each reads the slices it holds.

    Raises UserError where files are missing or damaged or come from other settings (another value
    network, KL controller or model shape).
    """
    root = Path(directory)
    try:
        trainer = json.loads((root / TRAINER).read_text(encoding="utf-8"))
        # Before anything is overwritten: settings that do not fit leave the state as it was built.
        _check_fits(trainer, state, root)
        _restore_policy(state.networks, root)
        older = trainer["schema"] == _WHOLE_SCHEMA
        (_restore_whole if older else _restore_pieces)(state, root)
        for name, (optimizer, skips) in _optimizers(state.optimizers).items():
            described = trainer["optimizers"][name]
            names = _numbers(optimizer) if older else _parameter_names(state.networks)
            restore_groups(optimizer, described["param_groups"], names)
            skips.total, skips.in_a_row = described["skipped"], described["skipped_in_a_row"]
        kl = {key: value for key, value in trainer["kl"].items() if key != "controller"}
        state.kl.load_state_dict(kl)
        # After the networks, whose loading may draw random numbers.
        set_random_states(load_file(root / _RANDOM))
        state.version = int(trainer["version"])
        state.canary_ids = tuple(trainer["canary_ids"])
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as problem:
        raise UserError(
            f"the checkpoint cannot be read: {type(problem).__name__}: {problem}",
            where=str(root),
            fix="resume from another checkpoint of this run, with the settings it was made with",
        ) from problem


def _check_fits(trainer: Mapping[str, Any], state: TrainerState, root: Path) -> None:
    if trainer["schema"] not in (SCHEMA, _WHOLE_SCHEMA):
        raise UserError(
            f"a checkpoint of layout {trainer['schema']!r}, this Accord reads {SCHEMA!r}",
            where=str(root / TRAINER),
            fix="resume with the version of Accord that wrote it",
        )
    base = None if state.lora is None else asdict(state.lora)
    pairs = {
        "the value network": (trainer["value"], _value_kind(state.networks)),
        "the KL controller": (trainer["kl"]["controller"], type(state.kl).__name__),
        "the base of the adapters": (_base(trainer.get("lora")), _base(base)),
    }
    for what, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise UserError(
                f"{what} of the checkpoint is {theirs!r}, of the settings {ours!r}",
                where=str(root / TRAINER),
                fix="resume with the settings the checkpoint was made with",
            )


def _base(lora: Mapping[str, Any] | None) -> str:
    return "none" if lora is None else f"{lora['base'][:12]} in {lora['base_dtype']}"


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


def _value_tensors(networks: Networks) -> dict[str, Tensor]:
    value = networks.value
    if value is None:
        return {}
    tensors = stored_tensors(value)
    if has_adapters(value):  # a base that does not change is in the files it came from
        tensors = {n: p for n, p in value.named_parameters() if p.requires_grad}
    return {f"value.{name}": tensor for name, tensor in tensors.items()}


def _parameter_names(networks: Networks) -> dict[int, str]:
    """Parameter's id -> its name in a checkpoint."""
    modules = {"policy": networks.policy, "value": networks.value}
    return {
        id(parameter): f"{kind}.{name}"
        for kind, module in modules.items()
        if module is not None
        for name, parameter in module.named_parameters()
    }


def _restore_policy(networks: Networks, root: Path) -> None:
    policy = networks.policy
    if has_adapters(policy):
        with StoredTensors.whole(root / ADAPTER, [root / ADAPTER / ADAPTER_FILE]) as stored:
            for name, tensor in adapter_tensors(policy, networks.adapter).items():
                stored.fill(name, tensor)
        return
    folder, layout = root / POLICY, layout_of(policy)
    with StoredTensors.whole(folder, weight_files(folder)) as stored:
        if layout is not None:
            own = stored_tensors(policy)
            for names in layout.files.values():
                for saved, name in names.items():
                    stored.fill(saved, own[name])
            return
    # The tensors of its files are other ones, which transformers makes into the model's.
    load_full(policy, load_policy(ModelConfig(path=str(folder))).state_dict())


def _restore_pieces(state: TrainerState, root: Path) -> None:
    names = _parameter_names(state.networks)
    with StoredTensors.indexed(root / STATE) as stored:
        for name, tensor in _value_tensors(state.networks).items():
            stored.fill(name, tensor)
        for optimizer, _ in _optimizers(state.optimizers).values():
            restore_moments(optimizer, stored, names)


def _restore_whole(state: TrainerState, root: Path) -> None:
    """Of a checkpoint of layout 1: one file for each, moments by the number of their parameter."""
    value = state.networks.value
    if value is not None:
        file = root / "value.safetensors"
        with StoredTensors.whole(root, [file]) as stored:
            for name, tensor in stored_tensors(value).items():
                stored.fill(name, tensor)
    for kind, (optimizer, _) in _optimizers(state.optimizers).items():
        with StoredTensors.whole(root, [root / f"optimizer_{kind}.safetensors"]) as stored:
            restore_moments(optimizer, stored, _numbers(optimizer), separator=".")


def _numbers(optimizer: torch.optim.Optimizer) -> dict[int, str]:
    """Parameter's id -> its number, across groups, by which torch names it in a state dict."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return {id(parameter): str(number) for number, parameter in enumerate(params)}


def random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
