"""The log-probability matrix: engine decode and prefill, learner padded, packed and chunked.

Measured once by parity_checks.py in its own process, after two weight updates; each test asserts
on a part of the numbers. `python tests/integration/parity_checks.py --table` prints them.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM has no build for this machine")
pytestmark = [pytest.mark.slow, pytest.mark.parallel]

FLOAT32_MAX, FLOAT32_MEAN = 1e-5, 1e-6  # nats
BFLOAT16_MAX, BFLOAT16_MEAN, BFLOAT16_MULT = 0.1, 0.01, 1.01
PAIRS = (
    "decode-padded",
    "decode-packed",
    "decode-prefill",
    "prefill-padded",
    "padded-packed",
    "whole head-chunked head",
)
MISTAKES = ("decode-wrong temperature", "decode-off by one")
TEMPERATURES, LENGTHS, BATCHES = (0.7, 1.0), (1, 2, 31, 32, 33, 96), (1, 8, 32)


@pytest.fixture(scope="module")
def measured(
    repo_root: Path,
    tmp_path_factory: pytest.TempPathFactory,
    record_testsuite_property: Callable[[str, object], None],
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("parity")
    script = repo_root / "tests" / "integration" / "parity_checks.py"
    result = subprocess.run(
        [sys.executable, str(script), str(folder)],
        cwd=repo_root,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    results = dict(json.loads((folder / "parity.json").read_text(encoding="utf-8")))
    record_testsuite_property("logprob_parity", results["table"])  # into the JUnit report
    return results


@pytest.fixture
def cells(measured: dict[str, Any]) -> list[dict[str, Any]]:
    return list(measured["cells"])


def of(cells: list[dict[str, Any]], dtype: str, pair: str) -> list[dict[str, Any]]:
    return [c for c in cells if c["dtype"] == dtype and "-".join(c["pair"]) == pair]


def overall(cells: list[dict[str, Any]], key: str) -> float:
    """Mean over tokens, not over cells."""
    tokens = sum(cell["tokens"] for cell in cells)
    return float(sum(cell[key] * cell["tokens"] for cell in cells) / tokens)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pair", PAIRS)
def test_every_cell_of_the_matrix_is_there(
    cells: list[dict[str, Any]], dtype: str, pair: str
) -> None:
    found = sorted(
        (c["temperature"], c["length"], c["batch"], c["end"]) for c in of(cells, dtype, pair)
    )
    ends = ("length", "stop")
    assert found == list(itertools.product(TEMPERATURES, LENGTHS, BATCHES, ends))


@pytest.mark.parametrize("pair", PAIRS)
def test_float32_paths_agree_in_every_cell(cells: list[dict[str, Any]], pair: str) -> None:
    over = [c for c in of(cells, "float32", pair) if not c["max"] <= FLOAT32_MAX]
    assert over == []
    for temperature in TEMPERATURES:
        alike = [c for c in of(cells, "float32", pair) if c["temperature"] == temperature]
        assert overall(alike, "mean") <= FLOAT32_MEAN


@pytest.mark.parametrize("pair", PAIRS)
def test_bfloat16_paths_agree_to_its_rounding(cells: list[dict[str, Any]], pair: str) -> None:
    over = [c for c in of(cells, "bfloat16", pair) if not c["max"] <= BFLOAT16_MAX]
    assert over == []
    for temperature in TEMPERATURES:
        alike = [c for c in of(cells, "bfloat16", pair) if c["temperature"] == temperature]
        assert overall(alike, "mult") <= BFLOAT16_MULT
        assert overall(alike, "mean") <= BFLOAT16_MEAN


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_limits_would_notice(cells: list[dict[str, Any]], dtype: str, mistake: str) -> None:
    """The learner at temperature 0.85, and its numbers moved by one token, against the engine."""
    found = of(cells, dtype, mistake)
    assert len(found) == 60
    assert min(c["max"] for c in found) > 100 * FLOAT32_MAX
    assert overall(found, "mult") > 1.05


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_end_where_they_should_some_out_of_a_cached_prefix(
    measured: dict[str, Any], dtype: str
) -> None:
    got = measured["rows"][dtype]
    assert got["stop_asked"] == len(TEMPERATURES) * len(LENGTHS) * sum(BATCHES)
    # A near-tie between two tokens may fall the other way in another batch: rarely.
    assert got["stop_exact"] >= 0.95 * got["stop_asked"]
    assert got["cached_tokens"] >= 1000


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_samples_of_one_prompt_compute_it_once(measured: dict[str, Any], dtype: str) -> None:
    """Eight of them submitted together: seven take both full blocks out of the cache."""
    assert measured["rows"][dtype]["shared"] == 7 * 2 * 32
