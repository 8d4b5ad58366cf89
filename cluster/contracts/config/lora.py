"""LoRA: what is trained instead of the weights themselves (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from cluster.contracts.config.base import Section


class LoraConfig(Section):
    """W + (alpha / rank) B A in place of W: W is frozen, A [rank, in] and B [out, rank] learn."""

    rank: int = Field(
        16, ge=1, description="Rows of A and columns of B: how much each layer's weight can change."
    )
    alpha: float | None = Field(
        None,
        gt=0,
        description="The change of a weight is multiplied by `alpha / rank`. none: twice the rank.",
    )
    targets: Literal["all-linear"] | list[str] = Field(
        "all-linear",
        description="Layers that get an adapter: the last parts of their names, such as "
        '["q_proj", "v_proj"]. all-linear: every linear layer of the decoder, not the output head.',
    )
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of an adapter's inputs that are set to 0 in training. Offline training "
        "only: on-line training computes exact probability ratios, which dropout would blur.",
    )

    base: Literal["full", "8bit", "4bit"] = Field(
        "full",
        description="How the frozen weights under the adapters are held. full: in `model.dtype`. "
        "8bit: int8, a scale for each row. 4bit: NF4, as in QLoRA. Both need torchao "
        "(docs/install.md), take less memory, compute "
        "more slowly, and move the base a little (docs/train.md). Workers merge adapters into the "
        "same numbers.",
    )
    export: Literal["both", "merged", "adapter"] = Field(
        "both",
        description="What a run hands over. merged: `policy/`, a complete model with the adapter "
        "merged into it, as all commands read it. adapter: `adapter/`, in peft's layout, which "
        "peft, transformers and vLLM load beside the base. both: both.",
    )

    @field_validator("targets")
    @classmethod
    def _some_targets(cls, targets: Literal["all-linear"] | list[str]) -> str | list[str]:
        if not targets:
            raise ValueError('names no layer: give names such as ["q_proj"], or "all-linear"')
        return targets

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return (2.0 * self.rank if self.alpha is None else self.alpha) / self.rank
