"""Model FLOPs by hand, and a peak that a matrix product reaches."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from learner.models.load import ValueModel
from learner.rl.flops import TrunkFlops, matrix_peak, step_flops

H, LAYERS, HEADS, WIDE, V = 8, 3, 2, 20, 50
PROMPTS, ANSWERS = np.array([3, 5]), np.array([4, 2])


def _policy() -> Any:
    config = transformers.AutoConfig.for_model(
        "llama",
        vocab_size=V,
        hidden_size=H,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        head_dim=4,
        intermediate_size=WIDE,
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def _batch() -> Any:
    return SimpleNamespace(lengths=PROMPTS + ANSWERS, response_ids=SimpleNamespace(lengths=ANSWERS))


def _settings(epochs: int = 1, minibatches: int = 1) -> Any:
    update = SimpleNamespace(epochs=epochs, minibatches=minibatches)
    return SimpleNamespace(learner=update, lora=None)


def test_flops_by_hand() -> None:
    policy = _policy()
    # q and o: H x heads * size; k and v: H x one head; gate, up and down: H x WIDE.
    weights = LAYERS * (2 * H * 8 + 2 * H * 4 + 3 * H * WIDE)
    trunk = 2 * weights * (7 + 7) + 2 * LAYERS * 8 * (7**2 + 7**2)
    assert TrunkFlops.of(policy.base_model, policy.config).forward(_batch()) == trunk
    forward = trunk + 2 * H * V * 6

    def flops(**changes: Any) -> float:
        given = {"policy": policy, "reference": None, "value": None, "shared": False}
        networks: Any = SimpleNamespace(**{**given, **changes.pop("networks", {})})
        value_only = changes.pop("value_only", False)
        return step_flops(networks, _settings(**changes), _batch(), value_only)

    assert flops() == 3 * forward
    assert flops(networks={"reference": policy}) == 4 * forward
    # Two updates: the measuring pass is no recomputation.
    assert flops(minibatches=2) == 4 * forward
    assert flops(epochs=2) == 7 * forward
    own = {"value": ValueModel.from_policy(policy)}
    assert flops(networks=own) == 3 * forward + 3 * trunk
    assert flops(networks=own, value_only=True) == forward + 3 * trunk
    shared = {"value": torch.nn.Linear(H, 1), "shared": True}
    assert flops(networks=shared) == 3 * forward
    assert flops(networks=shared, value_only=True) == forward


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_peak_is_that_of_a_product(dtype: str) -> None:
    began = time.perf_counter()
    peak = matrix_peak(dtype, torch.device("cpu"))
    assert time.perf_counter() - began < 5.0
    assert 1e8 < peak < 1e14
