"""How many processes a fit gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.assembly.auto.fits import bytes_of_rows
from cluster.assembly.auto.resolve import resolve_fit
from cluster.assembly.model_facts import ModelFacts
from cluster.contracts.config.offline import SftConfig
from cluster.machine.hardware import Machine

TWO_CORES = Machine(cores=2, memory_mb=24 << 10, shared_memory_mb=12 << 10)
MANY_CORES = Machine(cores=64, memory_mb=256 << 10, shared_memory_mb=128 << 10)
A_GPU = Machine(
    cores=16, memory_mb=128 << 10, shared_memory_mb=64 << 10, gpus=1, gpu_memory_mb=80_000
)
SMALL = ModelFacts(
    parameters=900_000, layers=4, hidden=128, kv_heads=4, head_size=32, vocabulary=640, context=512
)
LARGE = ModelFacts(
    parameters=494_000_000, layers=24, hidden=896, kv_heads=2, head_size=64, vocabulary=151_936,
    context=None,
)  # fmt: skip
MANY_ROWS, FEW_ROWS = 9_000_000, 4000  # bytes


def chosen(
    machine: Machine,
    model: ModelFacts | None,
    rows_bytes: int | None,
    launched: int | None = None,
    **fit: Any,
) -> tuple[int, str]:
    config = SftConfig.model_validate(
        {"model": {"path": "m"}, "data": {"path": "d.jsonl"}, "fit": fit}
    )
    resolved = resolve_fit(config, machine, model, rows_bytes=rows_bytes, launched=launched)
    assert resolved.config.fit.processes == resolved.reasons["fit.processes"].value
    return resolved.config.fit.processes, resolved.reasons["fit.processes"].why


def test_a_small_model_gets_a_process_per_core() -> None:
    count, why = chosen(TWO_CORES, SMALL, MANY_ROWS)
    assert count == 2
    assert "0.9 million" in why
    assert chosen(MANY_CORES, SMALL, None)[0] == 4  # 8 rows each
    assert chosen(MANY_CORES, SMALL, MANY_ROWS, rows_per_step=512)[0] == 8


@pytest.mark.parametrize(
    ("machine", "model", "rows_bytes", "fit", "why"),
    [
        (TWO_CORES, SMALL, FEW_ROWS, {}, "0 s of training"),
        (TWO_CORES, SMALL, MANY_ROWS, {"max_seconds": 20}, "20 s of training"),
        (TWO_CORES, SMALL, None, {"max_steps": 3}, "s of training"),
        (TWO_CORES, SMALL, MANY_ROWS, {"threads": 2}, "fit.threads"),
        (TWO_CORES, SMALL, MANY_ROWS, {"rows_per_step": 8}, "8 rows per step"),
        (TWO_CORES, LARGE, MANY_ROWS, {}, "several threads"),
        (TWO_CORES, None, MANY_ROWS, {}, "unknown size"),
        (A_GPU, SMALL, MANY_ROWS, {}, "GPU"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_one_process_where_a_second_would_not_pay(
    machine: Machine, model: ModelFacts | None, rows_bytes: int | None, fit: Any, why: str
) -> None:
    count, reason = chosen(machine, model, rows_bytes, **fit)
    assert count == 1
    assert why in reason


def test_what_torchrun_started_and_what_the_user_set_stay() -> None:
    assert chosen(TWO_CORES, SMALL, FEW_ROWS, launched=3)[0] == 3
    config = SftConfig.model_validate(
        {"model": {"path": "m"}, "data": {"path": "d"}, "fit": {"processes": 1}}
    )
    resolved = resolve_fit(config, TWO_CORES, SMALL, rows_bytes=MANY_ROWS)
    assert resolved.config.fit.processes == 1
    assert "fit.processes" not in resolved.reasons


def test_bytes_of_rows_are_those_of_plain_text(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(b"x" * 100)
    assert bytes_of_rows(str(rows)) == 100
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "train.parquet").write_bytes(b"x" * 50)
    assert bytes_of_rows(str(tmp_path / "snapshot")) == 200
    assert bytes_of_rows("datasets:name") is None
