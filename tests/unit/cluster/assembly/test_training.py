"""What a person reads in front of the progress of a run: the algorithm's own name."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.assembly.training import algorithm_title
from cluster.contracts.config.train import TrainConfig

TITLES = [
    ({"advantage": "gae"}, "PPO"),
    ({"advantage": "grpo"}, "GRPO"),
    ({"advantage": "rloo"}, "RLOO"),
    ({"advantage": "reinforce++"}, "REINFORCE++"),
    ({"advantage": "grpo", "loss": "cispo"}, "GRPO with loss cispo"),
]


@pytest.mark.parametrize(("algorithm", "title"), TITLES)
def test_the_title_is_the_algorithm(algorithm: dict[str, Any], title: str) -> None:
    config = TrainConfig.model_validate(
        {
            "model": {"path": "m"},
            "data": {"prompts": "p.jsonl"},
            "reward": {"sources": [{"type": "rules", "max_words": 5}]},
            "algorithm": algorithm,
        }
    )
    assert algorithm_title(config) == title
