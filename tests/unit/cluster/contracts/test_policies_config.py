"""What `[[policies]]` may be, and what it says where it may not."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.contracts.config.file import check_config
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.errors import UserError

REWARDS = [
    {"type": "rules", "name": "short", "max_words": 3, "policies": ["brief"]},
    {"type": "rules", "name": "long", "min_words": 9, "policies": ["wordy"]},
]


def config(**changes: Any) -> TrainConfig:
    tree: dict[str, Any] = {
        "model": {"path": "m"},
        "data": {},
        "lora": {"rank": 4},
        "batch": {"prompts_per_step": 8},
        "reward": {"sources": REWARDS},
        "policies": [
            {"name": "brief", "prompts": "brief.jsonl"},
            {"name": "wordy", "prompts": "wordy.jsonl"},
        ],
    }
    return check_config(TrainConfig, {**tree, **changes}, where="t")


def test_the_record_names_the_files_of_all_policies() -> None:
    made = config()
    assert made.data.prompts == "brief.jsonl, wordy.jsonl"
    again = check_config(TrainConfig, made.model_dump(mode="json"), where="t")
    assert again == made


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": None}, r"add a \[lora\] section"),
        ({"data": {"prompts": "p"}}, "data.prompts is not used"),
        ({"batch": {"prompts_per_step": 9}}, "multiple of 2"),
        ({"rollout": {"engine": "transformers"}}, "set it to 'vllm'"),
        ({"rollout": {"tensor_parallel": 2}}, "tensor_parallel over 1"),
        ({"learner": {"value_model": "own"}}, "head on the shared trunk"),
        ({"learner": {"minibatches": 64}}, "completions of a policy"),
        ({"policies": [{"name": "Brief!", "prompts": "p"}]}, "pattern"),
        ({"policies": [{"name": "brief", "prompts": "p"}] * 2}, "same name twice"),
        ({"policies": [], "data": {"prompts": "p"}}, "names none"),
        ({"reward": {"sources": REWARDS[:1]}}, "no reward scores the policy 'wordy'"),
    ],
)
def test_what_does_not_go_together_is_said(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(**changes)
