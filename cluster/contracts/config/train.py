"""`accord train`: all its sections together."""

from __future__ import annotations

from pydantic import Field, model_validator

from cluster.contracts.config.alarms import AlarmsConfig
from cluster.contracts.config.algorithm import AlgorithmConfig, BatchConfig, StalenessConfig
from cluster.contracts.config.base import (
    ClusterConfig,
    LoggingConfig,
    ModelConfig,
    PluginFiles,
    RunConfig,
    Section,
)
from cluster.contracts.config.checks import train_problems
from cluster.contracts.config.evaluation import EvaluationConfig
from cluster.contracts.config.learner import CheckpointConfig, LearnerConfig, WeightsConfig
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
    batch: BatchConfig = BatchConfig()
    rollout: RolloutConfig = RolloutConfig()
    staleness: StalenessConfig = StalenessConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    learner: LearnerConfig = LearnerConfig()
    weights: WeightsConfig = WeightsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    alarms: AlarmsConfig = AlarmsConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        problems = train_problems(
            self.algorithm, self.batch, self.staleness, self.learner, self.rollout, self.reward
        )
        if problems:
            raise ValueError("\n".join(problems))
        return self
