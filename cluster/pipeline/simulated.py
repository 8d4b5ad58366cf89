"""Simulated annotators: a function of the user's that judges pairs.

    def annotate(prompt, a, b, *, seed, number, **columns):
        return "a"

``prompt`` is a text or a list of messages, ``a`` and ``b`` are the two completions as texts, and
each column of the prompt's row is there under its own name. ``seed`` (a text) is the same for every
judgement of a pair and another for each pair; ``number`` counts the judgements of the pair from 0.
It returns "a", "b", "tie" or "both_bad", or a mapping with ``choice`` and, as it likes,
``annotator``, ``strength`` and ``duration_s``.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Mapping
from typing import Any

from cluster.contracts.chat import is_text
from cluster.contracts.errors import UserError
from reward_service.preferences.records import PAIR_RANKS, Item, Judgement, derived_id
from reward_service.sources.function import user_function

WHERE = "label.annotate"
CHOICES = (*PAIR_RANKS, "both_bad")
KEYS = ("choice", "annotator", "strength", "duration_s")
CONSENT = "simulated"


class Annotate:
    """The function. Raises UserError for a file or a name that is not there, and for what the
    function raises or returns."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._function: Callable[..., Any] = user_function(path, WHERE)
        takes = inspect.signature(self._function).parameters
        self._takes = None if any(p.kind is p.VAR_KEYWORD for p in takes.values()) else set(takes)

    def __call__(self, item: Item, columns: Mapping[str, Any], seed: str, number: int) -> Any:
        """What it says of the item, as a mapping with ``choice``."""
        given = {**columns, "seed": seed, "number": number}
        if self._takes is not None:
            given = {key: value for key, value in given.items() if key in self._takes}
        prompt: Any = [dict(message) for message in item.messages]
        if is_text(item.messages):
            prompt = item.messages[0]["content"]
        try:
            said = self._function(prompt, *(c.text for c in item.completions), **given)
        except Exception as problem:
            raise self._wrong(f"raised {type(problem).__name__}: {problem}", prompt) from problem
        return self._checked(said, prompt)

    def _checked(self, said: Any, prompt: Any) -> dict[str, Any]:
        found = dict(said) if isinstance(said, Mapping) else {"choice": said}
        if found.get("choice") not in CHOICES or not set(found) <= set(KEYS):
            raise self._wrong(f"returned {said!r}", prompt)
        return found

    def _wrong(self, what: str, prompt: Any) -> UserError:
        return UserError(
            f"{self._path} {what} (prompt: {str(prompt)[:80]!r})",
            where=WHERE,
            fix=f"return one of {', '.join(CHOICES)}, or a mapping with the keys {', '.join(KEYS)}",
        )


def simulated_judgements(
    annotate: Annotate,
    item: Item,
    columns: Mapping[str, Any],
    seed: int,
    overlap: int,
    created_at: str,
) -> list[Judgement]:
    """As many as the item asks for, and at least ``overlap``; each of another annotator."""
    wanted = max(overlap, item.chosen_by.judgements if item.chosen_by is not None else 1)
    own = f"{seed}/{item.id}"
    order = random.Random(own)
    found: dict[str, Judgement] = {}
    for number in range(wanted):
        said = annotate(item, columns, own, number)
        name = str(said.get("annotator", f"simulated-{number + 1}"))
        choice = said["choice"]
        found[name] = Judgement(
            id=derived_id(item.id, name),
            item_id=item.id,
            annotator_id=name,
            answer="all_bad" if choice == "both_bad" else "ranking",
            ranks=PAIR_RANKS.get(choice, ()),
            source="simulated",
            strength=said.get("strength"),
            duration_s=said.get("duration_s"),
            shown_order=order.choice(("ab", "ba")),
            consent=CONSENT,
            guideline_version=CONSENT,
            created_at=created_at,
        )
    return list(found.values())
