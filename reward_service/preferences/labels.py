"""What a person was asked and what the person answered."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from cluster.contracts.records import Message

Choice = Literal["a", "b", "tie", "both_bad"]
ShownOrder = Literal["ab", "ba"]  # which answer was shown first (left)

CHOICES: tuple[str, ...] = get_args(Choice)
ORDERS: tuple[str, ...] = get_args(ShownOrder)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceItem:
    """Two answers to one prompt, to be compared. Versions and sampling are None where unknown.

    ``source`` says where the item came from (a run, a file), ``license`` under what terms.
    """

    id: str
    messages: tuple[Message, ...]
    answer_a: str
    answer_b: str
    source: str
    license: str
    created_at: str  # ISO 8601, UTC
    policy_version_a: str | None = None
    policy_version_b: str | None = None
    sampling_a: Mapping[str, Any] | None = None
    sampling_b: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not self.id or not self.messages:
            raise ValueError("a preference item needs an id and a prompt")


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceLabel:
    """One annotator's answer. ``supersedes`` names the same annotator's earlier label of the item.

    ``strength`` >= 0 says how much better the chosen answer is; None where it was not asked.
    ``consent`` names the terms the annotator agreed to; ``annotator_id`` is a pseudonym.
    """

    id: str
    item_id: str
    annotator_id: str
    choice: Choice
    consent: str
    created_at: str
    strength: float | None = None
    criteria: Mapping[str, Any] = field(default_factory=dict)
    shown_order: ShownOrder = "ab"
    duration_s: float | None = None
    guideline_version: str = ""
    supersedes: str | None = None

    def __post_init__(self) -> None:
        if not self.id or not self.item_id or not self.annotator_id:
            raise ValueError("a label needs an id, an item and an annotator")
        if self.choice not in CHOICES:
            raise ValueError(f"choice {self.choice!r} is not one of {CHOICES}")
        if self.shown_order not in ORDERS:
            raise ValueError(f"shown_order {self.shown_order!r} is not one of {ORDERS}")
        for name, number in (("strength", self.strength), ("duration_s", self.duration_s)):
            if number is not None and not (math.isfinite(number) and number >= 0):
                raise ValueError(f"{name} is {number}, expected a number from 0")


def prompt_hash(messages: Sequence[Message]) -> str:
    """Hex SHA-256 of the prompt alone: the same for every pair of answers to it."""
    plain = [[m["role"], m["content"]] for m in messages]
    return hashlib.sha256(json.dumps(plain, ensure_ascii=True).encode()).hexdigest()


def derived_id(*texts: object) -> str:
    """A stable id from what makes a record itself (32 hex characters)."""
    return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()[:32]
