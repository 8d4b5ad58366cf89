"""`accord evaluate`."""

from __future__ import annotations

from pydantic import Field, model_validator

from cluster.contracts.config.base import (
    ClusterConfig,
    ModelConfig,
    PluginFiles,
    RunConfig,
    Section,
)
from cluster.contracts.config.judge import HELPFUL, JudgeConfig
from cluster.contracts.config.reward import RewardConfig
from cluster.contracts.config.rollout import DataConfig, RolloutConfig
from cluster.contracts.config.safety import SafetyConfig


class EvaluateConfig(Section):
    """`accord evaluate`: completions of two policies for the same prompts, compared."""

    plugins: PluginFiles = Field(
        [], description="Python files that add kinds of reward; see docs/extend.md."
    )
    run: RunConfig = RunConfig()
    policy: ModelConfig
    baseline: ModelConfig
    data: DataConfig
    judge: RewardConfig | None = Field(
        None, description="Scores both; training should never have seen it."
    )
    ai_judge: JudgeConfig | None = Field(
        None,
        description="An AI judge in place of `judge`: it compares the two completions of each "
        "prompt in both orders, without being told which policy wrote which.",
    )
    criteria: str = Field(
        HELPFUL, min_length=1, description="What the AI judge is told to prefer, in plain words."
    )
    safety: SafetyConfig | None = Field(
        None,
        description="Report how often the completions of both are harmful or refuse, by these "
        "rules and this classifier; for prompts that try to provoke harm.",
    )
    samples: int = Field(1, ge=1, description="Completions per prompt.")
    max_prompts: int | None = Field(
        None, ge=1, description="Use only the first so many prompts. none: all."
    )
    tie_margin: float = Field(
        0.0, ge=0, description="Scores that differ by less than this are a tie."
    )
    rollout: RolloutConfig = RolloutConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _check(self) -> EvaluateConfig:
        if (self.judge is None) == (self.ai_judge is None):
            raise ValueError("give one of judge (rewards) and ai_judge (a model that compares)")
        return self
