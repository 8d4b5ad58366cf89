"""The learner on a GPU against the learner on the CPU: packed and padded, float32 and bfloat16."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from cluster.contracts.config.base import ModelConfig
from cluster.contracts.records import StepInput
from learner.rl.learner import PPOLearner

pytestmark = pytest.mark.gpu
GROUPS = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def world() -> Any:
    path = Path(__file__).parents[1] / "ppo_world.py"
    spec = importlib.util.spec_from_file_location("accord_tests_gpu_ppo_world", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def published(world: Any, folder: Path, dtype: str, **learner: Any) -> dict[str, Any]:
    """Weights after one PPO step on rollouts made on the CPU."""
    path = world.make_model(folder, hidden=64)
    publisher = world.KeepingPublisher()
    settings = world.make_settings(
        path, model=ModelConfig(path=str(path), dtype=dtype), learner={"lr": 1e-3, **learner}
    )
    ppo = PPOLearner(settings, publisher=publisher)
    ppo.start()
    model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    table = world.table_of(world.make_groups(model, groups=len(GROUPS)))
    ppo.step(StepInput(step=0, group_ids=GROUPS, payloads=(table,)))
    ppo.close()
    return dict(publisher.arrays)


@pytest.mark.parametrize("packing", ["padded", "packed"])
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-4), ("bfloat16", 2e-3)])
def test_a_step_on_the_gpu_is_the_step_on_the_cpu(
    world: Any, tmp_path: Path, packing: str, dtype: str, limit: float
) -> None:
    """limit: on the largest difference of a weight; one update moves each by up to lr = 1e-3, so
    bfloat16 may turn the sign of a few tiny gradients."""
    expected = published(world, tmp_path / "cpu", "float32")
    got = published(world, tmp_path / "gpu", dtype, gpus=1, packing=packing)
    assert expected.keys() == got.keys()
    far = {name: float(np.abs(got[name] - expected[name]).max()) for name in expected}
    assert max(far.values()) <= limit, far
    mean = np.mean([np.abs(got[name] - expected[name]).mean() for name in expected])
    assert mean <= limit / 10


def test_it_really_ran_there(world: Any, tmp_path: Path) -> None:
    torch.cuda.reset_peak_memory_stats()
    published(world, tmp_path / "gpu", "bfloat16", gpus=1)
    assert torch.cuda.max_memory_allocated() > 0
