"""The whole learner on a bandit: the reward is the share of one token, and it has to rise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from cluster.contracts.records import StepInput
from learner.rl.learner import PPOLearner

GOAL = 5
STEPS = 30
TOKENS = 4

VARIANTS: dict[str, dict[str, Any]] = {
    "gae-shared": {"algorithm": {"advantage": "gae"}},
    "gae-own": {"algorithm": {"advantage": "gae"}, "learner": {"value_model": "own"}},
    "grpo": {"algorithm": {"advantage": "grpo"}},
    "rloo": {"algorithm": {"advantage": "rloo"}},
    "reinforce++": {"algorithm": {"advantage": "reinforce++"}},
    "reinforce-baseline": {"algorithm": {"advantage": "reinforce-baseline"}},
}


def _share(tokens: Sequence[int]) -> float:
    return sum(token == GOAL for token in tokens) / TOKENS


@pytest.mark.parametrize("name", VARIANTS)
def test_the_reward_rises_within_thirty_steps(world: ModuleType, tiny: Path, name: str) -> None:
    variant = VARIANTS[name]
    learner = PPOLearner(
        world.make_settings(
            tiny,
            algorithm={**variant["algorithm"], "kl": {"coef": 0.001}},
            learner={"lr": 3e-3, "tokens_per_microbatch": 512, **variant.get("learner", {})},
            batch={"prompts_per_step": 4, "samples_per_prompt": 8},
            max_tokens=TOKENS,
        ),
        world.KeepingPublisher(),
    )
    learner.start()
    policy = learner.state.networks.policy
    torch.manual_seed(0)
    rewards = []
    for step in range(STEPS):
        groups = world.make_groups(
            policy,
            first_group=4 * step,
            groups=4,
            samples=8,
            max_tokens=TOKENS,
            seed=step,
            version=step,
            score=_share,
        )
        table = world.table_of(groups)
        ids = tuple(range(4 * step, 4 * step + 4))
        learner.step(StepInput(step=step, group_ids=ids, payloads=(table,)))
        rewards.append(float(np.mean(table.column("score").to_numpy())))
    # At random one token in 24: the goal's share starts near 0.04.
    assert np.mean(rewards[:3]) < 0.15
    assert np.mean(rewards[-3:]) > 0.5, rewards
