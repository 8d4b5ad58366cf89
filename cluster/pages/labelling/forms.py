"""What an annotator enters <-> a judgement. Pure.

A form speaks of positions ("the first completion"), as that is all that an annotator knows. A
judgement speaks of the completions' letters. The order in which they were shown connects the two.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from reward_service.preferences.records import LETTERS, Answer, Judgement

ORDINALS = ("first", "second", "third", "fourth")
STRENGTHS = {3: "much better", 2: "better", 1: "slightly better"}
ALL_BAD = "all-bad"
TIE = "tie"
SKIP_REASONS = {
    "unsure": "I cannot decide",
    "knowledge": "I lack the knowledge",
    "language": "I do not know the language",
    "upsetting": "I do not want to read it",
}
FLAG_REASONS = {
    "broken": "The prompt or a completion is broken",
    "unsafe": "Dangerous or illegal content",
    "personal": "Somebody's personal data",
    "other": "Something else",
}
LONGEST = {"rationale": 5_000, "demonstration": 50_000}  # characters

Fields = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the buttons under a pair; ``key``: chooses it on the keyboard."""

    value: str
    label: str
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """The part of a judgement that the annotator decides."""

    answer: Answer
    ranks: tuple[int, ...] = ()
    strength: float | None = None
    demonstration: str | None = None
    reason: str = ""
    rationale: str = ""


@dataclass(frozen=True, slots=True)
class Problem:
    """``field``: the part of the form to mend."""

    field: str
    text: str


def shown_order(item_id: str, annotator: str, completions: int) -> str:
    """Letters in the order in which this annotator sees them: random, and the same at each look."""
    letters = list(LETTERS[:completions])
    random.Random(f"{item_id}\0{annotator}").shuffle(letters)
    return "".join(letters)


def pair_choices(strength: bool) -> list[Choice]:
    """From "the first is much better" to "the second is much better", then both bad."""
    if not strength:
        graded = [
            Choice("first", "First is better", "1"),
            Choice(TIE, "Equally good", "2"),
            Choice("second", "Second is better", "3"),
        ]
    else:
        left = [Choice(f"first-{n}", f"First is {words}", "") for n, words in STRENGTHS.items()]
        right = [
            Choice(f"second-{n}", f"Second is {words}", "")
            for n, words in reversed(STRENGTHS.items())
        ]
        row = [*left, Choice(TIE, "Equally good", ""), *right]
        graded = [Choice(c.value, c.label, str(at)) for at, c in enumerate(row, start=1)]
    return [*graded, Choice(ALL_BAD, "Both are bad", "b")]


def read_entry(
    action: str, fields: Fields, order: str, texts: Sequence[str], *, rationale: bool
) -> Entry | list[Problem]:
    """``action``: submit, skip or flag. ``texts``: the completions as shown. ``rationale``: whether
    a label needs one. Returns what is wrong where the form cannot be taken."""
    words = fields.get("rationale", "").strip()
    written = _as_typed(fields.get("demonstration", ""))
    problems = [
        Problem(name, f"At most {LONGEST[name]:,} characters; these are {len(text):,}.")
        for name, text in (("rationale", words), ("demonstration", written))
        if len(text) > LONGEST[name]
    ]
    if problems:
        return problems
    if action in ("skip", "flag"):
        known = SKIP_REASONS if action == "skip" else FLAG_REASONS
        reason = fields.get(f"{action}-reason", "")
        if action == "flag" and reason not in known:
            return [Problem("flag-reason", "Choose what is wrong with this item.")]
        answer: Answer = "skip" if action == "skip" else "flag"
        return Entry(answer=answer, reason=reason if reason in known else "", rationale=words)
    if written and any(written == _as_typed(text) for text in texts):
        return [Problem("demonstration", "This is one of the completions, unchanged.")]
    if rationale and not words:
        problems.append(Problem("rationale", "Say in a few words why."))
    judged = _comparison(fields, order) if len(order) > 1 else None
    if isinstance(judged, Problem) or (judged is None and not written):
        missing = judged or Problem("demonstration", "Edit the completion, or skip the item.")
        return [missing, *problems]
    if problems:
        return problems
    if judged is None:
        return Entry(answer="demonstration", demonstration=written, rationale=words)
    answer, ranks, strength = judged
    return Entry(
        answer=answer,
        ranks=ranks,
        strength=strength,
        demonstration=written or None,
        rationale=words,
    )


