"""`accord sft`, `accord reward-model`, `accord dpo`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cluster.contracts.config.base import LoggingConfig, ModelConfig, RunConfig, Section


class FitConfig(Section):
    """The loop shared by SFT, reward model and DPO."""

    epochs: int = Field(1, ge=1)
    max_steps: int | None = Field(None, ge=1, description="Stop after so many optimiser steps.")
    max_seconds: float | None = Field(
        None, gt=0, description="Stop after so long, with a full schedule."
    )
    lr: float = Field(1e-4, gt=0)
    warmup_ratio: float = Field(0.05, ge=0, le=1)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    max_grad_norm: float = Field(1.0, gt=0)
    rows_per_step: int = Field(32, ge=1, description="Rows of one optimiser step.")
    tokens_per_microbatch: int = Field(4096, ge=16)
    max_tokens: int = Field(
        512, ge=2, description="Longest row; longer ones are left out and counted."
    )
    eval_fraction: float = Field(0.05, ge=0, lt=1, description="Held out, by prompt hash.")
    eval_every: int = Field(100, ge=1, description="Optimiser steps between evaluations.")
    checkpoint_every: int = Field(500, ge=1)
    threads: int = Field(0, ge=0, description="Compute threads; 0: one a core.")


class SftDataConfig(Section):
    path: str = Field(
        description="JSONL or Parquet file, or `datasets:NAME`, with messages, "
        "prompt+completion or text."
    )
    split: str = "train"


class SftConfig(Section):
    """`accord sft`: supervised fine-tuning on the assistant's tokens."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    data: SftDataConfig
    fit: FitConfig = FitConfig()
    logging: LoggingConfig = LoggingConfig()


class PairsConfig(Section):
    path: str = Field(
        description="prompt/chosen/rejected as JSONL, Parquet or `datasets:NAME`, or a preference "
        "store (`*.db`), whose pairs are exported into the run."
    )
    split: str = "train"


class RewardModelConfig(Section):
    """`accord reward-model`: a scalar head learnt from comparisons (Bradley-Terry)."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    data: PairsConfig
    fit: FitConfig = FitConfig()
    use_margin: bool = Field(False, description="Subtract the annotators' strength in the loss.")
    centre_coef: float = Field(0.0, ge=0, description="Weight of (chosen + rejected)² in the loss.")
    logging: LoggingConfig = LoggingConfig()


class DpoConfig(Section):
    """`accord dpo`: direct preference optimisation."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    data: PairsConfig
    fit: FitConfig = FitConfig()
    beta: float = Field(0.1, gt=0)
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    logging: LoggingConfig = LoggingConfig()
