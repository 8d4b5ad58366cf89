"""What the learner has to know, and nothing else of a run's configuration.

No torch here: the shell that sets a process's environment reads this before torch is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from cluster.contracts.config.algorithm import AlgorithmConfig, BatchConfig, StalenessConfig
from cluster.contracts.config.base import DType, ModelConfig, Section
from cluster.contracts.config.learner import LearnerConfig, WeightsConfig
from cluster.contracts.config.lora import LoraConfig
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.plugins import PluginFile, loaded
from cluster.machine.shipment import Shipment, known_as

S = TypeVar("S", bound=Section)

CANARY_PROMPT_TOKENS = 16
CANARY_TOKENS = 32
NODE_HOST = "node"
"""The canary: at most so many tokens of a prompt, continued by the starting policy to so many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerSettings:
    """Everything a learner is built from.

    rollout_dtype: the type the engines compute in; weights are published in it.
    canary_prompt: token ids of the run's first prompt; the learner continues it greedily.
    lora: the adapters that are trained, None for all weights. policies: their names, where there
    are several; the canary's prompt is then that of the first.
    run_dir: where `rollouts/` is written; None with `save_rollouts` off.
    resume_from: directory of a checkpoint written by `save`, or None.
    replay: rollouts files of the steps since, or parcels of them, to be trained again.
    reference_for_monitors: only because a monitor may raise the KL coefficient from 0.
    plugins: to be installed in the learner's process before anything else.
    host: address at which workers reach this process; NODE_HOST: that of its Ray node.
    files: what the learner is sent of the models and files that the paths name.
    """

    model: ModelConfig
    learner: LearnerConfig
    algorithm: AlgorithmConfig
    staleness: StalenessConfig
    batch: BatchConfig
    weights: WeightsConfig
    rollout_dtype: DType
    temperature: float
    max_tokens: int
    seed: int
    canary_prompt: tuple[int, ...]
    lora: LoraConfig | None = None
    policies: tuple[str, ...] = ()
    run_dir: str | None = None
    save_rollouts: bool = False
    resume_from: str | None = None
    replay: tuple[Any, ...] = ()
    reference_for_monitors: bool = False
    host: str = "127.0.0.1"
    plugins: tuple[PluginFile, ...] = ()
    files: Shipment = field(default_factory=Shipment)


def learner_settings(
    config: TrainConfig,
    canary_prompt: tuple[int, ...],
    run_dir: str | None,
    resume_from: str | None = None,
    files: Shipment | None = None,
    replay: tuple[Any, ...] = (),
) -> LearnerSettings:
    """The learner's part of a `TrainConfig`."""
    return LearnerSettings(
        model=_with_paths(config.model, known_as, "path", "chat_template"),
        learner=_with_paths(config.learner, known_as, "value_path", "reference_path"),
        algorithm=config.algorithm,
        staleness=config.staleness,
        batch=config.batch,
        weights=config.weights,
        rollout_dtype=config.rollout.dtype,
        temperature=config.rollout.temperature,
        max_tokens=config.rollout.max_tokens,
        seed=config.run.seed,
        canary_prompt=canary_prompt,
        lora=config.lora,
        policies=tuple(policy.name for policy in config.policies),
        run_dir=run_dir,
        save_rollouts=config.logging.save_rollouts and run_dir is not None,
        resume_from=resume_from,
        replay=replay,
        reference_for_monitors=config.monitors.moves_kl and config.algorithm.kl.coef == 0,
        plugins=loaded(),
        files=files or Shipment(),
        # A cluster that was joined may have its workers on other machines.
        host=NODE_HOST if config.cluster.to_join is not None else "127.0.0.1",
    )


def with_files_here(settings: LearnerSettings) -> LearnerSettings:
    """For the learner's process: with the paths at which its host has what it was sent."""
    here = settings.files.here
    return replace(
        settings,
        model=_with_paths(settings.model, here, "path", "chat_template"),
        learner=_with_paths(settings.learner, here, "value_path", "reference_path"),
    )


def _with_paths(section: S, change: Callable[[str], str], *keys: str) -> S:
    paths = {key: change(path) for key in keys if (path := getattr(section, key)) is not None}
    return section.model_copy(update=paths)
