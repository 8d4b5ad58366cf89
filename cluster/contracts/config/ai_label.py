"""`accord ai-label`."""

from __future__ import annotations

from pydantic import Field

from cluster.contracts.config.base import ClusterConfig, RunConfig, Section
from cluster.contracts.config.judge import HELPFUL, JudgeConfig


class JudgedData(Section):
    path: str = Field(
        description="A preference store (*.db), a file of comparisons, or the output of `accord "
        "generate` with several completions per prompt."
    )
    split: str = Field("train", description="Split of a data set.")


class AiLabelConfig(Section):
    """`accord ai-label`: comparisons of completions by an AI judge, into a preference store."""

    run: RunConfig = RunConfig()
    data: JudgedData
    store: str = Field(
        description="The preference store (*.db) that takes the judgements. Made if it does not "
        "exist."
    )
    judge: JudgeConfig
    criteria: str = Field(
        HELPFUL, min_length=1, description="What the judge is told to prefer, in plain words."
    )
    max_items: int | None = Field(
        None, ge=1, description="Judge only the first so many items. none: all."
    )
    cluster: ClusterConfig = ClusterConfig()
