"""The safety layer: rules on text, and a classifier."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, model_validator

from cluster.contracts.config.base import Section

REFUSALS = [
    r"(?i)\bI(?: am|'m) (?:sorry|unable|not able)\b",
    r"(?i)\bI (?:can(?:no|')t|can not|won't|will not|must decline)\b",
]
_REFUSALS = [re.compile(text) for text in REFUSALS]


def refuses(text: str | None) -> bool:
    """Whether a completion refuses, by English phrases."""
    return any(one.search(text or "") for one in _REFUSALS)


class SafetyRule(Section):
    name: str = Field(min_length=1, description="Name in reports and in the audit log.")
    pattern: str | None = Field(
        None, description="Regular expression that is searched in a completion."
    )
    words: list[str] = Field(
        default_factory=list, description="Whole words or phrases, in any case."
    )
    words_file: str | None = Field(None, description="File with one word or phrase per line.")
    action: Literal["veto", "penalty", "rewrite"] = Field(
        "veto",
        description="veto: the completion gets `veto_score` in training, and in `accord chat` "
        "`refusal` is shown in its place. penalty: `penalty` is subtracted. rewrite: as penalty, "
        "and `accord chat` shows `replacement` for each match.",
    )
    penalty: float = Field(1.0, ge=0, description="What one hit of the rule costs in training.")
    replacement: str = Field("[removed]", description="What a match is rewritten to.")

    @model_validator(mode="after")
    def _check(self) -> SafetyRule:
        if (self.pattern is None) == (not self.words and self.words_file is None):
            raise ValueError("a rule needs a pattern, or words or words_file, and not both")
        if "" in self.words or self.pattern == "":
            raise ValueError("an empty word or pattern is found in every completion")
        return self


class ClassifierRule(Section):
    path: str = Field(description="Directory or hub id of a sequence classifier (Hugging Face).")
    label: str = Field(description="The classifier's label for what is harmful.")
    threshold: float = Field(
        0.5, gt=0, le=1, description="A completion with at least this probability of it is a hit."
    )
    action: Literal["veto", "penalty"] = Field("veto", description="As of a rule.")
    penalty: float = Field(1.0, ge=0, description="What a hit costs in training.")
    sees_prompt: bool = Field(
        False, description="Give the classifier prompt and completion, not the completion alone."
    )


class SafetyConfig(Section):
    rules: list[SafetyRule] = Field(
        default_factory=list, description="Rules; all of them are tried on each completion."
    )
    classifier: ClassifierRule | None = Field(
        None, description="A model that says how probable it is that a completion is harmful."
    )
    veto_score: float = Field(
        -10.0, le=0, description="The score in training of a completion that is vetoed."
    )
    refusal: str = Field(
        "I cannot help with that.", description="What `accord chat` shows in place of a veto."
    )
    refusals: list[str] = Field(
        REFUSALS,
        description="Regular expressions by which a report recognises that a completion refuses.",
    )
    audit: str | None = Field(
        "runs/safety_audit.jsonl",
        description="File to which each hit is added, one JSON line. none: off.",
    )
    audit_text: bool = Field(
        False, description="Write the completion into the audit log, not only its hash."
    )

    @model_validator(mode="after")
    def _check(self) -> SafetyConfig:
        if not self.rules and self.classifier is None:
            raise ValueError("give rules or a classifier")
        names = [rule.name for rule in self.rules]
        if len(set(names)) != len(names):
            raise ValueError(f"two rules have the same name: {', '.join(sorted(names))}")
        return self
