"""`learner.compile` trains what an uncompiled learner trains."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from cluster.contracts.records import StepInput
from learner.rl.learner import PPOLearner


@pytest.mark.long
def test_a_compiled_learner_trains_the_same(world: ModuleType, tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    table = world.table_of(world.make_groups(model, seed=0))
    results = []
    for compiled in (False, True):
        publisher = world.KeepingPublisher()
        # One plain gradient step: Adam would turn rounding of tiny gradients into whole steps.
        settings = world.make_settings(tiny, learner={"compile": compiled, "eps": 1.0, "lr": 1.0})
        learner = PPOLearner(settings, publisher)
        learner.start()
        before = dict(publisher.arrays)
        learner.step(StepInput(step=0, group_ids=(0, 1, 2, 3), payloads=(table,)))
        trunk = learner.state.networks.policy.base_model
        assert (trunk._compiled_call_impl is not None) == compiled
        results.append({name: publisher.arrays[name] - before[name] for name in before})
    plain, other = results
    assert plain.keys() == other.keys()
    assert max(np.abs(moved).max() for moved in plain.values()) > 1e-3
    for name, moved in plain.items():
        np.testing.assert_allclose(moved, other[name], rtol=0, atol=2e-5, err_msg=name)
