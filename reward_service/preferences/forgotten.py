"""What a store was told to forget must not come back with the next import of the same file.

The store keeps a salted SHA-256 of each id that was forgotten, and no content. The salt is the
store's own, so that hashes of two stores cannot be compared.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from reward_service.preferences.records import Item, Judgement, prompt_hash
from reward_service.preferences.store import PreferenceStore

What = Literal["annotator", "judgement", "item", "prompt"]
UNNAMED = "unknown-"  # annotators of rows that name none: every file has an unknown-0
_PAIR_OF_RANKING = re.compile(
    r"/[a-d]>?[a-d]$"
)  # what an export adds to the id of a longer ranking


@dataclass(frozen=True, slots=True)
class Forgotten:
    """Asks whether an import would bring something back."""

    salt: str
    hashes: frozenset[str]

    @staticmethod
    def of(store: PreferenceStore) -> Forgotten:
        with store.database.reading() as db:
            row = db.execute("SELECT salt FROM forgotten_salt").fetchone()
            hashes = frozenset(row["hash"] for row in db.execute("SELECT hash FROM forgotten"))
        return Forgotten("" if row is None else row["salt"], hashes)

    def item(self, item: Item) -> bool:
        return (
            self._has("item", item.id)
            or self._has("item", _PAIR_OF_RANKING.sub("", item.id))
            or self._has("prompt", prompt_hash(item.messages))
        )

    def judgement(self, entry: Judgement) -> bool:
        return (
            self._has("annotator", entry.annotator_id)
            or self._has("judgement", entry.id)
            or self._has("judgement", _PAIR_OF_RANKING.sub("", entry.id))
        )

    def _has(self, what: What, name: str) -> bool:
        return bool(self.hashes) and salted(self.salt, what, name) in self.hashes


def salted(salt: str, what: What, name: str) -> str:
    return hashlib.sha256(f"{salt}\0{what}\0{name}".encode()).hexdigest()


def remember(db: sqlite3.Connection, what: What, names: Iterable[str]) -> None:
    """Within the transaction that deletes the records."""
    row = db.execute("SELECT salt FROM forgotten_salt").fetchone()
    if row is None:
        db.execute("INSERT INTO forgotten_salt VALUES (?)", (secrets.token_hex(16),))
        row = db.execute("SELECT salt FROM forgotten_salt").fetchone()
    hashes = [(salted(row["salt"], what, name),) for name in names]
    db.executemany("INSERT OR IGNORE INTO forgotten VALUES (?)", hashes)
