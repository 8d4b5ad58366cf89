"""Train again on what a run trained on, without Ray and without an engine: the learner alone.

The weights after each step must be those the run published, bit for bit: a step is a function of
the weights before it and of its rollouts.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import safe_open

from cluster.contracts.errors import Fatal, UserError
from cluster.contracts.records import StepInput
from cluster.machine.torch_state import prepare_torch
from learner.model_files import ADAPTER_FILE
from learner.models.lora import adapter_tensors, base_tensors, has_adapters, merged_tensors
from learner.rl.catch_up import Digests
from learner.rl.learner import PPOLearner
from learner.rl.step_record import Differs, RecordedStep, weights_digest
from learner.settings import LearnerSettings
from learner.trainer_file import TRAINER, moved_on


@dataclass(slots=True, kw_only=True)
class Replayed:
    """tokens: prompt and answer tokens trained. seconds: inside the learner's steps.
    policy: the model after the last step."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    policy: Any = None


def replay_steps(
    settings: LearnerSettings,
    steps: Sequence[RecordedStep],
    rollbacks: Sequence[Mapping[str, Any]] = (),
    *,
    until: int,
    verify: bool,
    on_step: Callable[[int, Replayed], None] = lambda step, so_far: None,
) -> Replayed:
    """Train on `steps`, from the starting model on, each with the threads it had, until `until`
    steps are done. At those of `rollbacks` (`RunState`) it goes back as the run did.

    Raises UserError when the model is not the one the run started from; Differs, with `verify`,
    naming the first step whose weights are not those of the run; Fatal, naming the file, for
    rollouts that cannot be read.
    """
    first = steps[0].record
    learner = PPOLearner(
        dataclasses.replace(settings, run_dir=None, save_rollouts=False, resume_from=None),
        publisher=Digests(first.device_sums),
        threads=first.threads,
    )
    threads, past = first.threads, _Past(rollbacks)
    # Before the first step: with another model every step would differ, and none would say why.
    if weights_digest(learner.start()) != first.before:
        raise UserError(
            "is not the model this run started from",
            where=settings.model.path,
            fix="put the model back as it was when the run was started",
        )
    done, by_number = Replayed(), {step.record.step: step for step in steps}
    try:
        for number in range(until):
            past.remember(learner)
            if past.go_back(learner, number):
                continue
            step = by_number[number]
            record = step.record
            # Sums over other numbers of threads have other last bits; a run that was resumed on
            # another machine may have changed them.
            if record.threads != threads:
                threads = record.threads
                prepare_torch(threads, deterministic=settings.learner.deterministic)
            # `batch.steps` may be raised on a resume, and the learning rate's schedule ends at it.
            batch = settings.batch.model_copy(update={"steps": record.total_steps})
            learner.settings = dataclasses.replace(learner.settings, batch=batch)
            _one(learner, step, done, verify)
            on_step(record.step, done)
    finally:
        past.close()
        learner.close()
    done.policy = learner.state.networks.policy
    return done


class _Past:
    """The states that the run went back to, in a folder of their own."""

    def __init__(self, rollbacks: Sequence[Mapping[str, Any]]) -> None:
        self._rollbacks = {int(row["step"]): row for row in rollbacks}
        self._wanted = {int(row["to"]) for row in rollbacks}
        self._folder = Path(tempfile.mkdtemp(prefix="accord-replay-")) if rollbacks else Path()

    def remember(self, learner: PPOLearner) -> None:
        """The learner's state, where the run will go back to it."""
        version = learner.state.version
        if version in self._wanted:
            learner.save(self._folder / str(version))

    def go_back(self, learner: PPOLearner, step: int) -> bool:
        """Whether the run went back in place of this step; then the learner does, too."""
        row = self._rollbacks.get(step)
        if row is None:
            return False
        folder = self._folder / str(row["to"])
        trainer = folder / TRAINER
        moved_on(trainer, trainer, version=step + 1, kl_coef=float(row["kl_coef"]))
        learner.restore(folder)
        return True

    def close(self) -> None:
        if self._rollbacks:
            shutil.rmtree(self._folder, ignore_errors=True)


def _one(learner: PPOLearner, step: RecordedStep, done: Replayed, verify: bool) -> None:
    record = step.record
    table = _rows(step)
    wanted = StepInput(
        step=record.step, group_ids=step.group_ids, payloads=(table,), kl_coef=record.kl_coef
    )
    began = time.perf_counter()
    try:
        result = learner.step(wanted)
    except Fatal as problem:
        raise Differs(f"step {record.step} ({step.path.name}): {problem}") from problem
    # Reading the file is outside: what is measured is the learner.
    done.seconds += time.perf_counter() - began
    done.tokens += sum(
        len(table.column(name).combine_chunks().flatten()) for name in ("prompt_ids", "token_ids")
    )
    done.steps += 1
    found = weights_digest(result.manifest)
    if verify and found != record.after:
        raise Differs(
            f"step {record.step} is the first that differs: trained on {step.path.name}, the "
            f"weights are {found[:12]}, the run published {record.after[:12]}"
        )


def _rows(step: RecordedStep) -> pa.Table:
    try:
        return pq.read_table(step.path, page_checksum_verification=True, memory_map=False)
    except (OSError, ValueError, pa.ArrowException) as problem:
        raise Differs(
            f"step {step.record.step}: {step.path.name} is damaged: {problem}"
        ) from problem


def different_tensor(policy: Any, directory: Path) -> str | None:
    """Name of a tensor that is not the same, bit for bit, in `policy` and in the safetensors files
    of `directory` (one that only one of them has counts), or None. Raises UserError without files.
    """
    # Compared as bytes: -0.0 equals 0.0 as a number, and NaN nothing, but here they differ or
    # are the same as bits.
    ours, seen = _as_in(policy, directory), set[str]()
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise UserError("holds no weights", where=str(directory), fix="restore it")
    for file in files:
        with safe_open(file, framework="pt") as saved:
            for name in saved.keys():  # noqa: SIM118 (not a mapping)
                seen.add(name)
                if name not in ours or not _same(ours[name], saved.get_tensor(name)):
                    return name
    # A tensor that only the policy has is a difference as well; a tied one has one name here.
    wanted = ours if has_adapters(policy) else dict(policy.named_parameters())
    return next((name for name in wanted if name not in seen), None)


def _as_in(policy: Any, directory: Path) -> dict[str, Any]:
    """The policy's tensors as the directory holds them: an adapter's, or those of a model."""
    if (directory / ADAPTER_FILE).is_file():
        return dict(adapter_tensors(policy))
    if has_adapters(policy):
        dtype = next(iter(base_tensors(policy).values())).dtype
        return dict(merged_tensors(policy, dtype))
    return dict(policy.state_dict())


def _same(ours: Any, theirs: Any) -> bool:
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    a, b = (tensor.detach().cpu().contiguous().reshape(-1) for tensor in (ours, theirs))
    return bool(np.array_equal(*(t.view(torch.uint8).numpy() for t in (a, b))))
