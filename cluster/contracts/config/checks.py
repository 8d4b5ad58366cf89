"""Problems between the sections of a training config, all of them at once."""

from __future__ import annotations

from cluster.contracts.config.algorithm import AlgorithmConfig, BatchConfig, StalenessConfig
from cluster.contracts.config.base import ModelConfig
from cluster.contracts.config.learner import LearnerConfig
from cluster.contracts.config.lora import LoraConfig
from cluster.contracts.config.monitors import MonitorsConfig
from cluster.contracts.config.parallel_modes import mode_problems
from cluster.contracts.config.reward import RewardConfig
from cluster.contracts.config.rollout import RolloutConfig
from cluster.contracts.registry import ADVANTAGE_ESTIMATORS, POLICY_LOSSES

MOST_KEPT = 4096
"""Ids that a token of training data may carry: 16 KiB a token."""


def train_problems(
    algorithm: AlgorithmConfig,
    batch: BatchConfig,
    staleness: StalenessConfig,
    learner: LearnerConfig,
    rollout: RolloutConfig,
    reward: RewardConfig,
    monitors: MonitorsConfig,
) -> list[str]:
    """Every cross-section problem, so that the user sees all of them at once."""
    found = []
    estimator = ADVANTAGE_ESTIMATORS[algorithm.advantage]
    if estimator.needs_groups and batch.samples_per_prompt < 2:
        found.append(
            f"algorithm.advantage = {algorithm.advantage!r} compares completions of one prompt: "
            "set batch.samples_per_prompt to 2 or more"
        )
    if algorithm.truncated == "bootstrap" and not estimator.needs_values:
        found.append(
            "algorithm.truncated = 'bootstrap' needs values: set algorithm.advantage = 'gae'"
        )
    if algorithm.whiten_rewards and "scale_by_std" in estimator.options and algorithm.scale_by_std:
        found.append(
            f"algorithm.whiten_rewards scales rewards that {algorithm.advantage!r} scales by the "
            "standard deviation of their group: set it to false"
        )
    if algorithm.kl.place == "reward" and algorithm.kl.estimator != "k1":
        found.append("algorithm.kl.estimator must be 'k1' in the reward (an unbiased penalty)")
    weighed = algorithm.kl.coef > 0 or monitors.moves_kl
    if algorithm.kl.place == "loss" and algorithm.kl.estimator == "k1" and weighed:
        found.append(
            "algorithm.kl.estimator = 'k1' has no useful gradient in the loss: use 'k3+' or 'k2'"
        )
    found += _loss_problems(algorithm)
    found += _staleness_problems(staleness)
    if rollout.quantization != "none" and staleness.correction == "none":
        found.append(
            f"rollout.quantization = {rollout.quantization!r} samples from another policy than the "
            "one that learns, even of the same version: set staleness.correction = 'token-tis' (or "
            "'decoupled')"
        )
    samples = batch.prompts_per_step * batch.samples_per_prompt
    if learner.minibatches > samples:
        found.append(f"learner.minibatches is over the {samples} samples of a step")
    units = batch.prompts_per_step if estimator.needs_groups else samples
    if units < learner.data_parallel:
        what = "prompts" if estimator.needs_groups else "samples"
        found.append(
            f"learner.processes = {learner.processes} makes {learner.data_parallel} shares of a "
            f"step of {units} {what}: raise batch.prompts_per_step, or lower learner.processes"
        )
    found += _process_problems(learner)
    found += _streaming_problems(learner)
    found += _sampling_problems(rollout)
    names = [source.name for source in reward.sources]
    if len(set(names)) != len(names):
        found.append(f"reward.sources have the same name twice ({names}): give each a `name`")
    if monitors.second_judge and monitors.second_judge not in names:
        found.append(
            f"monitors.second_judge = {monitors.second_judge!r} is none of reward.sources "
            f"({', '.join(map(str, names))}): give one of these names, or add the source with "
            "weight = 0"
        )
    return found


def lora_problems(
    lora: LoraConfig, learner: LearnerConfig, model: ModelConfig, rollout: RolloutConfig
) -> list[str]:
    """What on-line training with adapters cannot have."""
    found = []
    if lora.dropout > 0:
        found.append(
            "lora.dropout would make two passes over the same tokens differ, and every probability "
            "ratio with them: set it to 0 (SFT, reward model and DPO may use it)"
        )
    if learner.compile:
        found.append("learner.compile cannot be had together with [lora]: leave one out")
    if lora.base != "full" and learner.sharding != "none":
        found.append(
            "lora.base in 8 or 4 bits cannot be dealt out to processes: set learner.sharding = "
            "'none', or lora.base = 'full'"
        )
    if learner.tensor_parallel > 1:
        found.append(
            "learner.tensor_parallel cuts layers by the names that adapters change: set it to 1 "
            "with [lora], and learner.sharding = 'fsdp2' where the base does not fit"
        )
    set_to_float32 = rollout.dtype == "float32" and "dtype" in rollout.model_fields_set
    if model.dtype == "bfloat16" and set_to_float32:
        found.append(
            "with [lora] and model.dtype = 'bfloat16' the learner holds the base in bfloat16, so "
            "that engines in float32 could not be compared with it: set rollout.dtype = 'bfloat16'"
        )
    return found


