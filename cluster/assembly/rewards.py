"""Rewards looked at before anything is started: a mistake in them should not cost a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Sequence

from cluster.contracts.config.reward import RewardConfig
from cluster.contracts.records import Prompt

CONNECT_S = 3.0


def check_rewards(config: RewardConfig, prompts: Sequence[Prompt]) -> None:
    """Raise UserError for a reward that cannot be loaded, reached, or used on ``prompts``.

    A reward function's file is run, as the service will run it, and the function is called once
    with the first prompt and two completions. Of a reward model everything is looked at but the
    numbers of its weights.
    """
    if config.address is not None:
        _reach(config.address, reward_token())
        return
    from reward_service.composition import check_source

    for source in config.sources:
        check_source(source, prompts)


def reward_token() -> str | None:
    """Bearer token of the service at ``reward.address``; secrets come from the environment only."""
    return os.environ.get("ACCORD_REWARD_TOKEN")


def _reach(address: str, token: str | None) -> None:
    from reward_service.client import RewardClient

    with RewardClient([address], token=token) as client:
        client.connect(CONNECT_S)
