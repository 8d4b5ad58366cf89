"""What was to be judged, and what somebody judged about it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from cluster.contracts.records import Message

LETTERS = "abcd"  # the completions of an item are called a, b, c and d
MOST_COMPLETIONS = len(LETTERS)

Answer = Literal["ranking", "all_bad", "demonstration", "skip", "flag", "withdrawn"]
"""ranking: ``ranks`` order the completions, ties included; of two completions this is a
comparison. all_bad: none of them is good enough to prefer one. demonstration: no comparison, only
the completion that the annotator wrote. skip, flag: nothing was judged, ``reason`` says why.
withdrawn: an earlier judgement was taken back."""
Source = Literal["person", "import", "rule", "ai", "simulated"]

ANSWERS: tuple[str, ...] = get_args(Answer)
SOURCES: tuple[str, ...] = get_args(Source)
LABELS = ("ranking", "all_bad", "demonstration")  # answers that count as labels

PAIR_RANKS = {"a": (1, 2), "b": (2, 1), "tie": (1, 1)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One completion to judge, and which policy wrote it how. None where that is not known."""

    text: str
    policy_version: str | None = None
    run: str | None = None
    sampling: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gold:
    """The answer that is known to be right: ``ranks`` as in a judgement; of ``why`` annotators are
    told nothing."""

    ranks: tuple[int, ...]
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenBy:
    """Why an item is asked: the ``strategy`` that chose it and the ``value`` of its measure
    (``choice`` has both). ``judgements``: how many annotators are to judge it, at the least."""

    strategy: str
    value: float | None = None
    judgements: int = 1

    def __post_init__(self) -> None:
        if not self.strategy or self.judgements < 1:
            raise ValueError("an item that was chosen needs a strategy and a judgement")
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"the item's value is {self.value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One to four completions of one prompt. With one, an annotator can only edit it.

    ``source`` says where the item came from (a run, a file), ``license`` under what terms.
    ``topic``: any name by which judgements are compared by group. ``gold``: the known answer of a
    control item. ``chosen_by``: why it is asked; None where nobody chose it. Raises ValueError for
    what is no item.
    """

    id: str
    messages: tuple[Message, ...]
    completions: tuple[Candidate, ...]
    source: str
    license: str
    created_at: str  # ISO 8601, UTC
    topic: str = ""
    gold: Gold | None = None
    chosen_by: ChosenBy | None = None

    def __post_init__(self) -> None:
        if not self.id or not self.messages:
            raise ValueError("an item needs an id and a prompt")
        if not 1 <= len(self.completions) <= MOST_COMPLETIONS:
            raise ValueError(
                f"an item has {len(self.completions)} completions, expected 1 to {MOST_COMPLETIONS}"
            )
        if self.gold is not None:
            check_ranks(self.gold.ranks, len(self.completions))


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What one annotator answered about one item.

    ``ranks[i]``: the place of completion i, 1 is the best, equal numbers are ties.
    ``strength`` >= 0 says how much better the preferred of two completions is; None: not asked.
    ``demonstration``: the completion as the annotator would have written it.
    ``shown_order``: letters of the completions from first to last as shown; empty: not known.
    ``consent``: version of the terms that the annotator agreed to. ``annotator_id``: a pseudonym.
    ``judge``: of an AI judge, its model and the hash of its prompt.
    ``supersedes``: the same annotator's earlier judgement of the item that this one replaces.
    Raises ValueError for what is no judgement.
    """

    id: str
    item_id: str
    annotator_id: str
    answer: Answer
    consent: str
    created_at: str
    ranks: tuple[int, ...] = ()
    strength: float | None = None
    demonstration: str | None = None
    reason: str = ""
    rationale: str = ""
    criteria: Mapping[str, Any] = field(default_factory=dict)
    shown_order: str = ""
    duration_s: float | None = None
    guideline_version: str = ""
    guideline_sha256: str = ""
    source: Source = "person"
    judge: Mapping[str, Any] | None = None
    supersedes: str | None = None

    def __post_init__(self) -> None:
        if not self.id or not self.item_id or not self.annotator_id:
            raise ValueError("a judgement needs an id, an item and an annotator")
        _require(self.answer, "answer", ANSWERS)
        _require(self.source, "source", SOURCES)
        if (self.answer == "ranking") != bool(self.ranks):
            raise ValueError(f"answer {self.answer!r} with ranks {list(self.ranks)}")
        if self.answer == "demonstration" and not self.demonstration:
            raise ValueError("answer 'demonstration' without the completion that was written")
        if sorted(self.shown_order) != list(LETTERS[: len(self.shown_order)]):
            raise ValueError(
                f"shown_order is {self.shown_order!r}, expected letters of the completions, "
                "such as 'ba'"
            )
        for name, number in (("strength", self.strength), ("duration_s", self.duration_s)):
            if number is not None and not (math.isfinite(number) and number >= 0):
                raise ValueError(f"{name} is {number}, expected a number from 0")

    @property
    def is_label(self) -> bool:
        return self.answer in LABELS

    @property
    def choice(self) -> str:
        """In one word: a, b, tie, both_bad; of more completions their order, such as "b>a=c"."""
        if self.answer == "ranking":
            return choice_of(self.ranks)
        return "both_bad" if self.answer == "all_bad" else self.answer


def check_ranks(ranks: Sequence[int], completions: int) -> None:
    """Raises ValueError unless ``ranks`` has one place from 1 per completion and 1 is taken."""
    if len(ranks) != completions or completions < 2:
        raise ValueError(f"{len(ranks)} ranks for {completions} completions")
    if min(ranks) != 1 or max(ranks) > completions:
        raise ValueError(f"ranks {list(ranks)} are not places from 1 to {completions}")


def choice_of(ranks: Sequence[int]) -> str:
    if len(ranks) == 2:
        first, second = ranks
        return "a" if first < second else "b" if first > second else "tie"
    groups: dict[int, str] = {}
    for letter, rank in zip(LETTERS, ranks, strict=False):
        groups[rank] = f"{groups[rank]}={letter}" if rank in groups else letter
    return ">".join(groups[rank] for rank in sorted(groups))


def preferred_pairs(ranks: Sequence[int]) -> list[tuple[int, int]]:
    """(better, worse): indices of every two completions that are not tied."""
    places = range(len(ranks))
    return [(i, j) for i in places for j in places if ranks[i] < ranks[j]]


def withdrawal(judgement: Judgement, new_id: str, created_at: str) -> Judgement:
    """The record that takes ``judgement`` back (undo). The annotator may then judge the item anew,
    with a record that supersedes this one."""
    return Judgement(
        id=new_id,
        item_id=judgement.item_id,
        annotator_id=judgement.annotator_id,
        answer="withdrawn",
        consent=judgement.consent,
        created_at=created_at,
        source=judgement.source,
        supersedes=judgement.id,
    )


def _require(value: str, name: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} {value!r} is not one of {', '.join(allowed)}")


def prompt_hash(messages: Sequence[Message]) -> str:
    """Hex SHA-256 of the prompt alone: the same for all completions of it."""
    plain = [[m["role"], m["content"]] for m in messages]
    return hashlib.sha256(json.dumps(plain, ensure_ascii=True).encode()).hexdigest()


def text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def derived_id(*texts: object) -> str:
    """A stable id from what makes a record itself (32 hex characters)."""
    return hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()[:32]


def utc_now() -> str:
    """Now, ISO 8601, UTC, to the second."""
    return datetime.now(UTC).replace(microsecond=0).isoformat()
