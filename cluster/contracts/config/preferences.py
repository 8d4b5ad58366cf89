"""`accord preferences`: what a snapshot holds, and the gates that hold it back."""

from __future__ import annotations

from pydantic import Field

from cluster.contracts.config.base import Section


class QualityConfig(Section):
    """Gates: a snapshot is written only if the judgements pass all that are set."""

    min_alpha: float | None = Field(
        None,
        ge=-1,
        le=1,
        description="Lowest Krippendorff's alpha of annotators who judged the same items. none: "
        "not asked for.",
    )
    min_gold: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Lowest share of right answers to control items. none: not asked for.",
    )
    max_position_bias: float | None = Field(
        None,
        ge=0,
        le=0.5,
        description="Largest distance from 0.5 of the share of judgements that prefer the "
        "completion shown first. Only a distance that chance does not explain (p < 0.05) counts. "
        "none: not asked for.",
    )
    min_labels: int | None = Field(
        None, ge=1, description="Fewest judgements of a snapshot. none: not asked for."
    )


class SnapshotConfig(Section):
    """What of a store goes into a snapshot."""

    test_fraction: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Share of the prompts in the split `test`. A hash of the prompt decides.",
    )
    sources: list[str] = Field(
        default_factory=list,
        description="Only judgements by these sources: `person`, `import`, `rule`, `ai`, "
        "`simulated`. Empty: all.",
    )
    consents: list[str] = Field(
        default_factory=list,
        description="Only judgements under these versions of the terms. Empty: all.",
    )
    licenses: list[str] = Field(
        default_factory=list, description="Only items with these licenses. Empty: all."
    )
    without_annotators: list[str] = Field(
        default_factory=list, description="Pseudonyms of annotators to leave out."
    )
    min_strength: float = Field(
        0.0, ge=0, description="Leave out comparisons with a smaller strength."
    )


class PreferencesConfig(Section):
    """`accord preferences snapshot` and `stats`."""

    snapshot: SnapshotConfig = SnapshotConfig()
    quality: QualityConfig = QualityConfig()
