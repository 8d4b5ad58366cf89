"""Rewards looked at before anything is started: a mistake in them should not cost a Ray cluster."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence

from cluster.contracts.config.reward import (
    FunctionSource,
    GrpcSource,
    RewardConfig,
    RewardModelSource,
    RulesSource,
)
from cluster.contracts.errors import BadReward, UserError
from cluster.contracts.records import Prompt

CONNECT_S = 5.0
TRIAL_COMPLETIONS = ("A trial completion.", "")  # a policy may write nothing at all


def check_rewards(config: RewardConfig, prompts: Sequence[Prompt]) -> None:
    """Raise UserError for a reward that cannot be loaded, reached, or used on ``prompts``.

    A reward function's file is run, as the service will run it, and the function is called once
    with the first prompt and two completions. Of a reward model everything is looked at but the
    numbers of its weights.
    """
    if config.address is not None:
        _reach(config.address, reward_token())
        return
    for source in config.sources:
        if isinstance(source, FunctionSource):
            _try_function(source, prompts)
        elif isinstance(source, RulesSource):
            from reward_service.sources.rules import RulesScorer

            RulesScorer(source)
        elif isinstance(source, RewardModelSource):
            from learner.models.files import check_reward_model
            from reward_service.sources.model import own_tokenizer

            own_tokenizer(source)
            check_reward_model(source.path)
        elif isinstance(source, GrpcSource):
            _reach(source.address, None)


def _try_function(source: FunctionSource, prompts: Sequence[Prompt]) -> None:
    from reward_service.source import ScoreItem
    from reward_service.sources.function import FunctionScorer

    where = f"reward source {source.name!r}"
    with contextlib.redirect_stdout(sys.stderr):  # what it prints is no result of the command
        scorer = FunctionScorer(source)
        try:
            for prompt in prompts:
                scorer.require_columns(prompt.metadata, prompt.where)
            scorer.score(
                [
                    ScoreItem(
                        id=f"trial-{number}",
                        messages=prompts[0].messages,
                        response=text,
                        metadata=prompts[0].metadata,
                        where=f"{prompts[0].where}, trial completion {text!r}",
                    )
                    for number, text in enumerate(TRIAL_COMPLETIONS)
                ]
            )
        except BadReward as problem:
            fix = "mend the function; it must score any completion, an empty one too"
            raise UserError(str(problem), where=where, fix=fix) from problem


def reward_token() -> str | None:
    """Bearer token of the service at ``reward.address``; secrets come from the environment only."""
    return os.environ.get("ACCORD_REWARD_TOKEN")


def _reach(address: str, token: str | None) -> None:
    from reward_service.client import RewardClient

    with RewardClient([address], token=token) as client:
        client.connect(CONNECT_S)
