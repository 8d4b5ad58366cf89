"""`accord plan --probe` against the run it predicts: real vLLM, real learner, real rewards."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

FACTOR = 2.0  # machines are shared: 1.5 is what to expect of a quiet one


def config_of(world: Any, folder: Path) -> Path:
    return world.train_toml(
        folder / "c.toml",
        'type = "rules"\nmax_words = 3',
        batch="prompts_per_step = 16\nsamples_per_prompt = 4\nsteps = 40",
        rollout='engine = "vllm"\nmax_tokens = 48\nmin_tokens = 48\nmax_running = 32',
        algorithm='advantage = "rloo"\nkl.coef = 0.0',
        learner="lr = 1e-4\ntokens_per_microbatch = 1024",
    )


def test_the_predicted_step_is_that_of_the_run(world: Any, accord: Any) -> None:
    path = config_of(world, accord.folder)
    planned = accord.start("plan", path, "--probe", "--json")
    assert planned.wait(240) == 0, planned.stderr
    assert planned.left() == []
    found = json.loads(planned.stdout)["probe"]
    assert found["mean_length"] == 48
    assert found["bound"] == 2  # 32 slots for 64 samples
    assert found["verdict"].startswith("Bottleneck: ")
    assert found["memory"]["worker: key-value cache"] == 64 << 20
    busier = max(found["times"]["generate_s"], found["times"]["learn_s"])
    assert busier <= found["prediction"]["step_s"] < found["synchronous_s"]

    trained = accord.start("train", path)
    assert trained.wait(240) == 0, trained.stderr
    lines = (accord.folder / "runs" / "r" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    # The first steps find a pipeline that is empty and times that are not measured yet, the last
    # ones nothing left to generate. A step takes a tenth of a second, so it takes some to settle.
    took = statistics.median(row["time/step"] for row in rows[10:-2])
    assert took / FACTOR < found["prediction"]["step_s"] < took * FACTOR
