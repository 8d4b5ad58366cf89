"""What a rollouts file says of the learner step it was trained in, so that it can be replayed.

One JSON object in the metadata of `rollouts/step-*.parquet`, written with the rollouts after the
step's weights were published: rollouts and record cannot come apart.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from cluster.contracts.errors import Fatal
from cluster.contracts.records import StepInput, WeightManifest
from learner.settings import LearnerSettings

KEY = b"accord.step"
# Not part of what is computed, or checked by the weights themselves (paths may move).
_LEFT_OUT = {
    "model": {"path", "revision", "chat_template", "trust_remote_code"},
    "learner": {"reference_path", "value_path", "cpus", "start_timeout_s", "step_timeout_s"},
    "batch": {"steps"},
}
# A setting is left out of the digest where it has this value or, if it is not here, its default of
# today: the default that it had when runs began to be recorded. A default that changes belongs in
# here with its old value, or the runs of before could not be replayed.
_FIRST_DEFAULTS: dict[str, dict[str, Any]] = {"learner": {"eps": 1e-5}}
_SECTIONS = ("model", "learner", "algorithm", "staleness", "batch")
_VALUES = ("rollout_dtype", "temperature", "max_tokens", "seed")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """before, after: digests of the weights published before and after the step.

    total_steps: `batch.steps` in force, which the learning rate's schedule ends at. threads: of
    torch, as sums over several threads have other last bits. device_sums: the checksums behind
    the digests are those of transports that stay on a device. settings: see `settings_digest`.
    kl_coef: the KL coefficient that a monitor set before the step.
    """

    step: int
    before: str
    after: str
    total_steps: int
    threads: int
    device_sums: bool
    settings: str
    kl_coef: float | None = None


class Differs(Fatal):
    """The replay did not give what the run gave."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedStep:
    """A rollouts file, its record, its groups and the ids of one of its prompts."""

    path: Path
    record: StepRecord
    group_ids: tuple[int, ...]
    prompt: tuple[int, ...]


def step_record(
    settings: LearnerSettings, batch: StepInput, before: str, after: WeightManifest
) -> StepRecord:
    """The record of the step that led from the weights with digest `before` to those of `after`."""
    import torch  # not for those who only read records

    return StepRecord(
        step=batch.step,
        before=before,
        after=weights_digest(after),
        total_steps=settings.batch.steps,
        threads=torch.get_num_threads(),
        device_sums=after.tensors[0].checksum.startswith("mix64:"),
        settings=settings_digest(settings),
        kl_coef=batch.kl_coef,
    )


def weights_digest(manifest: WeightManifest) -> str:
    """Hex SHA-256 over name, shape, type and checksum of every tensor, ordered by name; of an
    adapter also over the base and how it is merged."""
    rows: list[Any] = sorted((t.name, t.shape, t.dtype, t.checksum) for t in manifest.tensors)
    if manifest.lora is not None:
        rows.append(asdict(manifest.lora))
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def settings_digest(settings: LearnerSettings) -> str:
    """Hex SHA-256 of all settings that change what a step computes and are not the default, so that
    a later Accord with more settings still knows the runs of today."""
    content = {}
    for name in _SECTIONS:
        section = getattr(settings, name)
        left_out = _LEFT_OUT.get(name)
        values = section.model_dump(mode="json", exclude=left_out, exclude_defaults=True)
        for key, first in _FIRST_DEFAULTS.get(name, {}).items():
            values.pop(key, None)
            if (value := getattr(section, key)) != first:
                values[key] = value
        content[name] = values
    content |= {name: getattr(settings, name) for name in _VALUES}
    if settings.lora is not None:
        content["lora"] = settings.lora.model_dump(mode="json")
    if settings.policies:
        content["policies"] = list(settings.policies)
    if settings.reference_for_monitors:  # measured in passes that may move the last bits
        content["reference_for_monitors"] = True
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def attach(table: pa.Table, record: StepRecord) -> pa.Table:
    """The same rows with the record in the schema's metadata."""
    known = table.schema.metadata or {}
    return table.replace_schema_metadata({**known, KEY: json.dumps(asdict(record)).encode()})


def read_record(schema: pa.Schema) -> StepRecord | None:
    """None where there is none (an older Accord). Raises ValueError for one that is damaged."""
    text = (schema.metadata or {}).get(KEY)
    if text is None:
        return None
    try:
        return StepRecord(**json.loads(text))
    except TypeError as problem:
        raise ValueError(f"its step record is damaged: {problem}") from None
