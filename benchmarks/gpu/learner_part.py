"""One PPO step on the device against the same step on the CPU, padded and packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.learners import LR, KeepingPublisher, make_learner
from benchmarks.gpu.models import make_model, rollouts
from benchmarks.gpu.report import Found
from benchmarks.gpu.scale import TINY, Scale
from cluster.contracts.records import StepInput

# One update moves a weight by up to LR: bfloat16 may turn the sign of a few tiny gradients.
LIMITS = {"float32": 0.1 * LR, "bfloat16": 2 * LR}


def run(scale: Scale, folder: Path, found: Found, *, out: Path) -> None:
    path = make_model(folder / "model", TINY)
    expected = _after_a_step(path, "float32", gpus=0, packing="padded")
    for dtype in scale.dtypes:
        for packing in ("padded", "packed"):
            got = _after_a_step(path, dtype, gpus=scale.gpus, packing=packing)
            far = {name: np.abs(got[name] - expected[name]) for name in expected}
            case = f"{dtype}, {packing}"
            found.at_most(f"{case}: largest", max(d.max() for d in far.values()), LIMITS[dtype])
            mean = float(np.mean([d.mean() for d in far.values()]))
            found.at_most(f"{case}: mean", mean, LIMITS[dtype] / 10)


def _after_a_step(path: Path, dtype: str, **learner: Any) -> dict[str, Any]:
    publisher = KeepingPublisher()
    ppo = make_learner(path, dtype, publisher, groups=4, samples=2, **learner)
    ppo.start()
    table, groups = rollouts(TINY, 0, 4, 2, 16)
    ppo.step(StepInput(step=0, group_ids=groups, payloads=(table,)))
    ppo.close()
    return dict(publisher.arrays)
