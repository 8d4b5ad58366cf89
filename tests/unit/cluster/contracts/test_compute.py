"""What `learner` and `fit` share: where weights, gradients, moments and activations lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
from pydantic import ValidationError

from cluster.contracts.config.compute import ComputeConfig
from cluster.contracts.config.parallel_modes import PAIRS, Refusal, mode_problems
from cluster.contracts.config.train import TrainConfig


class Limited(ComputeConfig):
    section: ClassVar[str] = "fit"
    unsupported: ClassVar[Mapping[str, str]] = {"offload": "it has no host"}


FSDP: dict[str, Any] = {"processes": 2, "sharding": "fsdp2"}


def test_the_data_parallel_degree_is_what_the_other_splits_leave() -> None:
    config = ComputeConfig(processes=16, tensor_parallel=4, sequence_parallel=2)
    assert config.data_parallel == 2


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"sharding": "fsdp2"}, "learner.processes to 2 or more"),
        ({"processes": 6, "tensor_parallel": 4}, "a multiple of 4"),
        ({"processes": 4, "tensor_parallel": 2, "sequence_parallel": 4}, "groups of 8"),
        ({**FSDP, "tensor_parallel": 2}, "a larger multiple of 2"),
        ({"reshard_after_forward": False}, "learner.sharding = 'fsdp2'"),
        ({"prefetch_layers": 3}, "learner.sharding = 'fsdp2'"),
        ({"offload": ["parameters"]}, "learner.sharding = 'fsdp2'"),
        ({"offload": ["activations"]}, "learner.gradient_checkpointing = true"),
        ({"offload": ["optimizer", "optimizer"]}, "twice"),
        ({**FSDP, "offload": ["parameters", "optimizer"]}, "leave 'optimizer' out"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_way_out(
    keys: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValidationError, match=says):
        ComputeConfig(**keys)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "-".join(pair.modes))
def test_pairs_of_modes_are_refused_with_the_reason_and_the_one_to_leave_out(pair: Refusal) -> None:
    assert mode_problems("fit", pair.modes[:1]) == []
    (said,) = mode_problems("fit", pair.modes)
    assert pair.why in said
    assert said.endswith(f"Leave fit.{pair.leave} out")


def test_a_learner_that_is_compiled_and_split_is_refused() -> None:
    given: dict[str, Any] = {
        "model": {"path": "m"},
        "data": {"prompts": "p"},
        "reward": {"sources": [{"type": "rules"}]},
        "learner": {"compile": True, "processes": 2, "sequence_parallel": 2},
    }
    with pytest.raises(ValidationError, match=r"learner\.compile cannot be had together with"):
        TrainConfig.model_validate(given)
    shared = {**given, "algorithm": {"advantage": "grpo"}, "learner": {"processes": 8}}
    shared["batch"] = {"prompts_per_step": 4, "samples_per_prompt": 4}
    with pytest.raises(ValidationError, match="makes 8 shares of a step of 4 prompts"):
        TrainConfig.model_validate(shared)


def test_a_key_that_a_section_cannot_set_is_refused_with_its_reason_unless_it_is_the_default() -> (
    None
):
    with pytest.raises(ValidationError, match=r"fit\.offload = \['optimizer'\].* it has no host"):
        Limited(offload=["optimizer"])
    assert Limited(offload=[]).offload == []
