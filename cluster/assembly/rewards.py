"""Rewards looked at before anything is started: a mistake in them should not cost a Ray cluster."""

from __future__ import annotations

import os

from cluster.contracts.config.reward import (
    FunctionSource,
    GrpcSource,
    RewardConfig,
    RewardModelSource,
    RulesSource,
)

CONNECT_S = 5.0


def check_rewards(config: RewardConfig) -> None:
    """Raise UserError for a reward that cannot be loaded or reached.

    A reward function's file is run, as the service will run it; of a reward model everything but
    its weights is looked at.
    """
    if config.address is not None:
        _reach(config.address, reward_token())
        return
    for source in config.sources:
        if isinstance(source, FunctionSource):
            from reward_service.sources.function import FunctionScorer

            FunctionScorer(source)
        elif isinstance(source, RulesSource):
            from reward_service.sources.rules import RulesScorer

            RulesScorer(source)
        elif isinstance(source, RewardModelSource):
            from reward_service.sources.model import own_tokenizer

            own_tokenizer(source)
        elif isinstance(source, GrpcSource):
            _reach(source.address, None)


def reward_token() -> str | None:
    """Bearer token of the service at ``reward.address``; secrets come from the environment only."""
    return os.environ.get("ACCORD_REWARD_TOKEN")


def _reach(address: str, token: str | None) -> None:
    from reward_service.client import RewardClient

    with RewardClient([address], token=token) as client:
        client.connect(CONNECT_S)
