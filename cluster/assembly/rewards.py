"""Rewards looked at before anything is started: a mistake in them should not cost a Ray cluster."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.contracts.config.reward import RewardConfig
from cluster.contracts.records import Prompt
from reward_service.access import Access, service_access

CONNECT_S = 3.0


def check_rewards(config: RewardConfig, prompts: Sequence[Prompt]) -> None:
    """Raise UserError for a reward that cannot be loaded, reached, or used on ``prompts``.

    A reward function's file is run, as the service will run it, and the function is called once
    with the first prompt and two completions. Of a reward model everything is looked at but the
    numbers of its weights.
    """
    if config.address is not None:
        _reach(config.address, service_access(config))
        return
    from reward_service.composition import check_source

    for source in config.sources:
        theirs = [p for p in prompts if not source.policies or p.policy in source.policies]
        check_source(source, theirs or prompts)


def _reach(address: str, access: Access) -> None:
    from reward_service.client import RewardClient

    with RewardClient([address], access=access) as client:
        client.connect(CONNECT_S)
