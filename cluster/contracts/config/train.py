"""`accord train`: one model a section, every key described where it is declared."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from cluster.contracts.config.alarms import AlarmsConfig
from cluster.contracts.config.base import (
    ClusterConfig,
    LoggingConfig,
    ModelConfig,
    Option,
    PluginFiles,
    RunConfig,
    Section,
    auto,
)
from cluster.contracts.config.checks import train_problems
from cluster.contracts.config.reward import RewardConfig
from cluster.contracts.config.rollout import DataConfig, RolloutConfig
from cluster.contracts.registry import ADVANTAGE_ESTIMATORS, POLICY_LOSSES, WEIGHT_TRANSPORTS


class BatchConfig(Section):
    prompts_per_step: int = Field(32, ge=1, description="Prompts that one learner step trains on.")
    samples_per_prompt: int = Field(
        4, ge=1, description="Completions sampled per prompt (the size of a group)."
    )
    steps: int = Field(100, ge=1, description="Learner steps of the run.")


class StalenessConfig(Section):
    bound: int = Field(
        2, ge=0, description="Most learner steps between sampling and training; 0: synchronous."
    )
    correction: Literal[
        "none", "decoupled", "token-tis", "sequence-tis", "token-mask", "sequence-mask"
    ] = Field(
        "decoupled",
        description="Importance weights of tokens sampled by older weights (docs/algorithms.md).",
    )
    cap: float = Field(5.0, gt=1, description="Upper limit of the importance weight.")
    floor: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Lower limit of the importance weight; with a -mask correction, what lies "
        "below it is left out as well (IcePop's two-sided mask).",
    )
    veto: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="A completion with any token whose ratio of probabilities, learner to engine, "
        "is below this is left out whole; 0: off, 1e-4 is usual.",
    )


class KLConfig(Section):
    coef: float = Field(0.05, ge=0, description="Weight of the per-token KL to the reference.")
    place: Literal["reward", "loss"] = Field(
        "reward",
        description="Where the KL term acts: taken off each token's reward, or added to the loss.",
    )
    estimator: Literal["k1", "k2", "k3", "k3+"] = Field(
        "k1", description="k1 belongs in the reward; in the loss use k2 or k3+ (its gradient)."
    )
    controller: Literal["fixed", "adaptive"] = Field(
        "fixed", description="fixed: coef stays; adaptive: coef follows `target`."
    )
    target: float = Field(6.0, gt=0, description="Adaptive: wanted KL, in nats per completion.")
    horizon: int = Field(
        10000, ge=1, description="Adaptive: completions over which a deviation is corrected."
    )


class AlgorithmConfig(Section):
    advantage: Annotated[str, AfterValidator(ADVANTAGE_ESTIMATORS.check)] = Field(
        "gae",
        description="How rewards become advantages. gae needs a value network (PPO); the others "
        "compare the completions of a group, or of the step.",
    )
    loss: Annotated[str, AfterValidator(POLICY_LOSSES.check)] = Field(
        "ppo", description="Policy loss; docs/algorithms.md has the formulas."
    )
    advantage_options: dict[str, Option] = Field(
        default_factory=dict, description="Options of a plugin's advantage estimator, by name."
    )
    loss_options: dict[str, Option] = Field(
        default_factory=dict, description="Options of a plugin's policy loss, by name."
    )
    gamma: float = Field(1.0, gt=0, le=1, description="Discount per token.")
    lam: float = Field(
        0.95, ge=0, le=1, description="GAE's λ: 0 trusts the value network, 1 the rewards."
    )
    clip_low: float | None = Field(
        None,
        gt=0,
        description="Ratio clipped below 1 - this; "
        "none: the loss's own (ppo 0.2, gspo 3e-4, cispo 1.0).",
    )
    clip_high: float | None = Field(
        None,
        gt=0,
        description="Ratio clipped above 1 + this; "
        "none: the loss's own (ppo 0.2, gspo 4e-4, cispo 0.28).",
    )
    dual_clip: float | None = Field(
        None, gt=1, description="ppo only: bound of the loss where the advantage is negative."
    )
    clip_value: float = Field(
        0.2, gt=0, description="Furthest that a value may move from its old estimate in the loss."
    )
    value_coef: float = Field(0.1, ge=0, description="Weight of the value loss.")
    entropy_coef: float = Field(
        0.0, ge=0, description="Weight of an entropy bonus, per token; 0: none."
    )
    whiten_advantages: bool = Field(
        True,
        description="gae and reinforce++: scale the advantages of a step to mean 0 and standard "
        "deviation 1.",
    )
    whiten_rewards: bool = Field(
        False, description="Scale the step's rewards to standard deviation 1, mean kept."
    )
    scale_by_std: bool = Field(True, description="GRPO: divide by the group's standard deviation.")
    aggregate: Literal[
        "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"
    ] = Field(
        "token-mean",
        description="How token losses become one number: mean over all tokens; mean per "
        "completion, then over completions; sum per completion, then mean over completions; the "
        "same divided by rollout.max_tokens (Dr. GRPO).",
    )
    missing_eos_penalty: float = Field(
        0.0, ge=0, description="Taken off the score of a completion without an end token."
    )
    truncated: Literal["keep", "mask", "bootstrap"] = Field(
        "keep",
        description="Completions cut at max_tokens: trained as they are, left out of the loss, or "
        "continued with the value estimate (gae only).",
    )
    kl: KLConfig = KLConfig()


class LearnerConfig(Section):
    lr: float = Field(1e-5, gt=0, description="Learning rate of the policy, at its highest.")
    value_lr: float | None = Field(
        None, gt=0, description="Learning rate of the value network; none: as lr."
    )
    warmup_steps: int = Field(
        0, ge=0, description="Learner steps in which the learning rate rises to lr."
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant",
        description="How the learning rate goes on after the warm-up: constant, or to 0.",
    )
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay of AdamW.")
    betas: tuple[float, float] = Field(
        (0.9, 0.95), description="AdamW: decay of the first and of the second moment."
    )
    eps: float = Field(1e-8, description="AdamW: added to the root of the second moment.")
    max_grad_norm: float = Field(
        1.0, gt=0, description="A gradient of a larger norm is scaled down to this norm."
    )
    epochs: int = Field(1, ge=1, description="Passes over the completions of a learner step.")
    minibatches: int = Field(1, ge=1, description="Optimiser steps per pass.")
    tokens_per_microbatch: int = Field(
        2048, ge=16, description="Padded tokens of one forward pass; bounds the memory it takes."
    )
    packing: Literal["auto", "padded", "packed"] = Field(
        "auto",
        description="Rows of a microbatch: padded to the longest, or packed end to end. auto: "
        "packed on a GPU in bfloat16 (flash attention), else padded (faster on a CPU).",
    )
    activation_memory_mb: int | None = Field(
        None,
        ge=0,
        description="With one optimiser step per learner step: MiB for the forward pass that "
        "measures the step to wait for its loss, instead of being run twice. A step that needs "
        "more runs it twice, with the same result. none: an eighth of the machine's memory, a "
        "quarter of what is free on a GPU; 0: always twice.",
    )
    value_model: Literal["auto", "own", "shared"] = Field(
        "auto",
        description="auto: own network from the reward model when `value_path` is set, else "
        "a head on the policy's trunk.",
    )
    value_path: str | None = Field(None, description="Reward model the value network starts from.")
    value_warmup_steps: int = Field(
        0, ge=0, description="First learner steps, which train the value network only."
    )
    reference_path: str | None = Field(
        None, description="Reference model; none: the starting policy."
    )
    gradient_checkpointing: bool = Field(
        False, description="Compute activations twice instead of keeping them (less memory)."
    )
    compile: bool = Field(
        False,
        description="torch.compile of the models. On one CPU core a step got up to 11 % faster, "
        "after one to two minutes of compiling at the start.",
    )
    deterministic: bool = Field(False, description="Use deterministic kernels (slower).")
    processes: int = Field(
        1, ge=1, description="Processes of the learner, which share the microbatches of a step."
    )
    sharding: Literal["none", "fsdp2"] = Field(
        "none",
        description="With several processes. none: each holds all weights. fsdp2: weights, "
        "gradients and optimiser state are dealt out to them (`fully_shard`).",
    )
    cpus: float = auto(
        1,
        rule="the cores that the workers leave, from 4 on less one for the other "
        "processes, divided by learner.processes; at most 8 for a model "
        "below 50 million parameters; 1 on a GPU",
        gt=0,
        description="CPU cores of each process of the learner.",
    )
    gpus: float = auto(
        0,
        rule="0 without a GPU; 1 where there are enough; 0.5 of the only one",
        ge=0,
        description="GPUs of each process of the learner.",
    )
    start_timeout_s: float = Field(
        180, gt=0, description="A learner that is not ready after so many seconds is an error."
    )
    step_timeout_s: float = Field(
        1800, gt=0, description="A learner step that takes more seconds is an error."
    )


class WeightsConfig(Section):
    transport: Annotated[str, AfterValidator(WEIGHT_TRANSPORTS.check)] = Field(
        "object_store",
        description="How weights travel: Ray's object store; a shared directory; NCCL between GPUs "
        "(gloo on CPU); memory of the one GPU that learner and engine share (CUDA IPC).",
    )
    canary_tolerance: float | None = Field(
        None,
        gt=0,
        description="Most by which engine and learner may differ over the canary, nats: the "
        "largest difference in float32, the median in bfloat16. none: 20 times the noise that the "
        "engine has shown, but 1e-4 to 1e-3 in float32, 0.05 to 0.5 in bfloat16.",
    )
    timeout_s: float = Field(
        120, gt=0, description="A worker without the new weights after so many seconds is replaced."
    )


class CheckpointConfig(Section):
    every: int = auto(
        50,
        rule="a fifth of batch.steps, from 10 to 50",
        ge=1,
        description="Learner steps between checkpoints.",
    )
    keep: int = Field(2, ge=1, description="Newest checkpoints kept.")


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
    logging: LoggingConfig = LoggingConfig()
    alarms: AlarmsConfig = AlarmsConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        problems = list(train_problems(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self
