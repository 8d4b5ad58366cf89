"""What the command was given, on its way to roles on hosts that have none of it.

On a cluster that was joined, the driver packs the files once (`cluster.machine.parcels`). Workers
are sent a model without its weights, which they take from the learner; under LoRA the learner sends
them adapters, and they merge these into the model's own weights.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.assembly.adapted import AdaptedModel, adapted
from cluster.contracts.config.base import ModelConfig
from cluster.contracts.config.reward import FunctionSource, JudgeSource, RewardConfig
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.errors import UserError
from cluster.machine.nodes import on_every_node
from cluster.machine.parcel_files import Wanted
from cluster.machine.parcels import Parcel, pack, sweep
from cluster.machine.shipment import Shipment, known_as
from reward_service.judge.cache import ReplyCache
from reward_service.source_paths import with_paths

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
SWEEP_S = 20.0
PATIENCE_S = 5.0  # for the processes of the roles, which have been told to end


@dataclass(frozen=True, slots=True)
class RoleFiles:
    """What each role of a run is sent."""

    worker: Shipment = field(default_factory=Shipment)
    learner: Shipment = field(default_factory=Shipment)
    reward: Shipment = field(default_factory=Shipment)

    def parcels(self) -> dict[str, Parcel]:
        """All of them, by role and path."""
        roles = {"worker": self.worker, "learner": self.learner, "reward": self.reward}
        return {
            f"{role}: {path}": parcel
            for role, shipment in roles.items()
            for path, parcel in shipment.parcels.items()
        }


@contextmanager
def sampled_models(
    models: Sequence[ModelConfig], ray_info: Mapping[str, Any]
) -> Iterator[list[Shipment]]:
    """What workers are sent that sample from each of these models and get no weights from a
    learner. As `role_files`."""
    if ray_info["started"]:
        yield [Shipment() for _ in models]
        return
    software = ray_info["software"]
    files = [Shipment(_sampled_parcels(adapted(model)), software) for model in models]
    try:
        yield files
    finally:
        clear_hosts(files)


@contextmanager
def role_files(config: TrainConfig, ray_info: Mapping[str, Any]) -> Iterator[RoleFiles]:
    """Packed for the length of a run; then every host is rid of them. ``ray_info``: what
    ``ray_cluster`` yields. Raises UserError for a file that cannot be sent."""
    if ray_info["started"]:
        yield RoleFiles()
        return
    software = ray_info["software"]
    rewards = {} if config.reward.address else _reward_parcels(config.reward)
    packed = RoleFiles(
        worker=Shipment(worker_parcels(config), software),
        learner=Shipment(_learner_parcels(config), software),
        reward=Shipment(rewards, software),
    )
    try:
        yield packed
    finally:
        clear_hosts([packed.worker, packed.learner, packed.reward])


def clear_hosts(shipments: Sequence[Shipment]) -> None:
    """Removes what was unpacked on the hosts and no process uses; what is left, the next run
    removes."""
    digests = [parcel.digest for sent in shipments for parcel in sent.parcels.values()]
    with suppress(Exception):  # a cluster that is gone: nothing more can be done, or needs to be
        on_every_node(sweep, digests, PATIENCE_S, timeout_s=SWEEP_S)


def _sampled_parcels(model: ModelConfig) -> dict[str, Parcel]:
    found = model_parcels(model.path, model.revision)
    if isinstance(model, AdaptedModel):
        found[known_as(model.adapter)] = pack(Path(model.adapter).expanduser(), _not_hidden)
    return found


def worker_parcels(config: TrainConfig) -> dict[str, Parcel]:
    """All of a model but its weights; with adapters, which workers merge, its weights as well."""
    model = config.model
    if config.lora is not None:
        return model_parcels(model.path, model.revision)
    return {known_as(model.path): pack(_folder(model.path, model.revision), _without_weights)}


def model_parcels(path: str, revision: str | None) -> dict[str, Parcel]:
    """A whole model. Of a hub model whose weights are not on this host there is none: its role
    loads the commit from the hub."""
    from learner.models.files import check_causal_model

    folder = _folder(path, revision)
    if folder != Path(path):
        try:
            check_causal_model(str(folder), None, False)
        except UserError:
            return {}
    return {known_as(path): pack(folder, _not_hidden)}


def _learner_parcels(config: TrainConfig) -> dict[str, Parcel]:
    learner = config.learner
    found = model_parcels(config.model.path, config.model.revision)
    if learner.reference_path is not None:
        found |= model_parcels(learner.reference_path, learner.reference_revision)
    others = (learner.value_path, config.model.chat_template)
    return found | {known_as(path): pack(Path(path), _not_hidden) for path in others if path}


def _reward_parcels(config: RewardConfig) -> dict[str, Parcel]:
    """Directories of reward models and classifiers, word lists, answers that judges have given;
    Python files with the modules beside them."""
    found: dict[str, Parcel] = {}
    for source in config.sources:
        wanted = _python if isinstance(source, FunctionSource) else _not_hidden

        def packed(path: str, wanted: Wanted = wanted) -> str:
            if (place := Path(path).expanduser()).exists():
                found[known_as(path)] = pack(place, wanted)
            return path

        with_paths(source, packed)
        if isinstance(source, JudgeSource) and source.cache and Path(source.cache).exists():
            found[known_as(source.cache)] = _known_answers(source.cache)
    return found


def _known_answers(cache: str) -> Parcel:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / Path(cache).name
        ReplyCache(cache).copy_to(copy)
        return pack(copy)


def _folder(path: str, revision: str | None) -> Path:
    from learner.models.hub import hub_snapshot

    return hub_snapshot(path, revision) or Path(path)


def _not_hidden(path: Path) -> bool:
    """A model's directory may be a clone of its repository, with all of its history."""
    return not path.name.startswith(".")


def _without_weights(path: Path) -> bool:
    return _not_hidden(path) and path.suffix not in WEIGHTS


def _python(path: Path) -> bool:
    """Modules and packages that an import beside the file may find; not what else lies there."""
    if not path.is_dir():
        return path.suffix == ".py"
    with suppress(OSError):
        return path.name.isidentifier() and any(path.glob("*.py"))
    return False
