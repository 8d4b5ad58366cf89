"""The learner, how its weights travel, and its checkpoints."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from cluster.contracts.config.base import (
    Labels,
    Resources,
    Section,
    auto,
    labels,
    resources,
)
from cluster.contracts.config.compute import ComputeConfig
from cluster.contracts.registry import WEIGHT_TRANSPORTS


class LearnerConfig(ComputeConfig):
    lr: float = Field(1e-5, gt=0, description="Highest learning rate of the policy.")
    value_lr: float | None = Field(
        None, gt=0, description="Highest learning rate of the value network. none: as `lr`."
    )
    warmup_steps: int = Field(
        0, ge=0, description="Learner steps in which the learning rate rises to `lr`."
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant",
        description="Learning rate after the warm-up. constant: it stays. linear, cosine: it "
        "falls to 0.",
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay.")
    betas: tuple[float, float] = Field(
        (0.9, 0.95), description="AdamW's decay rates of the first and the second moment."
    )
    eps: float = Field(1e-8, description="AdamW's epsilon, added to the root of the second moment.")
    max_grad_norm: float = Field(
        1.0, gt=0, description="A larger gradient is scaled down to this norm."
    )
    epochs: int = Field(1, ge=1, description="Passes over the completions of a learner step.")
    minibatches: int = Field(1, ge=1, description="Optimiser steps per pass.")
    tokens_per_microbatch: int = auto(
        2048,
        rule="2048 on a CPU; on a GPU the largest of 8192 and 4096 with which a forward pass keeps "
        "at most a third of the learner's share of the GPU's memory, else 2048",
        ge=16,
        description="Most tokens in one forward pass, padding included. Lower it to save memory.",
    )
    stream_parts: int = auto(
        1,
        rule="with `staleness.bound` = 0 and one learner process: one for each full microbatch "
        "of a step whose prompts and completions have their longest length, at most 4 and at most "
        "one for two groups; else 1",
        ge=1,
        description="Number of parts that a step's groups are cut into, in the order of their "
        "ids. While a part is still generated, an idle learner computes the forward passes of "
        "the parts that are complete. No microbatch of these passes crosses a part's border, so "
        "the step is the same whichever groups came first. 1: the learner waits for all groups. "
        "Above 1 needs `processes` = 1.",
    )
    packing: Literal["auto", "padded", "packed"] = Field(
        "auto",
        description="padded: each row of a microbatch is padded to the longest. packed: rows "
        "are laid end to end, without padding. auto: packed on a CPU, and on a GPU in bfloat16 "
        "(flash attention), if the architecture allows it.",
    )
    activation_memory_mb: int | None = Field(
        None,
        ge=0,
        description="Only with one optimiser step per learner step. MiB in which the learner "
        "may keep the activations of the forward pass that computes the old "
        "log-probabilities. Then the update need not run that pass again. A step "
        "that needs more runs it twice, with the same result. none: an eighth of "
        "the machine's memory, or a quarter of the free GPU memory. 0: always "
        "twice.",
    )
    value_model: Literal["auto", "own", "shared"] = Field(
        "auto",
        description="own: a network of its own. shared: a head on the policy's trunk. auto: own "
        "if `value_path` is set, else shared.",
    )
    value_path: str | None = Field(
        None, description="Reward model that the value network starts from."
    )
    value_warmup_steps: int = Field(
        0, ge=0, description="The first so many learner steps train only the value network."
    )
    reference_path: str | None = Field(
        None, description="Reference model. none: the policy that the run starts from."
    )
    reference_revision: str | None = Field(
        None, description="Revision of the reference model, if that is a hub id. none: the newest."
    )
    compile: bool = Field(
        False,
        description="Use torch.compile. On one CPU core a step got up to 11 % faster, after one "
        "to two minutes of compiling at the start.",
    )
    deterministic: bool = Field(False, description="Use deterministic kernels (slower).")
    cpus: float = auto(
        1,
        rule="the cores that the workers leave (one fewer where they leave four or more, "
        "for the other processes), divided by `learner.processes`; at most 8 for a "
        "model below 50 million parameters; 1 on a GPU",
        gt=0,
        description="CPU cores of each learner process.",
    )
    gpus: float = auto(
        0,
        rule="0 without a GPU; 0.5 if learner and workers share the only one; else 1",
        ge=0,
        description="GPUs that Ray reserves for each learner process.",
    )
    resources: Resources = resources("a learner process")
    labels: Labels = labels("a learner process")
    start_timeout_s: float = Field(
        180, gt=0, description="A learner that is not ready after this many seconds is an error."
    )
    max_restarts: int = Field(
        3,
        ge=0,
        description="Most restarts of the learner within ten minutes. It goes on from the newest "
        "checkpoint and the rollouts saved since. One more loss ends the run.",
    )
    step_timeout_s: float = Field(
        1800,
        gt=0,
        description="A learner step that takes longer than this many seconds is an error.",
    )


class WeightsConfig(Section):
    transport: Annotated[str, AfterValidator(WEIGHT_TRANSPORTS.check)] = Field(
        "object_store",
        description="How new weights reach the workers. object_store: Ray's object store. disk: "
        "a shared directory. collective: NCCL between GPUs, gloo between CPUs. "
        "shared_device: memory of the one GPU that learner and engine share (CUDA "
        "IPC).",
    )
    canary_tolerance: float | None = Field(
        None,
        gt=0,
        description="Largest difference in nats between engine and learner on the canary "
        "(docs/glossary.md) that is accepted: of any token in float32, of the "
        "median token otherwise. none: 20 times the largest difference so far, "
        "within 1e-4 and 1e-3 in float32, within 0.05 and 0.5 in bfloat16, within 0.5 and 1 in "
        "8 bits (`rollout.quantization`).",
    )
    bucket_mb: float = Field(
        256,
        gt=0,
        description="Weights travel in buckets of at most this many MiB; a larger tensor is a "
        "bucket of its own. Beside the weights, the learner and each worker hold two buckets.",
    )
    timeout_s: float = Field(
        120,
        gt=0,
        description="A worker that does not have the new weights after this many seconds is "
        "replaced.",
    )


class CheckpointConfig(Section):
    every: int = auto(
        50,
        rule="a fifth of `batch.steps`, at least 10 and at most 50",
        ge=1,
        description="Learner steps between checkpoints.",
    )
    every_s: float | None = Field(
        None,
        gt=0,
        description="A checkpoint is written at the end of a step also when the last one began "
        "this many seconds ago. none: by steps only.",
    )
    keep: int = Field(2, ge=1, description="Number of newest undamaged checkpoints to keep.")
