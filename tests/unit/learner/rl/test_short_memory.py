"""A learner whose memory runs out in a step trains it in smaller microbatches, or tells of it."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM

from cluster.contracts.records import StepInput
from learner.rl.learner import PPOLearner
from learner.rl.objective import Objective

GROUPS = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def table(world: ModuleType, tiny: Path) -> pa.Table:
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    return world.table_of(world.make_groups(model, seed=1))


class Memory:
    """Runs out in the loss of a microbatch of more than ``tokens``, from the one ``first``
    (counted from 0) on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, problem: type[Exception]) -> None:
        self.tokens, self.first, self.calls = 10**9, 0, 0
        policy_loss = Objective.policy_loss

        def limited(objective: Objective, *args: Any) -> Any:
            micro = args[3]
            number, self.calls = self.calls, self.calls + 1
            torch.rand(1)  # as dropout would draw
            if number >= self.first and micro.input_ids.numel() > self.tokens:
                raise problem("out of memory")
            return policy_loss(objective, *args)

        monkeypatch.setattr(Objective, "policy_loss", limited)


def trained(
    world: ModuleType, tiny: Path, table: pa.Table, **learner: Any
) -> tuple[PPOLearner, Any, Any]:
    publisher = world.KeepingPublisher()
    made = PPOLearner(world.make_settings(tiny, learner=learner), publisher)
    made.start()
    return made, made.step(StepInput(step=0, group_ids=GROUPS, payloads=(table,))), publisher


@pytest.mark.parametrize("problem", [torch.OutOfMemoryError, MemoryError])
def test_the_same_step_is_trained_in_halves_and_the_next_one_whole(
    world: ModuleType,
    tiny: Path,
    table: pa.Table,
    monkeypatch: pytest.MonkeyPatch,
    problem: type[Exception],
) -> None:
    memory = Memory(monkeypatch, problem)
    _, asked, expected = trained(world, tiny, table, tokens_per_microbatch=32)
    drawn = torch.get_rng_state()
    assert asked.smaller_microbatches is None
    memory.tokens = 32
    learner, result, published = trained(world, tiny, table, tokens_per_microbatch=64)
    assert result.smaller_microbatches == 32
    assert result.trained_tokens == asked.trained_tokens
    for name, weights in expected.arrays.items():
        np.testing.assert_array_equal(published.arrays[name], weights)
    assert torch.equal(torch.get_rng_state(), drawn)  # the failed attempt drew nothing that counts
    assert learner.settings.learner.tokens_per_microbatch == 64


def test_what_memory_interrupts_after_an_update_is_not_tried_again(
    world: ModuleType, tiny: Path, table: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory(monkeypatch, MemoryError)
    trained(world, tiny, table, minibatches=2)
    per_minibatch = memory.calls // 2
    memory.calls, memory.first, memory.tokens = 0, per_minibatch, 0
    with pytest.raises(MemoryError):
        trained(world, tiny, table, minibatches=2)
    assert memory.calls == per_minibatch + 1


def test_a_completion_that_does_not_fit_alone_is_told(
    world: ModuleType, tiny: Path, table: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = Memory(monkeypatch, MemoryError)
    memory.tokens = 0
    with pytest.raises(MemoryError):
        trained(world, tiny, table)
    assert 1 < memory.calls < 5
