"""What people, or a judge, are asked next: which pairs of completions are worth a judgement."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cluster.contracts.config.base import Section

Strategy = Literal["random", "disagreement", "uncertainty", "newest", "diversity"]

NEEDS_SCORES: tuple[Strategy, ...] = ("disagreement", "uncertainty")


class ChoiceConfig(Section):
    """Which pairs are judged, in which order, and how many."""

    strategy: Strategy = Field(
        "random",
        description="random: any. disagreement: pairs whose difference in reward the members of an "
        "ensemble see most differently. uncertainty: pairs of which the reward model knows least "
        "which one is better. newest: completions of the newest policy first. diversity: pairs "
        "whose texts are least like those already chosen.",
    )
    pairs_per_prompt: int = Field(1, ge=1, description="Most pairs of one prompt.")
    count: int | None = Field(
        None, ge=1, description="Most pairs in all. none: `pairs_per_prompt` of every prompt."
    )
    mismatched: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the pairs whose second completion was written for another prompt. "
        "Without such pairs a reward model hardly learns to read the prompt, and pays for any "
        "pleasant completion. They are drawn at random under every strategy.",
    )
    overlap_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the pairs that two annotators judge, so that their agreement can be "
        "measured.",
    )
    reward_model: str | None = Field(
        None,
        description="Directory of the reward model that disagreement and uncertainty ask. "
        "disagreement needs an ensemble (`members` of `accord reward-model`).",
    )

    @property
    def needs_scores(self) -> bool:
        return self.strategy in NEEDS_SCORES
