"""Which item is being labelled by whom: leases, drafts, submitting, an annotator's history."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from cluster.contracts.errors import UserError
from reward_service.preferences.encoding import item_from, json_text, judgement_from
from reward_service.preferences.records import Item, Judgement, text_hash, withdrawal
from reward_service.preferences.store import CURRENT, IN_FORCE, PreferenceStore

LEASE_S = 15 * 60.0


class LeaseLost(UserError):
    """The annotator was away for so long that others have judged the item meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """``done``: items with as many labels as are wanted. ``leased``: items somebody has now."""

    items: int
    done: int
    leased: int


# How many annotators label an item: more than the overlap where it was chosen for more.
_WANTED = """
  max(wanted(items.id), coalesce(json_extract(items.chosen_by, '$.judgements'), 1))
"""
_LABELS = f"{IN_FORCE} AND answer IN ('ranking', 'all_bad', 'demonstration')"
# Others than :who have labelled or reserved the item as often as it is wanted. Control items (gold)
# are for everybody.
_TAKEN = f"""
  items.gold IS NULL AND {_WANTED} <= (SELECT COUNT(*) FROM (
    SELECT annotator_id FROM judgements
      WHERE judgements.item_id = items.id AND annotator_id <> :who AND {_LABELS}
    UNION SELECT annotator_id FROM leases
      WHERE leases.item_id = items.id AND annotator_id <> :who AND expires_at > :now))
"""
_ANSWERED = f"""
  EXISTS (SELECT 1 FROM judgements
    WHERE judgements.item_id = items.id AND annotator_id = :who AND {IN_FORCE})
"""
_HELD = """
  EXISTS (SELECT 1 FROM leases
    WHERE leases.item_id = items.id AND annotator_id = :who AND expires_at > :now)
"""


def share_place(item_id: str) -> float:
    """A number from 0 to 1 that follows from the id alone."""
    return int(text_hash(f"overlap {item_id}")[:12], 16) / 16**12


