"""A learner that takes over from a lost one trains the steps since the newest checkpoint again, on
the rollouts that were saved of them. It then stands where the lost one stood, bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.contracts.errors import AccordError, RolledBack
from cluster.contracts.records import StepInput
from cluster.machine.torch_state import prepare_torch
from cluster.weights.update import Nowhere, Update
from learner.rl.step_record import read_record

if TYPE_CHECKING:
    from learner.rl.learner import PPOLearner


class Digests:
    """A publisher that sends nothing: it makes the manifest a transport would have made."""

    def __init__(self, on_device: bool) -> None:
        self.on_device = on_device

    def open(self, version: int) -> Update:
        return Update(version, "none", Nowhere())

    def retain(self, versions: Collection[int]) -> None:
        """Nothing is held."""

    def close(self) -> None:
        """Nothing is held."""


def catch_up(learner: PPOLearner, files: Sequence[str]) -> None:
    """Train `learner`, which was just restored (or built, before the first checkpoint), on `files`
    (rollouts of the steps that follow, in order). Nothing is sent to workers and nothing written.

    Raises RolledBack where a step does not give the weights that the run published after it.
    """
    settings, threads = learner.settings, None
    for file in files:
        table = _read(Path(file))
        record = read_record(table.schema)
        if record is None:
            raise RolledBack(f"{file} does not say what was trained on it")
        # Sums over other numbers of threads have other last bits.
        if record.threads != threads:
            threads = record.threads
            prepare_torch(threads, deterministic=settings.learner.deterministic)
        # The learning rate's schedule ends at a step that may be changed on a resume.
        batch = settings.batch.model_copy(update={"steps": record.total_steps})
        learner.settings = dataclasses.replace(settings, batch=batch)
        learner.publish_to(Digests(record.device_sums))
        if learner.publishes and learner.digest != record.before:
            raise RolledBack(f"step {record.step} was not trained from these weights")
        groups = tuple(sorted(set(table.column("group_id").to_pylist())))
        try:
            learner.step(
                StepInput(
                    step=record.step,
                    group_ids=groups,
                    payloads=(table,),
                    kl_coef=record.kl_coef,
                )
            )
        except AccordError as problem:
            raise RolledBack(f"step {record.step} cannot be trained again: {problem}") from problem
        if learner.publishes and learner.digest != record.after:
            raise RolledBack(f"step {record.step}, trained again, gives other weights")
    learner.settings = settings


def _read(path: Path) -> pa.Table:
    try:
        return pq.read_table(path, page_checksum_verification=True, memory_map=False)
    except (OSError, ValueError, pa.ArrowException) as problem:
        raise RolledBack(f"{path} is damaged: {problem}") from problem
