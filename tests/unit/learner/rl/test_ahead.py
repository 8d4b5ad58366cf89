"""A step some of whose parts were computed before it was asked for equals one that was not helped,
bit for bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from transformers import AutoModelForCausalLM

from cluster.contracts.metrics import values
from cluster.contracts.records import StepInput
from cluster.contracts.stream_parts import part_of
from learner.rl import measuring_pass
from learner.rl.learner import PPOLearner

GROUPS = (0, 1, 2, 3)
TIMES = ("time/", "perf/")

VARIANTS: dict[str, dict[str, Any]] = {
    "value head, waiting": {"algorithm": {"entropy_coef": 0.01}},
    "own value network, twice": {"learner": {"value_model": "own", "activation_memory_mb": 0}},
    "kl in the loss, inline": {
        "algorithm": {"advantage": "grpo", "kl": {"place": "loss", "estimator": "k3+", "coef": 0.5}}
    },
    "no reference, inline, padded": {
        "algorithm": {"advantage": "grpo", "kl": {"coef": 0.0}},
        "learner": {"packing": "padded"},
    },
}


@pytest.fixture(scope="module")
def tables(world: ModuleType, tiny: Path) -> list[pa.Table]:
    """A step of four groups, another one of the same ids, and the step after it."""
    model = AutoModelForCausalLM.from_pretrained(tiny).eval()
    return [
        world.table_of(world.make_groups(model, seed=seed, first_group=first))
        for seed, first in ((0, 0), (1, 0), (2, 4))
    ]


def started(world: ModuleType, tiny: Path, variant: dict[str, Any], parts: int = 3) -> Any:
    learner = {"stream_parts": parts, "tokens_per_microbatch": 32, **variant.get("learner", {})}
    publisher = world.KeepingPublisher()
    batch = {"prompts_per_step": 4}
    settings = world.make_settings(tiny, **{**variant, "learner": learner, "batch": batch})
    made = PPOLearner(settings, publisher)
    made.start()
    return made, publisher


def asked(step: int, table: pa.Table, groups: tuple[int, ...] = GROUPS) -> StepInput:
    return StepInput(step=step, group_ids=tuple(g + 4 * step for g in groups), payloads=(table,))


def numbers(result: Any) -> dict[str, float]:
    return {k: v for k, v in values(result.metrics).items() if not k.startswith(TIMES)}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_helped_step_is_the_same_bit_for_bit_and_computes_nothing_twice(
    name: str,
    world: ModuleType,
    tiny: Path,
    tables: list[pa.Table],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone, expected = started(world, tiny, VARIANTS[name])
    wanted = [numbers(alone.step(asked(0, tables[0]))), numbers(alone.step(asked(1, tables[2])))]
    passes = []
    outputs = measuring_pass.policy_outputs

    def counting(*given: Any, **named: Any) -> Any:
        passes.append(given)
        return outputs(*given, **named)

    monkeypatch.setattr(measuring_pass, "policy_outputs", counting)
    helped, got = started(world, tiny, VARIANTS[name])
    # The parts of 4 groups in 3: {0, 1}, {2}, {3}.
    helped.work_ahead(asked(0, tables[0], (3, 2)))
    helped.work_ahead(asked(0, tables[0], (0, 1)))
    before = len(passes)
    assert before
    helped.work_ahead(asked(0, tables[0], (0, 1)))  # told again
    result = helped.step(asked(0, tables[0]))
    assert len(passes) == before
    assert values(result.metrics)["perf/learner_busy_s"] > values(result.metrics)["time/step"]
    helped.work_ahead(asked(1, tables[2], (2,)))
    found = [numbers(result), numbers(helped.step(asked(1, tables[2])))]
    assert found == wanted
    for key, weights in expected.arrays.items():
        np.testing.assert_array_equal(got.arrays[key], weights)


def test_a_group_that_came_again_with_other_tokens_is_computed_again(
    world: ModuleType, tiny: Path, tables: list[pa.Table]
) -> None:
    alone, expected = started(world, tiny, {})
    wanted = numbers(alone.step(asked(0, tables[1])))
    for again in ((), (0, 1)):
        helped, got = started(world, tiny, {})
        helped.work_ahead(asked(0, tables[0]))
        if again:
            helped.work_ahead(asked(0, tables[1], again))
        assert numbers(helped.step(asked(0, tables[1]))) == wanted
        for key, weights in expected.arrays.items():
            np.testing.assert_array_equal(got.arrays[key], weights)


def test_graphs_wait_as_far_as_the_memory_of_all_parts_goes(
    world: ModuleType, tiny: Path, tables: list[pa.Table], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, expected = started(world, tiny, {})
    alone.step(asked(0, tables[0]))
    taken: list[tuple[float, bool]] = []
    takes = measuring_pass.GraphMemory.takes

    def noting(memory: Any, nbytes: float) -> bool:
        taken.append((nbytes, takes(memory, nbytes)))
        return taken[-1][1]

    monkeypatch.setattr(measuring_pass.GraphMemory, "takes", noting)
    everything, _ = started(world, tiny, {})
    everything.step(asked(0, tables[0]))
    first, second, third = (nbytes for nbytes, _ in taken)
    taken.clear()
    room = (first + second + third / 2) / 2**20
    monkeypatch.setattr(measuring_pass, "_memory_limit", lambda *_: room * 2**20)
    helped, got = started(world, tiny, {})
    helped.work_ahead(asked(0, tables[0], (0, 1)))
    helped.work_ahead(asked(0, tables[0], (2,)))
    helped.step(asked(0, tables[0]))
    assert [answer for _, answer in taken] == [True, True, False]
    for key, weights in expected.arrays.items():
        np.testing.assert_array_equal(got.arrays[key], weights)


def test_what_cannot_be_computed_ahead_is_left_to_the_step(
    world: ModuleType, tiny: Path, tables: list[pa.Table]
) -> None:
    alone, expected = started(world, tiny, {})
    alone.step(asked(0, tables[0]))
    helped, got = started(world, tiny, {})
    helped.work_ahead(asked(1, tables[2]))  # not its next step
    helped.work_ahead(dataclasses.replace(asked(0, tables[0]), payloads=("no table",)))
    helped.work_ahead(asked(0, tables[2]))  # groups that are in no payload
    helped.step(asked(0, tables[0]))
    for key, weights in expected.arrays.items():
        np.testing.assert_array_equal(got.arrays[key], weights)


@pytest.mark.parametrize("parts", [1, 3, 4, 7])
def test_parts_hold_neighbours_and_are_as_even_as_can_be(parts: int) -> None:
    of = [part_of(group, 16, parts) for group in range(32, 48)]
    assert of == sorted(of)
    assert set(of) == set(range(parts))
    sizes = [of.count(part) for part in range(parts)]
    assert max(sizes) - min(sizes) <= 1
