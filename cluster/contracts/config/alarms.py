"""When a training run warns: limits on its own metrics. An alarm only warns; it stops nothing."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cluster.contracts.config.base import Section


class AlarmsConfig(Section):
    enabled: bool = Field(
        True, description="Warn when a metric leaves its limits. An alarm never stops the run."
    )
    patience: int = Field(
        3,
        ge=1,
        description="Steps in a row outside a limit before Accord warns, and inside it before "
        "the warning ends.",
    )
    zero_std_frac: float = Field(
        0.9,
        ge=0,
        le=1,
        description="No learning signal: warn when this share of the groups has equal scores. "
        "0: off.",
    )
    entropy_share: float = Field(
        0.2,
        ge=0,
        lt=1,
        description="Entropy collapse: warn when the entropy falls below this share of what it was "
        "over the first five steps. 0: off.",
    )
    kl_budget: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description="Warn when the KL to the reference is over this many nats per completion. "
        "auto: 0.2 per token of the mean completion, at least 20. 0: off.",
    )
    reward_jump: float = Field(
        3.0,
        ge=0,
        description="Warn when the mean score of a step differs from the median of the ten steps "
        "before by more than this many standard deviations of the scores. 0: off.",
    )
    constant_reward: bool = Field(
        True, description="Warn when all completions of a step have the same score."
    )
    clipped_ratio: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Warn when more than this share of the completions is cut at "
        "`rollout.max_tokens`. 0: off.",
    )
