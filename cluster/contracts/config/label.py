"""`accord label`."""

from __future__ import annotations

from pydantic import Field, model_validator

from cluster.contracts.config.base import Section
from cluster.contracts.config.choice import ChoiceConfig


class LabelDataConfig(Section):
    """What is labelled, and by how many."""

    files: list[str] = Field(
        [],
        description="Files whose completions are added to the store when the page starts: JSONL, "
        "JSON, CSV, TSV or Parquet. A row holds a prompt and its completions "
        "(docs/preferences.md), or one completion, as `accord generate` writes them. What is in "
        "the store already is not added again.",
    )
    completions: int = Field(
        2,
        ge=1,
        le=4,
        description="Completions per item. 2: a pair. 3 or 4: a ranking. 1: an annotator only "
        "edits it.",
    )
    license: str = Field("unknown", description="The terms of the files, kept with each item.")
    gold: str | None = Field(
        None,
        description="A file of rows with prompt, chosen and rejected whose answer is known. They "
        "are mixed in unmarked, and the admin page counts how often each annotator finds the "
        "answer. none: no such items.",
    )
    gold_every: int = Field(
        10, ge=2, description="An annotator gets one gold item per this many items."
    )
    overlap: int = Field(
        1, ge=1, le=20, description="How many annotators label an item, each of them once."
    )
    overlap_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of the items that `overlap` annotators label; the others are labelled "
        "by one. A hash of the item decides.",
    )
    lease_minutes: float = Field(
        15.0,
        gt=0,
        le=24 * 60,
        description="An item that an annotator has opened is kept from the others for this long.",
    )


class LabelPageConfig(Section):
    """What annotators read before they begin, and what they are asked."""

    guidelines: str | None = Field(
        None,
        description="A Markdown file. Annotators see it before the first item and whenever it has "
        "changed. Each label keeps its version. none: a short built-in text.",
    )
    consent: str | None = Field(
        None,
        description="A Markdown file with the terms that annotators agree to before the first "
        "item, and again when it changes. none: a short built-in text.",
    )
    warning: str | None = Field(
        None,
        description="A Markdown file that says which upsetting content may appear. none: a short "
        "built-in text.",
    )
    strength: bool = Field(
        True, description="Ask how much better the preferred completion is, in three grades."
    )
    rationale: bool = Field(False, description="Refuse a label without a reason in words.")


class LabelLiveConfig(Section):
    """New completions from a policy while people label."""

    policy: str | None = Field(
        None,
        description="A run directory, also of a run in progress, or a model directory. Its newest "
        "policy writes new completions whenever items run out. none: only what is in the "
        "store is labelled.",
    )
    prompts: str | None = Field(
        None, description="File of prompts. none: that of the run's config."
    )
    ahead: int = Field(
        20, ge=1, description="New completions are sampled when fewer items than this are free."
    )
    samples: int | None = Field(
        None,
        ge=1,
        le=64,
        description="Completions per prompt that are sampled. With `choice`, pairs are chosen "
        "among them. none: as many as an item has, or 4 with `choice`.",
    )
    prompts_per_round: int = Field(
        16, ge=1, description="Prompts that are sampled at once. The engine starts for each round."
    )
    max_tokens: int = Field(256, ge=1, description="Longest completion in tokens.")
    temperature: float = Field(1.0, gt=0, description="Temperature of sampling.")
    seed: int = Field(0, ge=0, description="Seed of sampling and of the order of prompts.")


class LabelServerConfig(Section):
    host: str = Field(
        "127.0.0.1",
        description="Address to listen on. Others than the loopback address are reached from the "
        "network, without encryption.",
    )
    port: int = Field(8271, ge=0, le=65535, description="0: any free port.")


class LabelConfig(Section):
    """`accord label`: pages on which people compare, rank and edit completions.

    choice: of all pairs of completions in the files, and of those that are sampled while people
    label, only the chosen ones become items, and annotators get them in this order.
    """

    store: str = Field(
        description="Preference store (`*.db`) that the labels go into. Made if it does not exist."
    )
    data: LabelDataConfig = LabelDataConfig()
    choice: ChoiceConfig | None = None
    page: LabelPageConfig = LabelPageConfig()
    live: LabelLiveConfig = LabelLiveConfig()
    server: LabelServerConfig = LabelServerConfig()

    @model_validator(mode="after")
    def _pairs_are_chosen(self) -> LabelConfig:
        if self.choice is not None and self.data.completions != 2:
            raise ValueError("choice is of pairs: leave it out, or set data.completions = 2")
        return self
