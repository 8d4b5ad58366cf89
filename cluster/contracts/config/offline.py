"""`accord sft`, `accord reward-model`, `accord dpo`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cluster.contracts.config.base import LoggingConfig, ModelConfig, RunConfig, Section


class FitConfig(Section):
    """The loop shared by SFT, reward model and DPO."""

    epochs: int = Field(1, ge=1, description="Passes over all rows.")
    max_steps: int | None = Field(None, ge=1, description="Stop after this many optimiser steps.")
    max_seconds: float | None = Field(
        None,
        gt=0,
        description="Stop after this many seconds. The learning rate then ends its schedule by "
        "that time.",
    )
    lr: float = Field(1e-4, gt=0, description="Highest learning rate.")
    warmup_ratio: float = Field(
        0.05,
        ge=0,
        le=1,
        description="Share of the optimiser steps in which the learning rate rises to `lr`.",
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine",
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
    rows_per_step: int = Field(32, ge=1, description="Rows per optimiser step.")
    tokens_per_microbatch: int = Field(
        4096,
        ge=16,
        description="Most tokens in one forward pass, padding included. Lower it to save memory.",
    )
    max_tokens: int = Field(
        512, ge=2, description="Longest row, in tokens. Longer rows are left out and counted."
    )
    eval_fraction: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="Share of the prompts held out for evaluation. A hash of the prompt decides.",
    )
    eval_every: int = Field(100, ge=1, description="Optimiser steps between evaluations.")
    checkpoint_every: int = Field(500, ge=1, description="Optimiser steps between checkpoints.")
    threads: int = Field(0, ge=0, description="Compute threads. 0: one per core.")


class SftDataConfig(Section):
    path: str = Field(
        description="JSONL, JSON, CSV, TSV or Parquet file (also .gz), or `datasets:NAME`. A "
        "row holds messages, conversations, prompt and completion, text, or chosen "
        "and rejected (then chosen is used)."
    )
    split: str = Field("train", description="Split of `datasets:NAME`.")
    skip_bad_rows: bool = Field(
        False,
        description="Leave out and count the rows that cannot be read, instead of stopping at "
        "the first.",
    )


class SftConfig(Section):
    """`accord sft`: supervised fine-tuning on the assistant's tokens."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    data: SftDataConfig
    fit: FitConfig = FitConfig()
    logging: LoggingConfig = LoggingConfig()


class PairsConfig(Section):
    path: str = Field(
        description="Rows with prompt, chosen and rejected: a JSONL, JSON, CSV, TSV or Parquet "
        "file (also .gz), `datasets:NAME`, or a preference store (`*.db`), whose "
        "pairs are exported into the run directory."
    )
    split: str = Field("train", description="Split of `datasets:NAME`.")
    skip_bad_rows: bool = Field(
        False,
        description="Leave out and count the rows that cannot be read, instead of stopping at "
        "the first.",
    )


class RewardModelConfig(Section):
    """`accord reward-model`: a scalar head learnt from comparisons (Bradley-Terry)."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    data: PairsConfig
    fit: FitConfig = FitConfig()
    use_margin: bool = Field(
        False,
        description="Margin loss: the chosen score must exceed the rejected one by the row's "
        "`margin`.",
    )
    centre_coef: float = Field(
        0.0,
        ge=0,
        description="Weight of (chosen score + rejected score)² in the loss. It keeps scores "
        "near 0.",
    )
    logging: LoggingConfig = LoggingConfig()


class DpoConfig(Section):
    """`accord dpo`: direct preference optimisation."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    data: PairsConfig
    fit: FitConfig = FitConfig()
    beta: float = Field(
        0.1,
        gt=0,
        description="How strongly the loss holds the policy to the reference. With a smaller "
        "value it moves further.",
    )
    loss: Literal["sigmoid", "ipo"] = Field(
        "sigmoid",
        description="sigmoid: DPO's own loss. ipo: squared distance to a margin of 1/(2β).",
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="Assumed share of pairs that are labelled the wrong way round.",
    )
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _check(self) -> DpoConfig:
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError("label_smoothing has no effect with loss = 'ipo': leave it at 0")
        return self
