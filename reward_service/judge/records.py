"""What is asked of a judge, and what it answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.contracts.records import Message


class Unreadable(ValueError):
    """A judge's answer that is not of the form it was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One request to a judge.

    ``schema``: JSON schema of the answer; None for free text. ``letters``: the only answers that a
    local judge may sample, where the question is answered by one letter. ``read``: the answer's
    text -> what it says; raises Unreadable. ``label``: names the question in messages.
    """

    messages: tuple[Message, ...]
    read: Callable[[str], Any]
    schema: Mapping[str, Any] | None = None
    letters: tuple[str, ...] = ()
    label: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """``text`` as the judge wrote it; tokens as it counted them."""

    text: str
    finish_reason: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """``requests`` sent; ``cached`` answers that cost nothing; ``cost`` in the currency of the
    configured prices."""

    requests: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0


class Asker(Protocol):
    """A judge's model: an endpoint, or a local one."""

    model: str

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, Any]]:
        """(place of the question, what its answer says), each as soon as it is known. Raises
        RewardFailure (may work later), BadReward (unusable answers) or UserError (refused, or the
        budget is spent); answers that had come are in the cache then."""
        ...

    @property
    def spent(self) -> Spent: ...

    def close(self) -> None: ...


def read_reply(question: Question, reply: Reply) -> Any:
    """What the reply says. Raises Unreadable."""
    if reply.finish_reason != "stop":
        raise Unreadable(f"the answer did not end by itself ({reply.finish_reason})")
    return question.read(reply.text)


def request_key(parts: Mapping[str, Any]) -> str:
    """Hex SHA-256 of everything that decides an answer: the key of the cache."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
