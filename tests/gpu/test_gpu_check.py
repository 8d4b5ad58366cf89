"""Each part of the GPU check is a test of `make test-gpu`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.check import PARTS

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all parts: a piece of the soak goes on where the last one ended."""
    return tmp_path_factory.mktemp("gpu-check")


@pytest.mark.parametrize("part", PARTS)
def test_a_part_is_within_its_limits(part: str, folder: Path, record_property: Any) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu.check", part, "--out", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + (folder / f"{part}.log").read_text(encoding="utf-8")
    record_property(part, json.loads((folder / f"{part}.json").read_text(encoding="utf-8")))