class Labelling:
    """The part of the store that a labelling page uses. Thread-safe, several processes may use
    it."""

    def __init__(
        self,
        store: PreferenceStore,
        *,
        overlap: int = 1,
        overlap_share: float = 1.0,
        lease_s: float = LEASE_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """``overlap``: how many annotators label an item; of a share ``overlap_share`` of the
        items, the others are labelled by one. ``chosen_by.judgements`` of an item may ask for more.
        ``lease_s``: seconds for which an item is reserved for who was given it."""
        self.store = store
        self.overlap = overlap
        self.overlap_share = overlap_share
        self.lease_s = lease_s
        self.clock = clock

    def wanted(self, item_id: str) -> int:
        """How many annotators label the item. Which items belong to the share follows from a hash
        of their ids, so that it is the same in every process and for every annotator."""
        if self.overlap == 1 or self.overlap_share == 1:
            return self.overlap
        return self.overlap if share_place(item_id) < self.overlap_share else 1

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self.store.database.writing() as db:
            db.create_function("wanted", 1, self.wanted, deterministic=True)
            yield db

    def prioritise(self, priorities: Mapping[str, float]) -> None:
        """Item id -> priority. Items with a higher one are given out first; without one it is 0."""
        with self.store.database.writing() as db:
            db.executemany(
                "INSERT INTO priorities VALUES (?, ?) "
                "ON CONFLICT (item_id) DO UPDATE SET priority = excluded.priority",
                list(priorities.items()),
            )

    def next_item(self, annotator_id: str, *, gold: bool | None = None) -> Item | None:
        """The item that the annotator has now, else the next free one, reserved for ``lease_s``
        seconds; None when nothing is left for this annotator. No item is reserved for more than
        ``wanted`` annotators, less those who have labelled it. ``gold``: of the free ones only
        control items, or none of them; None: any."""
        values = {**self._values(annotator_id), "gold": gold}
        with self._writing() as db:
            row = db.execute(
                "SELECT items.* FROM items LEFT JOIN priorities ON priorities.item_id = items.id "
                f"WHERE NOT ({_ANSWERED}) AND NOT ({_TAKEN}) "
                f"AND (:gold IS NULL OR {_HELD} OR (items.gold IS NOT NULL) = :gold) "
                f"ORDER BY {_HELD} DESC, coalesce(priority, 0) DESC, items.seq LIMIT 1",
                values,
            ).fetchone()
            if row is None:
                return None
            self._lease(db, row["id"], annotator_id)
            return item_from(row)

    def reserve(self, annotator_id: str, item_id: str) -> bool:
        """As ``next_item``, for one item: a page that was opened again, or a label taken back.
        False where others have the item, or the annotator has judged it."""
        values = {**self._values(annotator_id), "item": item_id}
        with self._writing() as db:
            free = f"NOT ({_ANSWERED}) AND NOT ({_TAKEN})"
            row = db.execute(f"SELECT id FROM items WHERE id = :item AND {free}", values).fetchone()
            if row is not None:
                self._lease(db, item_id, annotator_id)
        return row is not None

    def _lease(self, db: sqlite3.Connection, item_id: str, annotator_id: str) -> None:
        db.execute(
            "INSERT INTO leases VALUES (?, ?, ?) ON CONFLICT (item_id, annotator_id) "
            "DO UPDATE SET expires_at = excluded.expires_at",
            (item_id, annotator_id, self.clock() + self.lease_s),
        )

    def submit(self, judgement: Judgement) -> bool:
        """Store a judgement, and end its lease and draft, in one transaction. False when this very
        judgement is there already (a page that lost its connection repeats). When the lease has run
        out, the judgement still counts unless others have taken the item: then LeaseLost. Raises
        what ``add_judgement`` raises."""
        key = {"item": judgement.item_id, **self._values(judgement.annotator_id)}
        with self._writing() as db:
            query = "SELECT * FROM judgements WHERE id = ?"
            known = db.execute(query, (judgement.id,)).fetchone()
            if known is not None:  # sent again: a later clock does not make it another answer
                first = judgement_from(known)
                judgement = replace(
                    judgement, created_at=first.created_at, duration_s=first.duration_s
                )
            elif judgement.is_label:
                self._require_lease(db, key)
            new = self.store.write_judgement(db, judgement)
            for table in ("leases", "drafts"):
                db.execute(
                    f"DELETE FROM {table} WHERE item_id = :item AND annotator_id = :who", key
                )
            return new

    def _require_lease(self, db: sqlite3.Connection, key: Mapping[str, Any]) -> None:
        """Nothing to require where the annotator corrects an answer of their own."""
        lost = f"NOT ({_HELD}) AND NOT ({_ANSWERED}) AND {_TAKEN}"
        if db.execute(f"SELECT 1 FROM items WHERE id = :item AND {lost}", key).fetchone():
            raise LeaseLost(
                f"item {key['item']!r} was given to others, as it was not answered in time",
                fix="go on with the next item",
            )

    def save_draft(self, annotator_id: str, item_id: str, content: Mapping[str, Any]) -> None:
        """Keep what is not submitted yet; it goes when the judgement comes."""
        with self.store.database.writing() as db:
            db.execute(
                "INSERT INTO drafts VALUES (?, ?, ?, ?) ON CONFLICT (item_id, annotator_id) "
                "DO UPDATE SET content = excluded.content, saved_at = excluded.saved_at",
                (item_id, annotator_id, json_text(dict(content)), self.clock()),
            )

    def draft(self, annotator_id: str, item_id: str) -> dict[str, Any] | None:
        query = "SELECT content FROM drafts WHERE item_id = ? AND annotator_id = ?"
        row = self._one(query, item_id, annotator_id)
        return None if row is None else json.loads(row["content"])

    def history(self, annotator_id: str, limit: int = 100) -> list[tuple[Item, Judgement]]:
        """The annotator's current answers, newest first, those taken back left out."""
        with self.store.database.reading() as db:
            query = f"SELECT * FROM judgements WHERE annotator_id = ? AND {IN_FORCE} "
            rows = db.execute(f"{query} ORDER BY seq DESC LIMIT ?", (annotator_id, limit))
            found = [judgement_from(row) for row in rows]
            item = "SELECT * FROM items WHERE id = ?"
            return [
                (item_from(db.execute(item, (entry.item_id,)).fetchone()), entry) for entry in found
            ]

    def current(self, annotator_id: str, item_id: str) -> Judgement | None:
        """The annotator's newest record of an item, a withdrawal included: what the next judgement
        of the item has to supersede."""
        query = f"SELECT * FROM judgements WHERE annotator_id = ? AND item_id = ? AND {CURRENT}"
        row = self._one(query, annotator_id, item_id)
        return None if row is None else judgement_from(row)

    def put_back(self, judgement_id: str, admin: str, new_id: str, now: str) -> bool:
        """An admin takes back somebody's skip or flag: the item is to be labelled again, also by
        that annotator. The record of both stays. False where it is not in force any more."""
        found = self.store.judgement(judgement_id)
        if found is None or found.answer not in ("skip", "flag"):
            return False
        current = self.current(found.annotator_id, found.item_id)
        if current is None or current.id != judgement_id:
            return False
        taken_back = withdrawal(found, new_id, now)
        return self.store.add_judgement(replace(taken_back, rationale=f"put back by {admin}"))

    def progress(self) -> Progress:
        query = f"""
          SELECT (SELECT COUNT(*) FROM items),
            (SELECT COUNT(*) FROM items WHERE {_WANTED} <= (SELECT COUNT(*) FROM judgements
              WHERE judgements.item_id = items.id AND {_LABELS})),
            (SELECT COUNT(DISTINCT item_id) FROM leases WHERE expires_at > ?)
        """
        with self.store.database.reading() as db:
            db.create_function("wanted", 1, self.wanted, deterministic=True)
            items, done, leased = db.execute(query, (self.clock(),)).fetchone()
        return Progress(items=items, done=done, leased=leased)

    def _values(self, annotator_id: str) -> dict[str, Any]:
        return {"who": annotator_id, "now": self.clock()}

    def _one(self, query: str, *values: Any) -> Any:
        with self.store.database.reading() as db:
            return db.execute(query, values).fetchone()