def _streaming_problems(learner: LearnerConfig) -> list[str]:
    # Which process computes a row is decided when all rows are known.
    if learner.stream_parts == 1 or learner.processes == 1:
        return []
    return [
        f"learner.stream_parts = {learner.stream_parts} needs learner.processes = 1: the rows of a "
        "step are dealt out to processes when all are there. Set learner.stream_parts = 1"
    ]


def _sampling_problems(rollout: RolloutConfig) -> list[str]:
    """What the learner could not match: it has to know of each token what it was sampled from."""
    found = []
    if (rollout.top_p < 1 or rollout.min_p > 0) and rollout.top_k == 0:
        name = "top_p" if rollout.top_p < 1 else "min_p"
        found.append(
            f"rollout.{name} needs rollout.top_k in training: each token carries the ids it was "
            "sampled from, and without a bound these can be the whole vocabulary. Set "
            "rollout.top_k = 1024, which leaves out next to nothing"
        )
    if rollout.top_k > MOST_KEPT:
        found.append(
            f"rollout.top_k = {rollout.top_k} is over {MOST_KEPT}, the most ids that a token "
            "carries to the learner: lower it, or set 0 for no limit"
        )
    if rollout.quantization != "none" and rollout.engine == "transformers":
        found.append(
            f"rollout.quantization = {rollout.quantization!r} needs vLLM: set rollout.engine = "
            "'vllm', or leave rollout.quantization out"
        )
    if rollout.tensor_parallel > 1 and rollout.limits_tokens:
        found.append(
            "rollout.top_k, top_p, min_p, min_tokens, allowed_tokens and banned_tokens cannot be "
            "recorded with rollout.tensor_parallel over 1, so the learner could not match them: "
            "leave them out in training"
        )
    return found


def _loss_problems(algorithm: AlgorithmConfig) -> list[str]:
    found = []
    loss, estimator = POLICY_LOSSES[algorithm.loss], ADVANTAGE_ESTIMATORS[algorithm.advantage]
    for key in ("clip_low", "clip_high", "dual_clip"):
        if getattr(algorithm, key) is not None and key not in loss.options:
            takers = [repr(word) for word in POLICY_LOSSES if key in POLICY_LOSSES[word].options]
            found.append(
                f"algorithm.{key} does nothing with algorithm.loss = {algorithm.loss!r} (it "
                f"belongs to {', '.join(takers)}): remove it"
            )
    for section, known, given in (
        ("loss_options", loss.options, algorithm.loss_options),
        ("advantage_options", estimator.options, algorithm.advantage_options),
    ):
        own = [name for name in known if name not in type(algorithm).model_fields]
        for name in given:
            if name not in own:
                valid = ", ".join(own) or "none"
                found.append(f"unknown option algorithm.{section}.{name}; valid here: {valid}")
    if loss.per_completion and algorithm.aggregate != "seq-mean-token-mean":
        found.append(
            f"algorithm.loss = {algorithm.loss!r} has one ratio for a whole completion, so that "
            f"algorithm.aggregate = {algorithm.aggregate!r} would weight completions by their "
            "length: set algorithm.aggregate = 'seq-mean-token-mean'"
        )
    if loss.per_completion and estimator.per_token:
        found.append(
            f"algorithm.loss = {algorithm.loss!r} has one ratio for a whole completion, but "
            f"algorithm.advantage = {algorithm.advantage!r} gives each token its own advantage: "
            "set algorithm.advantage = 'grpo' (or 'rloo')"
        )
    return found


def _staleness_problems(staleness: StalenessConfig) -> list[str]:
    if staleness.floor > 0 and staleness.correction == "none":
        return ["staleness.floor does nothing with staleness.correction = 'none': remove it"]
    return []


def _process_problems(learner: LearnerConfig) -> list[str]:
    found = []
    on = {
        "compile": learner.compile,
        "sharding": learner.sharding != "none",
        "tensor_parallel": learner.tensor_parallel > 1,
        "sequence_parallel": learner.sequence_parallel > 1,
    }
    found += mode_problems("learner", [mode for mode, chosen in on.items() if chosen])
    if learner.processes > 1 and 0 < learner.gpus < 1:
        found.append(
            f"learner.gpus = {learner.gpus} puts several of the {learner.processes} "
            "learner.processes on one GPU, which NCCL refuses: set learner.gpus to 1 (a GPU for "
            "each process) or learner.processes to 1"
        )
    return found
