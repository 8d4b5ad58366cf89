"""`accord best-of-n`."""

from __future__ import annotations

from pydantic import Field, model_validator

from cluster.contracts.config.base import (
    ClusterConfig,
    ModelConfig,
    PluginFiles,
    RunConfig,
    Section,
)
from cluster.contracts.config.reward import RewardConfig
from cluster.contracts.config.rollout import DataConfig, RolloutConfig


class BestOfNConfig(Section):
    """`accord best-of-n`: the completions that a reward prefers, as demonstrations for SFT."""

    plugins: PluginFiles = Field(
        [], description="Python files that add kinds of reward; see docs/extend.md."
    )
    run: RunConfig = RunConfig()
    model: ModelConfig
    data: DataConfig
    reward: RewardConfig
    samples: int = Field(8, ge=1, description="Completions sampled per prompt.")
    keep: int = Field(
        1,
        ge=0,
        description="Completions kept per prompt, the highest scores first. 0: all that reach "
        "`threshold`.",
    )
    threshold: float | None = Field(
        None, description="Keep only completions with at least this score. none: off."
    )
    max_prompts: int | None = Field(
        None, ge=1, description="Use only the first so many prompts. none: all."
    )
    rollout: RolloutConfig = RolloutConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _check(self) -> BestOfNConfig:
        if self.keep == 0 and self.threshold is None:
            raise ValueError("with keep = 0 every completion is kept: set threshold")
        if self.keep >= self.samples and self.threshold is None:
            raise ValueError(
                f"keep = {self.keep} of samples = {self.samples} leaves nothing out: raise samples"
            )
        if self.reward.address is not None:
            raise ValueError(
                "reward.address is for training runs: name the service as a reward source with "
                "type = 'grpc'"
            )
        return self
