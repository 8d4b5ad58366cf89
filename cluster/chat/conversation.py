"""What was said in a chat: the system message, and the turns with each model's own answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cluster.contracts.chat import text_prompt

Messages = list[dict[str, str]]


@dataclass(slots=True)
class Turn:
    """``answers``: by name of the model."""

    question: str
    answers: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Conversation:
    """``plain``: the models continue plain text (no chat template), so that each question stands
    alone, as it does without ``remember``."""

    plain: bool = False
    remember: bool = True
    system: str | None = None
    turns: list[Turn] = field(default_factory=list)

    def messages(self, model: str, question: str, left_out: int = 0) -> Messages:
        """What ``model`` is given for ``question``, without the ``left_out`` oldest turns."""
        if self.plain:
            return [dict(message) for message in text_prompt(question)]
        found: Messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns[left_out:] if self.remember else []:
            if model in turn.answers:
                found.append({"role": "user", "content": turn.question})
                found.append({"role": "assistant", "content": turn.answers[model]})
        return [*found, {"role": "user", "content": question}]

    def fitting(
        self, model: str, question: str, fits: Callable[[Messages], bool]
    ) -> tuple[Messages, int]:
        """The messages with as many turns as fit, the newest first to stay, and how many were left
        out. Nothing is left to leave out at the end: the question alone may not fit either."""
        left_out = 0
        messages = self.messages(model, question)
        while left_out < len(self.turns) and not fits(messages):
            left_out += 1
            messages = self.messages(model, question, left_out)
        return messages, left_out if self.remember and not self.plain else 0

    def add(self, question: str, answers: Mapping[str, str]) -> None:
        self.turns.append(Turn(question, dict(answers)))

    def settle(self, name: str) -> None:
        """From the last turn on, all models are given the answer of ``name``: what they are asked
        next is then one prompt for all of them."""
        answers = self.turns[-1].answers
        self.turns[-1].answers = dict.fromkeys(answers, answers[name])

    def undo(self) -> Turn | None:
        """Forget the last question and its answers; returns them."""
        return self.turns.pop() if self.turns else None

    def reset(self) -> None:
        """Forget all turns; the system message stays."""
        self.turns.clear()
