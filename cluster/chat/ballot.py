"""The vote at a terminal: which of two unnamed answers is better."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence

from cluster.chat.voting import CONSENT, Choice, Vote, Voting

QUESTION = "a or b better, t: equally good, n: both bad, Enter: no vote > "
CHOICES: Mapping[str, Choice] = {"a": "first", "b": "second", "t": "tie", "n": "both_bad"}


class Ballot:
    """``who``: the pseudonym under which the votes are stored."""

    def __init__(self, voting: Voting, who: str) -> None:
        self._voting = voting
        self._who = who
        self._shown = voting.order()
        voting.admit(who)

    @property
    def notice(self) -> str:
        return (
            f"Two models answer, unnamed, in an order drawn anew each time. Your votes go into "
            f"{self._voting.store.path} under the pseudonym {self._who}. {CONSENT}"
        )

    def next_order(self) -> tuple[str, str]:
        self._shown = self._voting.order()
        return self._shown

    def ask(
        self,
        messages: Sequence[Mapping[str, str]],
        answers: Mapping[str, str],
        read: Callable[[str], str],
        say: Callable[[str], None],
    ) -> str:
        """Asks until the vote is one; returns the name of the model whose answer goes on, which
        without a preference is that of the first one shown."""
        first, second = self._shown
        if answers[first] == answers[second]:
            say("(both wrote the same; no vote)")
            return first
        began = time.monotonic()
        while (line := read(QUESTION).strip().lower()) not in CHOICES:
            if not line:
                return first
            say("(write a, b, t or n, or press Enter)")
        vote = Vote(
            number=secrets.token_hex(8),
            messages=messages,
            answers=answers,
            shown=self._shown,
            choice=CHOICES[line],
            seconds=time.monotonic() - began,
        )
        self._voting.cast(self._who, vote)
        return second if vote.choice == "second" else first
