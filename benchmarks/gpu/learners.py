"""A learner in this process, without Ray and without workers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cluster.contracts.config.algorithm import AlgorithmConfig, BatchConfig, StalenessConfig
from cluster.contracts.config.base import DType, ModelConfig
from cluster.contracts.config.learner import LearnerConfig, WeightsConfig
from cluster.weights.update import Update
from learner.rl.learner import PPOLearner
from learner.settings import LearnerSettings

LR = 1e-3


class KeepingPublisher:
    """Keeps the newest version's arrays."""

    on_device = False

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}

    def open(self, version: int) -> Update:
        self._coming: dict[str, np.ndarray] = {}
        return Update(version, "test", self)

    def put(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._coming |= {name: array.copy() for name, array in arrays.items()}

    def finish(self) -> None:
        self.arrays = self._coming

    def discard(self) -> None:
        """`arrays` are still those of the version before."""

    def retain(self, versions: Collection[int]) -> None:
        """Nothing is held."""

    def close(self) -> None:
        """Nothing is held."""


def make_learner(
    path: Path,
    dtype: str,
    publisher: Any,
    *,
    groups: int,
    samples: int,
    steps: int = 50,
    rollout_dtype: DType = "float32",
    **learner: Any,
) -> PPOLearner:
    """PPO with a value head on the trunk and a reference; ``learner``: keys of LearnerConfig."""
    settings = LearnerSettings(
        model=ModelConfig.model_validate({"path": str(path), "dtype": dtype}),
        learner=LearnerConfig.model_validate({"lr": LR, **learner}),
        algorithm=AlgorithmConfig(),
        staleness=StalenessConfig(),
        batch=BatchConfig(prompts_per_step=groups, samples_per_prompt=samples, steps=steps),
        weights=WeightsConfig(),
        rollout_dtype=rollout_dtype,
        temperature=1.0,
        max_tokens=4096,
        seed=0,
        canary_prompt=(4, 5, 6),
    )
    return PPOLearner(settings, publisher=publisher)