def _as_typed(text: str) -> str:
    """A browser changes the ends of lines in a text field."""
    return text.replace("\r\n", "\n").replace("\r", "\n").strip()


Comparison = tuple[Answer, tuple[int, ...], float | None]


def _comparison(fields: Fields, order: str) -> Comparison | Problem | None:
    if len(order) == 2:
        return _pair(fields.get("choice", ""), order)
    return _ranking(fields, order)


def _pair(choice: str, order: str) -> Comparison | Problem:
    if choice == ALL_BAD:
        return "all_bad", (), None
    if choice == TIE:
        return "ranking", (1, 1), None
    side, _, grade = choice.partition("-")
    if side not in ORDINALS[:2] or (grade and grade not in {str(n) for n in STRENGTHS}):
        return Problem("choice", "Choose which completion is better.")
    return "ranking", _by_letter((1, 2) if side == "first" else (2, 1), order), (
        float(grade) if grade else None
    )  # fmt: skip


def _ranking(fields: Fields, order: str) -> Comparison | Problem:
    if fields.get("choice") == ALL_BAD:
        return "all_bad", (), None
    places = [fields.get(f"rank-{position}", "") for position in range(1, len(order) + 1)]
    if any(not place.isascii() or not place.isdigit() for place in places):
        return Problem("rank", "Give every completion a place.")
    given = [int(place) for place in places]
    if not all(1 <= place <= len(order) for place in given):
        return Problem("rank", f"Places go from 1 to {len(order)}.")
    # "1, 1, 4" means the same as "1, 1, 3": a place is one more than how many are better.
    ranks = tuple(1 + sum(other < place for other in given) for place in given)
    return "ranking", _by_letter(ranks, order), None


def _by_letter(shown: Sequence[int], order: str) -> tuple[int, ...]:
    return tuple(shown[order.index(letter)] for letter in LETTERS[: len(order)])


def as_shown(ranks: Sequence[int], order: str) -> tuple[int, ...]:
    """Ranks by position, from ranks by letter."""
    return tuple(ranks[LETTERS.index(letter)] for letter in order)


def fields_of(judgement: Judgement, order: str) -> dict[str, str]:
    """The form as it was when it gave this judgement."""
    fields = {"rationale": judgement.rationale, "demonstration": judgement.demonstration or ""}
    if judgement.answer == "all_bad":
        fields["choice"] = ALL_BAD
    elif judgement.answer == "ranking":
        places = as_shown(judgement.ranks, order)
        if len(order) == 2:
            fields["choice"] = _choice(places, judgement.strength)
        else:
            fields |= {f"rank-{at}": str(place) for at, place in enumerate(places, start=1)}
    elif judgement.answer in ("skip", "flag"):
        fields[f"{judgement.answer}-reason"] = judgement.reason
    return {name: value for name, value in fields.items() if value}


def _choice(places: Sequence[int], strength: float | None) -> str:
    if places[0] == places[1]:
        return TIE
    side = "first" if places[0] < places[1] else "second"
    return f"{side}-{strength:.0f}" if strength in STRENGTHS else side


def in_words(judgement: Judgement, order: str) -> str:
    """For the annotator who gave it."""
    if judgement.answer == "skip":
        return "skipped"
    if judgement.answer == "flag":
        return f"flagged: {FLAG_REASONS.get(judgement.reason, judgement.reason)}"
    if judgement.answer == "demonstration":
        return "edited"
    edited = ", and edited" if judgement.demonstration else ""
    if judgement.answer == "all_bad":
        return ("both are bad" if len(order) == 2 else "all are bad") + edited
    places = as_shown(judgement.ranks, order)
    if len(order) > 2:
        return "places " + ", ".join(map(str, places)) + edited
    if places[0] == places[1]:
        return "equally good" + edited
    side = ORDINALS[0] if places[0] < places[1] else ORDINALS[1]
    grade = STRENGTHS.get(int(judgement.strength or 0), "better")
    return f"the {side} is {grade}{edited}"
