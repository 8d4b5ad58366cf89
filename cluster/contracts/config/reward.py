"""Where rewards come from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cluster.contracts.config.base import Section


class RewardModelSource(Section):
    type: Literal["model"] = "model"
    path: str = Field(description="A reward-model directory made by `accord reward-model`.")
    weight: float = 1.0
    name: str = "model"
    normalise: bool = Field(True, description="Centre and scale as stored with the reward model.")


class FunctionSource(Section):
    type: Literal["function"] = "function"
    path: str = Field(
        description="`file.py:function`; called with lists prompts, completions and each metadata "
        "column by keyword, returns one number a completion."
    )
    weight: float = 1.0
    name: str = "function"


class RulesSource(Section):
    type: Literal["rules"] = "rules"
    min_words: int | None = None
    max_words: int | None = None
    required: list[str] = Field(
        default_factory=list, description="Regular expressions to be found."
    )
    forbidden: list[str] = Field(
        default_factory=list, description="Regular expressions not to be found."
    )
    repetition: bool = Field(False, description="Penalise the share of repeated 3-grams.")
    weight: float = 1.0
    name: str = "rules"


class GrpcSource(Section):
    type: Literal["grpc"] = "grpc"
    address: str = Field(description="host:port of a service speaking accord.reward.v1.")
    weight: float = 1.0
    name: str = "grpc"


RewardSource = Annotated[
    RewardModelSource | FunctionSource | RulesSource | GrpcSource, Field(discriminator="type")
]


class RewardConfig(Section):
    sources: list[RewardSource] = Field(
        min_length=1, description="Rewards; their weighted sum is the score."
    )
    deadline_s: float = Field(
        30, gt=0, description="Deadline of one scoring call, retries included."
    )
    max_batch: int = Field(64, ge=1, description="Most rollouts scored in one pass.")
    max_wait_ms: float = Field(5, ge=0, description="How long a batch waits to fill.")
    clip: float | None = Field(None, gt=0, description="Clip the weighted sum to ±clip.")
    address: str | None = Field(
        None,
        description="Use a running reward service instead of starting one (`accord serve-reward`).",
    )
