"""`accord train`: one model a section, every key described where it is declared."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cluster.contracts.config.base import (
    ClusterConfig,
    LoggingConfig,
    ModelConfig,
    RunConfig,
    Section,
)
from cluster.contracts.config.checks import train_problems
from cluster.contracts.config.reward import RewardConfig
from cluster.contracts.config.rollout import DataConfig, RolloutConfig


class BatchConfig(Section):
    prompts_per_step: int = Field(32, ge=1)
    samples_per_prompt: int = Field(4, ge=1)
    steps: int = Field(100, ge=1, description="Learner steps of the run.")


class StalenessConfig(Section):
    bound: int = Field(
        2, ge=0, description="Most learner steps between sampling and training; 0: synchronous."
    )
    correction: Literal[
        "none", "decoupled", "token-tis", "sequence-tis", "token-mask", "sequence-mask"
    ] = Field("decoupled", description="Importance correction of tokens from older weights.")
    cap: float = Field(5.0, gt=1, description="Upper limit of the importance weight.")


class KLConfig(Section):
    coef: float = Field(0.05, ge=0, description="Weight of the per-token KL to the reference.")
    place: Literal["reward", "loss"] = "reward"
    estimator: Literal["k1", "k2", "k3", "k3+"] = Field(
        "k1", description="k1 belongs in the reward; in the loss use k2 or k3+ (its gradient)."
    )
    controller: Literal["fixed", "adaptive"] = "fixed"
    target: float = Field(6.0, gt=0, description="Adaptive: wanted KL, nats per answer.")
    horizon: int = Field(10000, ge=1, description="Adaptive: samples over which to correct.")


class AlgorithmConfig(Section):
    advantage: Literal["gae", "grpo", "rloo", "reinforce++", "reinforce-baseline"] = "gae"
    loss: Literal["ppo", "reinforce", "cispo", "gspo"] = "ppo"
    gamma: float = Field(1.0, gt=0, le=1)
    lam: float = Field(0.95, ge=0, le=1)
    clip_low: float | None = Field(
        None,
        gt=0,
        description="Ratio clipped below 1 - this; "
        "None: the loss's own (ppo 0.2, gspo 3e-4, cispo 1.0).",
    )
    clip_high: float | None = Field(
        None,
        gt=0,
        description="Ratio clipped above 1 + this; "
        "None: the loss's own (ppo 0.2, gspo 4e-4, cispo 0.28).",
    )
    dual_clip: float | None = Field(
        None, gt=1, description="ppo only: bound of the loss where the advantage is negative."
    )
    clip_value: float = Field(0.2, gt=0)
    value_coef: float = Field(0.1, ge=0)
    entropy_coef: float = Field(0.0, ge=0)
    whiten_advantages: bool = True
    whiten_rewards: bool = False
    scale_by_std: bool = Field(True, description="GRPO: divide by the group's standard deviation.")
    aggregate: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"] = "token-mean"
    missing_eos_penalty: float = Field(
        0.0, ge=0, description="Taken off the score of an answer that did not end by itself."
    )
    truncated: Literal["keep", "mask", "bootstrap"] = Field(
        "keep",
        description="Answers cut at max_tokens: trained as they are, left out of the loss, or "
        "continued with the value estimate (gae only).",
    )
    kl: KLConfig = KLConfig()


class LearnerConfig(Section):
    lr: float = Field(1e-5, gt=0)
    value_lr: float | None = Field(None, gt=0, description="None: as lr.")
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-5
    max_grad_norm: float = Field(1.0, gt=0)
    epochs: int = Field(1, ge=1, description="Passes over the samples of a step.")
    minibatches: int = Field(1, ge=1, description="Optimiser steps a pass.")
    tokens_per_microbatch: int = Field(2048, ge=16, description="Padded tokens of a forward pass.")
    packing: Literal["auto", "padded", "packed"] = Field(
        "auto",
        description="Rows of a microbatch: padded to the longest, or packed end to end. auto: "
        "packed on a GPU in bfloat16 (flash attention), else padded (faster on a CPU).",
    )
    activation_memory_mb: int | None = Field(
        None,
        ge=0,
        description="With one update a step: memory for the forward pass that measures the step "
        "to wait for its loss, instead of being run twice. A step that needs more runs it twice, "
        "with the same result. None: an eighth of the machine's, a quarter of what is free on a "
        "GPU; 0: always twice.",
    )
    value_model: Literal["auto", "own", "shared"] = Field(
        "auto",
        description="auto: own network from the reward model when `value_path` is set, else "
        "a head on the policy's trunk.",
    )
    value_path: str | None = Field(None, description="Reward model the value network starts from.")
    value_warmup_steps: int = Field(0, ge=0, description="First steps train the value only.")
    reference_path: str | None = Field(
        None, description="Reference model; None: the starting policy."
    )
    gradient_checkpointing: bool = False
    compile: bool = Field(
        False,
        description="torch.compile of the models. On one CPU core a step got up to 11 % faster, "
        "after one to two minutes of compiling at the start.",
    )
    deterministic: bool = Field(False, description="Deterministic kernels (slower).")
    processes: int = Field(
        1, ge=1, description="Processes of the learner, which share the microbatches of a step."
    )
    sharding: Literal["none", "fsdp2"] = Field(
        "none",
        description="With several processes. none: each holds all weights. fsdp2: weights, "
        "gradients and optimiser state are dealt out to them (`fully_shard`).",
    )
    cpus: float = Field(1, gt=0, description="Of each process.")
    gpus: float = Field(0, ge=0, description="GPUs of each process of the learner.")
    start_timeout_s: float = Field(180, gt=0)
    step_timeout_s: float = Field(1800, gt=0)


class WeightsConfig(Section):
    transport: Literal["object_store", "disk", "collective", "shared_device"] = Field(
        "object_store",
        description="How weights travel: Ray's object store; a shared directory; NCCL between GPUs "
        "(gloo on CPU); memory of the one GPU that learner and engine share (CUDA IPC).",
    )
    canary_tolerance: float | None = Field(
        None,
        gt=0,
        description="Largest |Δlogp| of the canary; None: 1e-3 in float32, 0.5 in bfloat16.",
    )
    timeout_s: float = Field(
        120, gt=0, description="A worker not on the new weights by then is replaced."
    )


class CheckpointConfig(Section):
    every: int = Field(50, ge=1, description="Learner steps between checkpoints.")
    keep: int = Field(2, ge=1, description="Newest checkpoints kept.")


class TrainConfig(Section):
    """`accord train`: on-line reinforcement learning."""

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
    logging: LoggingConfig = LoggingConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        problems = list(train_problems(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self
