"""Where rewards come from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cluster.contracts.config.base import Address, Section


class RewardModelSource(Section):
    type: Literal["model"] = Field("model", description="A learnt reward model.")
    path: str = Field(description="A reward-model directory made by `accord reward-model`.")
    weight: float = Field(1.0, description="Factor of this reward in the sum.")
    name: str = Field("model", description="Name in metrics and reports.")
    normalise: bool = Field(True, description="Centre and scale as stored with the reward model.")


class FunctionSource(Section):
    type: Literal["function"] = Field("function", description="A Python function.")
    path: str = Field(
        description="`file.py:function`; called with lists prompts, completions and each metadata "
        "column by keyword, returns one number per completion. Runs started from Python name the "
        "file in which they keep the function."
    )
    weight: float = Field(1.0, description="Factor of this reward in the sum.")
    name: str = Field("function", description="Name in metrics and reports.")


class RulesSource(Section):
    type: Literal["rules"] = Field("rules", description="Rules on the text.")
    min_words: int | None = Field(None, description="Fewest words of a completion.")
    max_words: int | None = Field(None, description="Most words of a completion.")
    required: list[str] = Field(
        default_factory=list, description="Regular expressions that a completion must match."
    )
    forbidden: list[str] = Field(
        default_factory=list, description="Regular expressions that a completion must not match."
    )
    repetition: bool = Field(False, description="Penalise the share of repeated 3-grams.")
    weight: float = Field(1.0, description="Factor of this reward in the sum.")
    name: str = Field("rules", description="Name in metrics and reports.")


class GrpcSource(Section):
    type: Literal["grpc"] = Field("grpc", description="A reward service elsewhere.")
    address: Address = Field(description="host:port of a service speaking accord.reward.v1.")
    weight: float = Field(1.0, description="Factor of this reward in the sum.")
    name: str = Field("grpc", description="Name in metrics and reports.")


RewardSource = Annotated[
    RewardModelSource | FunctionSource | RulesSource | GrpcSource, Field(discriminator="type")
]


class RewardConfig(Section):
    sources: list[RewardSource] = Field(
        min_length=1, description="Rewards; their weighted sum is the score."
    )
    deadline_s: float = Field(
        30, gt=0, description="Seconds until one scoring call fails, retries included."
    )
    max_batch: int = Field(64, ge=1, description="Most completions scored in one pass.")
    max_wait_ms: float = Field(
        5, ge=0, description="Milliseconds that a batch waits for more completions."
    )
    clip: float | None = Field(None, gt=0, description="Clip the weighted sum to ±clip.")
    address: Address | None = Field(
        None,
        description="Use a running reward service instead of starting one (`accord serve-reward`).",
    )
