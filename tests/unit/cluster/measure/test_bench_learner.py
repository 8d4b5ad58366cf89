"""The learner's benchmark on a model of no size: what it compares, not how fast that is."""

from __future__ import annotations

import math

import pytest

from cluster.measure.bench import learner as bench
from cluster.measure.bench.common import BenchOptions
from cluster.measure.bench.learner_child import measured


@pytest.mark.slow
@pytest.mark.parallel
def test_a_row_for_each_way_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = []

    def here(module: str, task: dict[str, object], what: str) -> dict[str, object]:
        assert module == "cluster.measure.bench.learner_child"
        tasks.append(task)
        return measured({**task, "shape": [64, 16, 1, 2, 16], "steps": 1})

    monkeypatch.setattr(bench, "run", here)
    monkeypatch.setattr(bench, "QUICK_CASES", [("5M", "bfloat16")])
    found = bench.measure(BenchOptions(repeats=1, quick=True))
    assert tasks == [{"shape": bench.SIZES["5M"], "dtype": "bfloat16", "steps": 3, "padded": True}]
    kinds = ["bare", "grpo", "ppo", "grpo padded"]
    assert [row[""] for row in found.rows] == [f"5M bfloat16 {kind}" for kind in kinds]
    assert all(row["tokens per CPU-s"] > row["answer tokens per CPU-s"] > 0 for row in found.rows)
    assert set(found.ratios) == {"efficiency 5M bfloat16", "packed over padded 5M bfloat16"}
    assert found.tolerances == {"efficiency 5M bfloat16": (0.97, math.inf)}
