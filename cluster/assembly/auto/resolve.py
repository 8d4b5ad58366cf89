"""Values for the keys that a config leaves at ``auto``, each with the reason for it.

Pure, but for what a machine measures when it is asked (``Machine.products``): the machine, the
model and the config go in. A key that the user set is never changed, and
later choices follow from it. The resolved config is what every role gets and what the run stores in
``config.toml``, where every key is set: a resumed or replayed run chooses nothing anew.

What is learnt must not depend on the machine, so only the types that are computed in may change
it, and the longest completion, which follows from the model alone.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TypeVar

from cluster.assembly.auto.choices import Choices, Load, Resolved
from cluster.assembly.auto.devices import (
    choose_cluster,
    choose_gpus,
    choose_gpus_alone,
    choose_learner_cores,
)
from cluster.assembly.auto.engines import choose_engines
from cluster.assembly.auto.fits import choose_processes
from cluster.assembly.auto.microbatches import choose_microbatch
from cluster.assembly.auto.number_types import (
    choose_learner_type,
    choose_reward_type,
    choose_training_type,
)
from cluster.assembly.auto.streaming import choose_stream_parts
from cluster.assembly.model_facts import ModelFacts, read_model_facts
from cluster.contracts.config.base import ModelConfig, Section
from cluster.contracts.config.evaluate import EvaluateConfig
from cluster.contracts.config.offline import DpoConfig, RewardModelConfig, SftConfig
from cluster.contracts.config.reward import RewardConfig, RewardModelSource
from cluster.contracts.config.rollout import RolloutConfig
from cluster.contracts.config.train import TrainConfig
from cluster.contracts.errors import UserError
from cluster.machine.hardware import Machine, this_machine

F = TypeVar("F", SftConfig, RewardModelConfig, DpoConfig)


class _Engines(Section):
    rollout: RolloutConfig


class _Rewards(Section):
    reward: RewardConfig


def resolve_here(config: TrainConfig) -> Resolved[TrainConfig]:
    """``resolve_training`` for this machine and the config's model. Takes a tenth of a second
    where the type that is computed in has to be measured, else milliseconds."""
    return resolve_training(
        config,
        this_machine(),
        read_model_facts(config.model),
        _reward_facts(config.reward),
        keeps_scores=_keep_scores(config.reward),
    )


def _reward_facts(reward: RewardConfig) -> ModelFacts | None:
    """Of the first reward model."""
    for source in reward.sources:
        if isinstance(source, RewardModelSource):
            return read_model_facts(ModelConfig(path=source.path))
    return None


def _keep_scores(reward: RewardConfig) -> bool:
    """Whether all reward models are known to score in bfloat16 as in float32, nearly."""
    from learner.models.reward_artifact import read_artifact

    folders = [Path(s.path) for s in reward.sources if isinstance(s, RewardModelSource)]
    try:
        first = [(folder, read_artifact(folder)) for folder in folders]
        others = [read_artifact(folder / name) for folder, own in first for name in own.others]
    except UserError:
        return False  # who loads them says what is wrong
    return all(own.keeps_scores_in_bfloat16 for own in (*(own for _, own in first), *others))


def resolve_training(
    config: TrainConfig,
    machine: Machine,
    model: ModelFacts | None,
    reward_model: ModelFacts | None = None,
    *,
    keeps_scores: bool = False,
) -> Resolved[TrainConfig]:
    """model, reward_model: None where there is none, or its config cannot be read; then what
    depends on it keeps a fallback. keeps_scores: see `choose_reward_type`."""
    choices = Choices(config, machine)
    choose_gpus(choices)
    batch, bound = config.batch, config.staleness.bound
    load = Load(
        engines=config.rollout.workers,
        prompt_tokens=config.data.max_prompt_tokens,
        prompt_tokens_set="max_prompt_tokens" in config.data.model_fields_set,
        outstanding=(bound + 1) * batch.prompts_per_step * batch.samples_per_prompt,
    )
    choose_engines(choices, model, load)
    choose_learner_type(choices, model)
    choose_reward_type(choices, reward_model, keeps_scores=keeps_scores)
    choose_learner_cores(choices, model)
    choose_cluster(choices, model)
    choose_microbatch(choices, model)
    choose_stream_parts(choices)
    steps = config.batch.steps
    choices.settle(
        "checkpoint.every",
        min(50, max(10, math.ceil(steps / 5))),
        f"a fifth of the {steps} steps, from 10 to 50",
    )
    return Resolved(choices.config, choices.reasons)


def resolve_evaluation(
    config: EvaluateConfig, machine: Machine, policy: ModelFacts | None
) -> Resolved[EvaluateConfig]:
    """Two policies at a time are sampled side by side, each by its own workers."""
    choices = Choices(config, machine)
    for side in ("policy", "baseline"):
        if getattr(config, side) is not None:
            choices.settle(f"{side}.dtype", "float32", "not used: the engine's is rollout.dtype")
    choose_gpus_alone(choices, 2 * config.rollout.workers)
    load = Load(
        engines=2 * config.rollout.workers,
        prompt_tokens=config.data.max_prompt_tokens,
        prompt_tokens_set="max_prompt_tokens" in config.data.model_fields_set,
        outstanding=None,
        alone=True,
    )
    choose_engines(choices, policy, load)
    choose_cluster(choices, policy)
    return Resolved(choices.config, choices.reasons)


def resolve_fit(
    config: F,
    machine: Machine,
    model: ModelFacts | None,
    *,
    rows_bytes: int | None = None,
    launched: int | None = None,
) -> Resolved[F]:
    """Supervised fine-tuning, a reward model or DPO: they compute on a GPU where there is one.
    rows_bytes, launched: see ``choose_processes``."""
    choices = Choices(config, machine)
    choose_training_type(choices, model)
    choose_processes(choices, model, rows_bytes, launched)
    return Resolved(choices.config, choices.reasons)


def resolve_service(reward: RewardConfig, machine: Machine) -> RewardConfig:
    """`accord serve-reward`: on a GPU where it sees one."""
    on_gpu = machine.gpus > 0
    given = reward.model_copy(update={"gpus": 1.0}) if on_gpu else reward
    choices = Choices(_Rewards(reward=given), machine)
    choose_reward_type(choices, _reward_facts(reward), keeps_scores=_keep_scores(reward))
    return reward.model_copy(update={"dtype": choices.config.reward.dtype})


def resolve_sampling(
    rollout: RolloutConfig,
    machine: Machine,
    model: ModelFacts | None,
    *,
    engines: int,
    prompt_tokens: int,
    outstanding: int,
) -> RolloutConfig:
    """Engines that sample outside a training run. engines: of all jobs that run side by side."""
    choices = Choices(_Engines(rollout=rollout), machine)
    choose_gpus_alone(choices, engines)
    load = Load(engines=engines, prompt_tokens=prompt_tokens, outstanding=outstanding, alone=True)
    choose_engines(choices, model, load)
    return choices.config.rollout
