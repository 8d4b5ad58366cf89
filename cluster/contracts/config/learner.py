"""The learner, how its weights travel, and its checkpoints."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from cluster.contracts.config.base import (
    Section,
    auto,
)
from cluster.contracts.registry import WEIGHT_TRANSPORTS


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
