"""The preference store: items to judge, and judgements that are only ever added.

Who may judge, leases, guidelines and drafts are in ``labelling``; deleting is in ``forget``.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from cluster.contracts.errors import UserError
from cluster.contracts.records import PreferencePair
from reward_service.preferences.database import BUSY_TIMEOUT_S, Database
from reward_service.preferences.encoding import (
    ITEM_COLUMNS,
    JUDGEMENT_COLUMNS,
    item_from,
    item_row,
    judgement_from,
    judgement_row,
)
from reward_service.preferences.records import (
    Item,
    Judgement,
    check_ranks,
    choice_of,
    preferred_pairs,
)

CURRENT = "NOT EXISTS (SELECT 1 FROM judgements later WHERE later.supersedes = judgements.id)"
IN_FORCE = f"{CURRENT} AND judgements.answer <> 'withdrawn'"


class PreferenceStore:
    """Thread-safe, and safe with several processes. Raises UserError for a file that is not a
    preference store, is damaged or cannot be written, and when the disk is full; then nothing of
    the call is stored."""

    def __init__(self, path: str | Path, busy_timeout_s: float = BUSY_TIMEOUT_S) -> None:
        self.database = Database(path, busy_timeout_s)
        self.path = self.database.path

    # -- writing -----------------------------------------------------------------------------------

    def add_items(self, items: Iterable[Item]) -> int:
        """How many were new. An id that is there with other content is a UserError, and then
        nothing of this call is stored."""
        return self.add(items, [])[0]

    def add(self, items: Iterable[Item], judgements: Iterable[Judgement]) -> tuple[int, int]:
        """``add_items`` and ``add_judgement`` of each in one transaction; how many were new."""
        with self.database.writing() as db:
            new = sum(self._add(db, "items", ITEM_COLUMNS, item_row(item)) for item in items)
            return new, sum(self.write_judgement(db, entry) for entry in judgements)

    def add_judgement(self, judgement: Judgement) -> bool:
        """False when this very judgement is there already (a page that lost its connection
        repeats).

        Raises UserError: unknown item; ranks or order that do not fit the item; the annotator
        judged the item before and ``supersedes`` does not name that judgement; ``supersedes`` names
        another's judgement or one already superseded.
        """
        with self.database.writing() as db:
            return self.write_judgement(db, judgement)

    def write_judgement(self, db: sqlite3.Connection, judgement: Judgement) -> bool:
        """``add_judgement`` within the caller's transaction."""
        known = db.execute("SELECT 1 FROM judgements WHERE id = ?", (judgement.id,)).fetchone()
        if known is None:
            self._check(db, judgement)
        return self._add(db, "judgements", JUDGEMENT_COLUMNS, judgement_row(judgement))

    def _check(self, db: sqlite3.Connection, judgement: Judgement) -> None:
        where, who = self.database.where, judgement.annotator_id
        row = db.execute("SELECT * FROM items WHERE id = ?", (judgement.item_id,)).fetchone()
        if row is None:
            raise UserError(f"there is no item {judgement.item_id!r}", where=where)
        self._check_fits(judgement, len(item_from(row).completions))
        query = f"SELECT id FROM judgements WHERE item_id = ? AND annotator_id = ? AND {CURRENT}"
        row = db.execute(query, (judgement.item_id, who)).fetchone()
        current = row["id"] if row is not None else None
        if current == judgement.supersedes:
            return
        if judgement.supersedes is None:
            raise UserError(
                f"{who!r} judged item {judgement.item_id!r} before (as {current!r})",
                where=where,
                fix="to change an answer, add a judgement that supersedes that one",
            )
        raise UserError(
            f"{judgement.supersedes!r} is not the current judgement of {who!r} for item "
            f"{judgement.item_id!r} (that is {current!r})",
            where=where,
            fix="supersede the annotator's own, newest judgement",
        )

    def _check_fits(self, judgement: Judgement, completions: int) -> None:
        try:
            if judgement.ranks:
                check_ranks(judgement.ranks, completions)
            if judgement.shown_order and len(judgement.shown_order) != completions:
                raise ValueError(
                    f"shown_order {judgement.shown_order!r} for {completions} completions"
                )
        except ValueError as problem:
            raise UserError(
                f"judgement {judgement.id!r} of item {judgement.item_id!r}: {problem}",
                where=self.database.where,
            ) from None

    def _add(
        self, db: sqlite3.Connection, table: str, columns: Sequence[str], row: Sequence[Any]
    ) -> bool:
        names = ", ".join(columns)
        known = db.execute(f"SELECT {names} FROM {table} WHERE id = ?", (row[0],)).fetchone()
        if known is None:
            marks = ", ".join("?" * len(columns))
            db.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", tuple(row))
            return True
        if tuple(known) != tuple(row):
            differ = [c for c, a, b in zip(columns, known, row, strict=True) if a != b]
            raise UserError(
                f"id {row[0]!r} is in {table} already, with another {', '.join(differ)}",
                where=self.database.where,
                fix="give new content a new id",
            )
        return False

    # -- reading -----------------------------------------------------------------------------------

    def items(self) -> list[Item]:
        """In the order they were added."""
        return self._read("SELECT * FROM items ORDER BY seq", item_from)

    def item(self, item_id: str) -> Item | None:
        found = self._read("SELECT * FROM items WHERE id = ?", item_from, item_id)
        return found[0] if found else None

    def judgements(self, *, history: bool = False) -> list[Judgement]:
        """Those in force, in the order they were added, skips and flags included; ``history``: also
        those that were superseded or withdrawn."""
        where = "" if history else f"WHERE {IN_FORCE}"
        return self._read(f"SELECT * FROM judgements {where} ORDER BY seq", judgement_from)

    def judgement(self, judgement_id: str) -> Judgement | None:
        query = "SELECT * FROM judgements WHERE id = ?"
        found = self._read(query, judgement_from, judgement_id)
        return found[0] if found else None

    def _read(self, query: str, make: Callable[[sqlite3.Row], Any], *values: Any) -> list[Any]:
        with self.database.reading() as db:
            return [make(row) for row in db.execute(query, values)]

    def judged(self) -> list[tuple[Item, Judgement]]:
        """Every judgement in force with its item, of one moment."""
        with self.database.reading() as db:
            items = {row["id"]: item_from(row) for row in db.execute("SELECT * FROM items")}
            query = f"SELECT * FROM judgements WHERE {IN_FORCE} ORDER BY seq"
            return [(items[row["item_id"]], judgement_from(row)) for row in db.execute(query)]

    def pairs(self) -> list[PreferencePair]:
        """Every two completions of which a judgement in force prefers one; ties and "both bad" are
        left out. Judgements of several annotators on one item stay several pairs."""
        return [
            PreferencePair(
                id=judgement.id,
                messages=item.messages,
                chosen=item.completions[better].text,
                rejected=item.completions[worse].text,
                margin=judgement.strength,
                annotator=judgement.annotator_id,
                source=item.source,
                consent=judgement.consent,
                created_at=judgement.created_at,
            )
            for item, judgement in self.judged()
            for better, worse in preferred_pairs(judgement.ranks)
        ]

    def stats(self) -> dict[str, Any]:
        """Counts: items, items without a label, prompts, labels in force, superseded or withdrawn
        records, each choice, annotators with their labels, pairs (what ``pairs`` gives),
        demonstrations, skips and flags."""
        judged = self.judgements()
        labels = [entry for entry in judged if entry.is_label]
        items, prompts, records = self._counts()
        choices = Counter(_counted_as(entry) for entry in labels)
        answers = Counter(entry.answer for entry in judged)
        return {
            "items": items,
            "prompts": prompts,
            "unlabelled": items - len({entry.item_id for entry in labels}),
            "labels": len(labels),
            "superseded": records - len(judged),
            "pairs": sum(len(preferred_pairs(entry.ranks)) for entry in labels),
            "choices": {name: choices[name] for name in ("a", "b", "tie", "both_bad")},
            "rankings": choices["ranking"],
            "demonstrations": sum(entry.demonstration is not None for entry in labels),
            "skips": answers["skip"],
            "flags": answers["flag"],
            "annotators": dict(sorted(Counter(entry.annotator_id for entry in labels).items())),
        }

    def _counts(self) -> tuple[int, int, int]:
        with self.database.reading() as db:
            items, prompts = db.execute(
                "SELECT COUNT(*), COUNT(DISTINCT prompt_hash) FROM items"
            ).fetchone()
            return items, prompts, db.execute("SELECT COUNT(*) FROM judgements").fetchone()[0]


def _counted_as(judgement: Judgement) -> str:
    if judgement.answer == "ranking":
        return choice_of(judgement.ranks) if len(judgement.ranks) == 2 else "ranking"
    return "both_bad" if judgement.answer == "all_bad" else judgement.answer
