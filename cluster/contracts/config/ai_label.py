"""`accord ai-label`."""

from __future__ import annotations

from pydantic import Field, model_validator

from cluster.contracts.config.base import ClusterConfig, RunConfig, Section
from cluster.contracts.config.choice import ChoiceConfig
from cluster.contracts.config.judge import HELPFUL, JudgeConfig


class JudgedData(Section):
    path: str = Field(
        description="A preference store (*.db), a file of comparisons, or the output of `accord "
        "generate` with several completions per prompt."
    )
    split: str = Field("train", description="Split of a data set.")


class AiLabelConfig(Section):
    """`accord ai-label`: comparisons of completions by an AI judge, into a preference store.

    choice: of all pairs of completions in the file only the chosen ones are judged, in this order.
    """

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
    choice: ChoiceConfig | None = None
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _items_of_a_store_were_chosen(self) -> AiLabelConfig:
        if self.choice is not None and self.data.path.endswith(".db"):
            raise ValueError(
                "choice is of completions in a file, and data.path is a store, whose items were "
                "chosen before: leave choice out"
            )
        return self
