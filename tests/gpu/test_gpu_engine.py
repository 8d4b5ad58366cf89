"""vLLM's CUDA build through weight swaps with requests in flight (CUDA graphs on)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-3), ("bfloat16", 0.25)])
def test_tokens_after_a_swap_are_of_the_new_weights(
    tmp_path: Path, dtype: str, limit: float, record_property: Any
) -> None:
    script = Path(__file__).with_name("engine_checks.py")
    subprocess.run([sys.executable, str(script), str(tmp_path), dtype], check=True, timeout=900)
    found = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    record_property(f"engine_{dtype}", found)
    assert found["compared"] > 0
    assert found["canary_max"] <= limit
    assert found["last_version_max"] <= limit
    # Between two steps: at most one engine step, or 10 ms where steps are shorter than that.
    assert found["pause_max_s"] <= max(found["step_p50_s"], 0.010), found
