"""A learner step as its rollouts file on disk records it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.contracts.errors import UserError

if TYPE_CHECKING:
    from learner.rl.step_record import RecordedStep, StepRecord


def recorded(path: Path, step: int) -> RecordedStep:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from learner.rl.step_record import Differs, RecordedStep

    if not path.is_file():
        raise UserError(
            f"step {step} has no rollouts file",
            where=str(path),
            fix="put it back; a run must have saved the rollouts of every step from the first",
        )
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
        record = _record(file.schema_arrow, path)
        rows = file.read(["group_id", "prompt_ids"])
        groups = tuple(sorted(set(rows.column("group_id").to_pylist())))
        prompt = tuple(rows.column("prompt_ids")[0].as_py())
    except (OSError, ValueError, LookupError, pa.ArrowException) as problem:
        raise Differs(f"step {step}: {path} is damaged: {problem}") from problem
    if record.step != step:
        raise Differs(f"step {step}: {path} holds the rollouts of step {record.step}")
    return RecordedStep(path=path, record=record, group_ids=groups, prompt=prompt)


def _record(schema: Any, path: Path) -> StepRecord:
    from learner.rl.step_record import read_record

    record = read_record(schema)
    if record is None:
        raise UserError(
            "does not say what was trained on it: it was written by an older Accord",
            where=str(path),
            fix="replay runs made since, or use the version that made this one",
        )
    return record
