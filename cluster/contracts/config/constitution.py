"""`accord constitution`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cluster.contracts.config.ai_label import JudgedData
from cluster.contracts.config.base import ClusterConfig, RunConfig, Section
from cluster.contracts.config.judge import JudgeConfig


class ConstitutionConfig(Section):
    """`accord constitution`: revised completions for SFT, and preferences by principle."""

    run: RunConfig = RunConfig()
    principles: str = Field(
        description="The constitution: a Markdown file whose list items are the principles, or a "
        "TOML file with `principles = [...]`."
    )
    data: JudgedData
    judge: JudgeConfig = Field(description="The model that critiques, revises and compares.")
    steps: list[Literal["revise", "prefer"]] = Field(
        ["revise", "prefer"],
        min_length=1,
        description="revise: criticise and rewrite each completion; the result is rows for `accord "
        "sft`. prefer: compare pairs of completions, each by one principle; the result is "
        "judgements in `store`.",
    )
    revisions: int = Field(
        1, ge=1, description="How often a completion is revised, each time by another principle."
    )
    store: str | None = Field(
        None, description="The preference store (*.db) for `prefer`. Made if it does not exist."
    )
    max_items: int | None = Field(
        None, ge=1, description="Use only the first so many completions and items. none: all."
    )
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _check(self) -> ConstitutionConfig:
        if "prefer" in self.steps and self.store is None:
            raise ValueError("the step 'prefer' needs store, a preference store to write to")
        if "revise" in self.steps and self.judge.engine != "openai":
            raise ValueError(
                "the step 'revise' needs an endpoint: a judge with engine = 'vllm' answers with "
                "one letter only"
            )
        return self
