"""`accord evaluate`."""

from __future__ import annotations

from pydantic import Field

from cluster.contracts.config.base import (
    ClusterConfig,
    ModelConfig,
    PluginFiles,
    RunConfig,
    Section,
)
from cluster.contracts.config.reward import RewardConfig
from cluster.contracts.config.rollout import DataConfig, RolloutConfig


class EvaluateConfig(Section):
    """`accord evaluate`: completions of two policies for the same prompts, compared."""

    plugins: PluginFiles = Field(
        [], description="Python files that add kinds of reward; see docs/extend.md."
    )
    run: RunConfig = RunConfig()
    policy: ModelConfig
    baseline: ModelConfig
    data: DataConfig
    judge: RewardConfig = Field(description="Scores both; training should never have seen it.")
    samples: int = Field(1, ge=1, description="Completions per prompt.")
    max_prompts: int | None = Field(
        None, ge=1, description="Use only the first so many prompts. none: all."
    )
    tie_margin: float = Field(
        0.0, ge=0, description="Scores that differ by less than this are a tie."
    )
    rollout: RolloutConfig = RolloutConfig()
    cluster: ClusterConfig = ClusterConfig()
