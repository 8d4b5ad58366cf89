"""Verdicts on pairs of completions, each asked for in both orders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cluster.contracts.records import Message
from reward_service.judge.questions import Answered, compare
from reward_service.judge.records import Asker

SWAPPED = {"a": "b", "b": "a", "tie": "tie"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two completions of one prompt, to be compared by ``criteria``. ``reference``: a completion
    that is known to be right, which the judge is shown; "": none."""

    messages: tuple[Message, ...]
    a: str
    b: str
    criteria: str
    reference: str = ""
    label: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """``a_first``, ``b_first``: "a", "b" or "tie", as said with that completion shown first."""

    a_first: str
    b_first: str
    reasons: tuple[str, str] = ("", "")

    @property
    def consistent(self) -> bool:
        return self.a_first == self.b_first

    @property
    def choice(self) -> str:
        """A tie where the two orders disagree: the judge then chose a place, not a completion."""
        return self.a_first if self.consistent else "tie"


def verdicts(
    asker: Asker, pairs: Sequence[Pair], *, letter: bool = False
) -> Iterator[tuple[int, Verdict]]:
    """(place of the pair, verdict), as soon as both of its answers are known. Raises what
    ``Asker.ask`` raises."""
    questions = [
        compare(
            pair.messages,
            first,
            second,
            pair.criteria,
            reference=pair.reference,
            letter=letter,
            label=pair.label,
        )
        for pair in pairs
        for first, second in ((pair.a, pair.b), (pair.b, pair.a))
    ]
    half: dict[int, dict[bool, Answered]] = {}
    for place, answered in asker.ask(questions):
        number, b_first = divmod(place, 2)
        known = half.setdefault(number, {})
        known[bool(b_first)] = answered
        if len(known) == 2:
            del half[number]
            yield (
                number,
                Verdict(
                    a_first=known[False].said,
                    b_first=SWAPPED[known[True].said],
                    reasons=(known[False].reason, known[True].reason),
                ),
            )


@dataclass(slots=True)
class Tally:
    """Position consistency over the verdicts of a run."""

    verdicts: int = 0
    consistent: int = 0
    first_shown: int = 0  # of the inconsistent, those where the completion shown first won twice

    def add(self, verdict: Verdict) -> None:
        self.verdicts += 1
        self.consistent += verdict.consistent
        self.first_shown += (verdict.a_first, verdict.b_first) == ("a", "b")

    def as_record(self) -> dict[str, float | int | None]:
        share = self.consistent / self.verdicts if self.verdicts else None
        return {
            "verdicts": self.verdicts,
            "disagreeing_orders": self.verdicts - self.consistent,
            "position_consistency": share,
            "first_shown_won_both": self.first_shown,
        }
