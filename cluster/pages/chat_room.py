"""What visitors of the chat page have asked, and the two unnamed answers to each question.

One conversation per visitor, in memory: what was voted on is in the store, the rest goes with the
process. The answer that is preferred goes on in the conversation, for both models.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Messages = Sequence[Mapping[str, str]]
Choice = Literal["first", "second", "tie", "both_bad"]
CHOICES: tuple[Choice, ...] = ("first", "tie", "second", "both_bad")
LONGEST = 20_000  # characters of a question

Answer = Callable[[Messages], Mapping[str, str]]
"""The answers of both models, by name. Raises UserError where one has no room for an answer."""


@dataclass(slots=True)
class Round:
    """A question. ``shown``: the names of the models in the order of their answers. ``choice``:
    None until the visitor has voted, or chosen not to ("")."""

    number: str
    question: str
    messages: Messages
    answers: Mapping[str, str]
    shown: tuple[str, str]
    began: float
    choice: Choice | Literal[""] | None = None

    @property
    def texts(self) -> tuple[str, str]:
        return self.answers[self.shown[0]], self.answers[self.shown[1]]

    @property
    def same(self) -> bool:
        return self.texts[0] == self.texts[1]

    @property
    def going_on(self) -> str:
        return self.texts[1 if self.choice == "second" else 0]


Cast = Callable[[str, Round], None]
"""Stores a visitor's vote. Raises UserError where it cannot be stored."""


@dataclass(slots=True)
class Talk:
    rounds: list[Round] = field(default_factory=list)
    asking: bool = False  # the models are writing; a second question is refused

    @property
    def pending(self) -> Round | None:
        """The question whose vote is still to come."""
        return self.rounds[-1] if self.rounds and self.rounds[-1].choice is None else None


class ChatRoom:
    """Thread-safe; the models answer one question at a time. ``order``: draws who is shown first.
    ``remember``: whether the models see earlier questions. ``plain``: they continue text."""

    def __init__(
        self,
        answer: Answer,
        cast: Cast,
        order: Callable[[], tuple[str, str]],
        *,
        remember: bool = True,
        plain: bool = False,
    ) -> None:
        self._answer = answer
        self._cast = cast
        self._order = order
        self._remember = remember and not plain
        self._role = "text" if plain else "user"
        self._talks: dict[str, Talk] = {}
        self._lock = threading.Lock()
        self._models = threading.Lock()

    def talk(self, who: str) -> Talk:
        with self._lock:
            return self._talks.setdefault(who, Talk())

    def ask(self, who: str, question: str) -> bool:
        """False where the visitor has a question open already (a form that was sent twice)."""
        talk = self.talk(who)
        with self._lock:
            if talk.asking or talk.pending is not None:
                return False
            talk.asking = True
        try:
            messages = [*self._before(talk), {"role": self._role, "content": question}]
            with self._models:
                answers = self._answer(messages)
            talk.rounds.append(
                Round(
                    number=secrets.token_hex(8),
                    question=question,
                    messages=messages,
                    answers=answers,
                    shown=self._order(),
                    began=time.monotonic(),
                )
            )
        finally:
            talk.asking = False
        return True

    def vote(self, who: str, number: str, choice: str) -> bool:
        """``choice``: one of CHOICES, anything else is no vote. False for a question that is not
        the open one, such as that of a form sent twice."""
        talk = self.talk(who)
        with self._lock:
            pending = talk.pending
            if pending is None or pending.number != number:
                return False
            given = next((one for one in CHOICES if one == choice), None)
            if given is not None and not pending.same:
                pending.choice = given
                try:
                    self._cast(who, pending)
                except BaseException:
                    pending.choice = None  # it is not on disk: the question stays open
                    raise
            else:
                pending.choice = ""
        return True

    def begin_anew(self, who: str) -> None:
        with self._lock:
            self._talks.pop(who, None)

    def _before(self, talk: Talk) -> list[dict[str, str]]:
        found: list[dict[str, str]] = []
        for one in talk.rounds if self._remember else []:
            found.append({"role": "user", "content": one.question})
            found.append({"role": "assistant", "content": one.going_on})
        return found
