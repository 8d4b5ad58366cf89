"""What a scorer reads and answers, inside the reward service."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.contracts.records import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreItem:
    """One completion to be scored. ``tokenizer``: fingerprint the token ids belong to ("" unknown).

    ``where``: file and row of its prompt and which of the completions it is, for messages.
    """

    id: str
    messages: tuple[Message, ...]
    response: str
    prompt_ids: tuple[int, ...] = ()
    response_ids: tuple[int, ...] = ()
    finish_reason: str = "stop"
    metadata: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str = ""
    where: str = ""

    @property
    def label(self) -> str:
        """What a person finds the completion by."""
        return self.where or f"item {self.id!r}"


@dataclass(frozen=True, slots=True)
class Part:
    """One source's unweighted number for one item, and the rules the answer broke."""

    value: float
    vetoes: tuple[str, ...] = ()


class Source(Protocol):
    """One reward among those that are summed.

    ``content`` is a hash of everything that decides its numbers; ``tokenizer`` the fingerprint of
    the tokenizer of a scoring model, "" for the others. ``score`` returns one ``Part`` an item, in
    order, or raises BadReward (unusable answer) or RewardFailure (may work later); it never invents
    a number.
    """

    name: str
    type: str
    content: str
    tokenizer: str

    def score(self, items: Sequence[ScoreItem]) -> list[Part]: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceInfo:
    name: str
    type: str
    weight: float
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceInfo:
    """What a service says of itself; ``scorer_version`` changes with all that changes a score."""

    name: str
    scorer_version: str
    sources: tuple[SourceInfo, ...]
    max_batch: int
    tokenizer: str
