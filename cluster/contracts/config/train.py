"""`accord train`: all its sections together."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from cluster.contracts.config.algorithm import AlgorithmConfig, BatchConfig, StalenessConfig
from cluster.contracts.config.base import (
    ClusterConfig,
    LoggingConfig,
    ModelConfig,
    PluginFiles,
    RunConfig,
    Section,
)
from cluster.contracts.config.checks import lora_problems, train_problems
from cluster.contracts.config.evaluation import EvaluationConfig
from cluster.contracts.config.learner import CheckpointConfig, LearnerConfig, WeightsConfig
from cluster.contracts.config.lora import LoraConfig
from cluster.contracts.config.monitors import MonitorsConfig
from cluster.contracts.config.policies import (
    Policies,
    policy_problems,
    with_prompts_of_policies,
)
from cluster.contracts.config.reward import RewardConfig
from cluster.contracts.config.rollout import DataConfig, RolloutConfig


class TrainConfig(Section):
    """`accord train`: on-line reinforcement learning."""

    plugins: PluginFiles = Field(
        [],
        description="Python files that add policy losses, advantage estimators, kinds of reward or "
        "weight transports; see docs/extend.md.",
    )
    run: RunConfig = RunConfig()
    model: ModelConfig
    data: DataConfig
    reward: RewardConfig
    policies: Policies = Field(
        [],
        description="Several policies in one run: a LoRA adapter each, on the same base, with "
        "prompts of its own and the rewards that name it. Empty: one policy.",
    )
    batch: BatchConfig = BatchConfig()
    rollout: RolloutConfig = RolloutConfig()
    staleness: StalenessConfig = StalenessConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    learner: LearnerConfig = LearnerConfig()
    lora: LoraConfig | None = Field(
        None,
        description="Train adapters (LoRA) instead of all weights. none: all weights. A tenth of "
        "the memory, a higher `learner.lr` (about ten times), and pushes of the adapter alone.",
    )
    weights: WeightsConfig = WeightsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    monitors: MonitorsConfig = MonitorsConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="before")
    @classmethod
    def _alarms_are_monitors(cls, tree: Any) -> Any:
        """The section's name in runs of before, which can be resumed, also with new settings."""
        if not isinstance(tree, dict) or not isinstance(tree.get("alarms"), dict):
            return tree
        if not isinstance(tree.get("monitors", {}), dict):
            return tree  # the message about what it is instead comes later
        rest = {key: value for key, value in tree.items() if key != "alarms"}
        return {**rest, "monitors": {**tree["alarms"], **tree.get("monitors", {})}}

    @model_validator(mode="before")
    @classmethod
    def _prompts_of_policies(cls, tree: Any) -> Any:
        return with_prompts_of_policies(tree)

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        problems = train_problems(
            self.algorithm,
            self.batch,
            self.staleness,
            self.learner,
            self.rollout,
            self.reward,
            self.monitors,
        )
        problems += policy_problems(
            self.policies, self.lora, self.batch, self.rollout, self.learner, self.reward
        )
        if self.lora is not None:
            problems += lora_problems(self.lora, self.learner, self.model, self.rollout)
        if problems:
            raise ValueError("\n".join(problems))
        return self
