"""What the pages do for an annotator: hand out items, take judgements and drafts, take back.

Every request may come twice, late, or after a restart of the server. So a judgement's id follows
from who judges what and which judgement it replaces, and nothing is kept in this process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

from cluster.contracts.errors import UserError
from cluster.pages.labelling.forms import (
    Entry,
    Problem,
    fields_of,
    in_words,
    read_entry,
    shown_order,
)
from reward_service.preferences.labelling import Labelling, LeaseLost
from reward_service.preferences.people import Document, People
from reward_service.preferences.records import (
    LETTERS,
    Item,
    Judgement,
    derived_id,
    withdrawal,
)

LONGEST_DRAFT = 200_000  # characters, of all fields together
KEPT_FIELDS = (
    "choice", "rank-1", "rank-2", "rank-3", "rank-4", "rationale", "demonstration", "skip-reason",
    "flag-reason", "began",
)  # fmt: skip
DAY_S = 86_400.0
TAKEN = "This item went to somebody else, as it was not submitted in time."


class Gone(Exception):
    """An item that this annotator cannot label now. The text says why."""


class Conflict(Exception):
    """The annotator has labelled the item in the meantime, in another tab."""


class LiveSource(Protocol):
    """Adds items while people label."""

    def status(self) -> str:
        """One sentence for the pages."""

    def ask(self) -> None:
        """Somebody has nothing left to label."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The texts in force, and what a label needs."""

    guideline: Document
    consent: Document
    warning: Document
    strength: bool = True
    rationale: bool = False
    gold_every: int = 10

    @property
    def to_accept(self) -> tuple[str, ...]:
        """What an annotator accepts before the first item, and again when a text has changed."""
        kinds = (self.consent, self.guideline, self.warning)
        return tuple(f"{document.kind} {document.version}" for document in kinds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """An item as one annotator sees it. ``texts``: its completions in the order shown.
    ``earlier``: the annotator's judgement of it, which a new one replaces."""

    item: Item
    order: str
    fields: Mapping[str, str] = field(default_factory=dict)
    earlier: Judgement | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(self.item.completions[LETTERS.index(letter)].text for letter in self.order)


class Desk:
    """Thread-safe."""

    def __init__(self, labelling: Labelling, people: People, rules: Rules) -> None:
        self.labelling = labelling
        self.people = people
        self.rules = rules
        self.live: LiveSource | None = None
        self._clock: Callable[[], float] = labelling.clock

    # -- before the first item ---------------------------------------------------------------------

    def has_accepted(self, who: str) -> bool:
        return all(self.people.has_agreed(who, text) for text in self.rules.to_accept)

    def accept(self, who: str) -> None:
        for text in self.rules.to_accept:
            self.people.agree(who, text)

    # -- items -------------------------------------------------------------------------------------

    def next_item(self, who: str) -> Item | None:
        """The item that ``who`` has now, else the next one. Every ``gold_every``-th is a gold item,
        as long as there are any."""
        recent = self.labelling.history(who, self.rules.gold_every - 1)
        due = len(recent) == self.rules.gold_every - 1
        due = due and all(item.gold is None for item, _ in recent)
        return self.labelling.next_item(who, gold=due) or self.labelling.next_item(
            who, gold=not due
        )

    def open(self, who: str, item_id: str) -> Task:
        """Raises Gone where the item is not there or others have it."""
        item = self.labelling.store.item(item_id)
        if item is None:
            raise Gone("There is no such item. It may have been removed.")
        earlier = self.labelling.current(who, item_id)
        if (earlier is None or earlier.answer == "withdrawn") and not self.labelling.reserve(
            who, item_id
        ):
            raise Gone(TAKEN)
        order = shown_order(item_id, who, len(item.completions))
        saved = self.labelling.draft(who, item_id)
        if saved is None and earlier is not None and earlier.answer != "withdrawn":
            saved = fields_of(earlier, order)
        fields = {"began": f"{self._clock():.0f}", **(saved or {})}
        return Task(item=item, order=order, fields=fields, earlier=earlier)

    def save_draft(self, who: str, item_id: str, form: Mapping[str, str]) -> None:
        fields = {name: form[name] for name in KEPT_FIELDS if form.get(name)}
        if sum(map(len, fields.values())) > LONGEST_DRAFT:
            raise Gone(f"This is too long to be kept: over {LONGEST_DRAFT:,} characters.")
        if self.labelling.store.item(item_id) is None:
            raise Gone("There is no such item. It may have been removed.")
        self.labelling.save_draft(who, item_id, fields)

    # -- judgements --------------------------------------------------------------------------------

    def submit(self, who: str, item_id: str, action: str, form: Mapping[str, str]) -> list[Problem]:
        """Empty when the judgement is on disk, also when it was there already. Raises Gone or
        Conflict where it cannot be taken; then the draft is kept."""
        item = self.labelling.store.item(item_id)
        if item is None:
            raise Gone("There is no such item. It may have been removed.")
        order = shown_order(item_id, who, len(item.completions))
        task = Task(item=item, order=order)
        entry = read_entry(action, form, order, task.texts, rationale=self.rules.rationale)
        if not isinstance(entry, Entry):
            return entry
        judgement = self._judgement(who, task, entry, form)
        try:
            self.labelling.submit(judgement)
        except LeaseLost:
            raise Gone(TAKEN) from None
        except UserError:
            if self._is_there(judgement):  # sent again after the guideline has changed
                return []
            current = self.labelling.current(who, item_id)
            if (current.id if current else None) != judgement.supersedes:
                raise Conflict from None
            raise
        return []

    def _is_there(self, judgement: Judgement) -> bool:
        """Whether this very judgement is stored. Raises Conflict where another stands in its
        place, which came from another tab."""
        found = self.labelling.store.judgement(judgement.id)
        if found is not None and _content(found) != _content(judgement):
            raise Conflict
        return found is not None

    def _judgement(self, who: str, task: Task, entry: Entry, form: Mapping[str, str]) -> Judgement:
        replaced = form.get("supersedes") or None
        return Judgement(
            id=derived_id("label", who, task.item.id, replaced),
            item_id=task.item.id,
            annotator_id=who,
            answer=entry.answer,
            ranks=entry.ranks,
            strength=entry.strength if self.rules.strength else None,
            demonstration=entry.demonstration,
            reason=entry.reason,
            rationale=entry.rationale,
            shown_order=task.order,
            duration_s=self._seconds_since(form.get("began", "")),
            guideline_version=self.rules.guideline.version,
            guideline_sha256=self.rules.guideline.sha256,
            consent=self.rules.consent.version,
            created_at=self._now(),
            supersedes=replaced,
        )

    def undo(self, who: str, judgement_id: str) -> str | None:
        """Take back ``who``'s own judgement; returns its item, which is open again with what was
        entered. None where it is not the current one any more."""
        found = self.labelling.store.judgement(judgement_id)
        if found is None or found.annotator_id != who:
            return None
        current = self.labelling.current(who, found.item_id)
        if current is not None and current.id == judgement_id:
            order = found.shown_order
            self.labelling.save_draft(who, found.item_id, fields_of(found, order))
            new_id = derived_id("undo", judgement_id)
            self.labelling.store.add_judgement(withdrawal(found, new_id, self._now()))
        return found.item_id

    def put_back(self, judgement_id: str, admin: str) -> bool:
        """An admin takes back a skip or a flag. False where it is not in force any more."""
        new_id = derived_id("put back", judgement_id)
        return self.labelling.put_back(judgement_id, admin, new_id, self._now())

    def last(self, who: str) -> tuple[Judgement, str] | None:
        """The newest judgement, and what it says."""
        recent = self.labelling.history(who, 1)
        return next(((one, in_words(one, one.shown_order)) for _, one in recent), None)

    # -- time --------------------------------------------------------------------------------------

    def _now(self) -> str:
        return datetime.fromtimestamp(self._clock(), UTC).replace(microsecond=0).isoformat()

    def _seconds_since(self, began: str) -> float | None:
        try:
            seconds = self._clock() - float(began)
        except ValueError:
            return None
        return round(seconds, 1) if math.isfinite(seconds) and 0 <= seconds <= DAY_S else None


def _content(judgement: Judgement) -> tuple[Any, ...]:
    """What the annotator said, without when."""
    return (
        judgement.answer,
        judgement.ranks,
        judgement.strength,
        judgement.demonstration,
        judgement.reason,
        judgement.rationale,
    )
