"""Scores of completions that were sampled outside a training run."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.assembly.adapted import adapted
from cluster.contracts.config.base import ModelConfig
from cluster.contracts.config.reward import RewardConfig
from cluster.contracts.records import Rollout, Score


def scores_of(
    rewards: RewardConfig, answered: Sequence[tuple[ModelConfig, Sequence[Rollout]]]
) -> list[list[Score]]:
    """The scores of each model's completions, by rewards that are loaded once for all of them."""
    from learner.models.load import load_tokenizer
    from learner.models.reward_artifact import tokenizer_fingerprint
    from reward_service import wire
    from reward_service.composition import build

    scorer = build(rewards)
    try:
        return [
            scorer.score(
                wire.items_of(rollouts, tokenizer_fingerprint(load_tokenizer(adapted(model))))
            )
            for model, rollouts in answered
        ]
    finally:
        scorer.close()
