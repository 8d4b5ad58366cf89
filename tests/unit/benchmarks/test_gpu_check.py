"""The runner of the GPU check: limits, records, and what is not run again."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.gpu.check import PARTS, summary
from benchmarks.gpu.report import Check, Found, read, write
from benchmarks.gpu.scale import HALF_B, ONE_AND_A_HALF_B


def test_a_figure_that_is_not_a_number_satisfies_no_limit() -> None:
    assert Check("a", 1.0, 1.0).ok
    assert not Check("a", 1.1, 1.0).ok
    assert Check("a", 1.1, 1.0, at_least=True).ok
    assert not Check("a", math.nan, 1.0).ok
    assert not Check("a", math.nan, 1.0, at_least=True).ok
    assert Check("a", math.nan, None).ok


def test_a_part_without_a_record_has_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = Found(), Found()
    good.at_most("error", 0.1, 0.2)
    bad.at_least("speed", 0.1, 0.2)
    write(tmp_path / "install.json", "install", good, 1.0, {"kind": "cpu"})
    assert summary(["install"], tmp_path) == 0
    assert summary(["install", "mfu"], tmp_path) == 1
    assert "mfu: FAILED, see" in capsys.readouterr().out
    write(tmp_path / "mfu.json", "mfu", bad, 1.0, {"kind": "cpu"})
    assert summary(["mfu"], tmp_path) == 1
    assert "mfu: speed = 0.1 (>= 0.2)  FAILED" in capsys.readouterr().out
    record = read(tmp_path / "mfu.json")
    assert record is not None
    assert not record["ok"]
    assert record["device"] == {"kind": "cpu"}


def test_each_part_has_a_module() -> None:
    root = Path(__file__).resolve().parents[3] / "benchmarks" / "gpu"
    for part in PARTS:
        assert (root / f"{part.partition('_')[0]}_part.py").is_file(), part


def test_the_shapes_are_of_the_sizes_they_are_called_by() -> None:
    # Qwen2.5: 0.494 and 1.544 billion parameters, biases and norms included.
    assert HALF_B.parameters == pytest.approx(0.494e9, rel=0.01)
    assert ONE_AND_A_HALF_B.parameters == pytest.approx(1.544e9, rel=0.01)
