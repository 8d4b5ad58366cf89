"""Forgetting a person, a record or a prompt: the only way in which a store loses anything.

The records are deleted and overwritten in the file. A tombstone stays: when, what kind, how many
records, and which snapshots and models had learnt from them, but nothing of their content and no
pseudonym. Salted hashes of their ids stay as well, so that no import brings them back. Snapshots
never change, so the user is told which to delete.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.contracts.errors import UserError
from reward_service.preferences.forgotten import UNNAMED, remember
from reward_service.preferences.records import prompt_hash, utc_now
from reward_service.preferences.store import PreferenceStore
from reward_service.preferences.trained_models import models_trained_on

Kind = Literal["annotator", "record", "prompt"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotUse:
    """A snapshot that holds records which were forgotten. ``path`` is where it was written."""

    sha256: str
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tombstone:
    """``items`` and ``judgements``: how many records went, superseded ones included. ``models``:
    run directories of what was trained on ``snapshots``, directly or through other runs."""

    created_at: str
    kind: Kind
    items: int
    judgements: int
    snapshots: tuple[SnapshotUse, ...]
    models: tuple[str, ...]


def forget(store: PreferenceStore, kind: Kind, which: str, runs: Sequence[Path] = ()) -> Tombstone:
    """Delete the judgements of an annotator; one record (the id of an item or of a judgement); or a
    prompt (its text or its hash) with its items. ``runs``: folders of run directories in which to
    look for models.

    All revisions of a judgement go together. Raises UserError where there is nothing to forget.
    """
    with store.database.writing() as db:
        items, judgements = _which(db, kind, which)
        known = (
            kind == "annotator"
            and db.execute("SELECT 1 FROM annotators WHERE id = ?", (which,)).fetchone()
        )
        if not (items or judgements or known):
            raise UserError(
                f"there is no {kind} {which[:60]!r}",
                where=store.database.where,
                fix="`accord preferences stats` lists annotators; exports name records",
            )
        _remember(db, kind, which, items, judgements)
        snapshots = _snapshots(db, judgements)
        stone = Tombstone(
            created_at=utc_now(),
            kind=kind,
            items=len(items),
            judgements=len(judgements),
            snapshots=snapshots,
            models=tuple(models_trained_on([s.sha256 for s in snapshots], runs)),
        )
        _delete(db, items, judgements, which if kind == "annotator" else None)
        _write(db, stone)
    store.database.shrink()
    return stone


def _remember(
    db: sqlite3.Connection,
    kind: Kind,
    which: str,
    items: Sequence[str],
    judgements: Sequence[str],
) -> None:
    """Hashes of what is about to go, for imports to refuse."""
    if kind == "annotator" and not which.startswith(UNNAMED):
        remember(db, "annotator", [which])
    if kind == "prompt":
        query = "SELECT prompt_hash FROM items WHERE id = ?"
        hashes = [db.execute(query, (name,)).fetchone()["prompt_hash"] for name in items]
        remember(db, "prompt", hashes)
    remember(db, "item", items)
    remember(db, "judgement", judgements)


def tombstones(store: PreferenceStore) -> list[Tombstone]:
    with store.database.reading() as db:
        rows = db.execute("SELECT * FROM tombstones ORDER BY seq").fetchall()
    return [
        Tombstone(
            created_at=row["created_at"],
            kind=row["kind"],
            items=row["items"],
            judgements=row["judgements"],
            snapshots=tuple(SnapshotUse(**use) for use in json.loads(row["snapshots"])),
            models=tuple(json.loads(row["models"])),
        )
        for row in rows
    ]


def _which(db: sqlite3.Connection, kind: Kind, which: str) -> tuple[list[str], list[str]]:
    """Ids of the items and judgements that are to go."""
    if kind == "annotator":
        return [], _ids(db, "SELECT id FROM judgements WHERE annotator_id = ?", which)
    if kind == "prompt":
        hashes = {which, prompt_hash([{"role": "user", "content": which}])}
        hashes.add(prompt_hash([{"role": "text", "content": which}]))
        items = [
            name
            for value in sorted(hashes)
            for name in _ids(db, "SELECT id FROM items WHERE prompt_hash = ?", value)
        ]
    else:
        items = _ids(db, "SELECT id FROM items WHERE id = ?", which)
        row = db.execute(
            "SELECT item_id, annotator_id FROM judgements WHERE id = ?", (which,)
        ).fetchone()
        if row is not None and not items:
            query = "SELECT id FROM judgements WHERE item_id = ? AND annotator_id = ?"
            return [], _ids(db, query, row["item_id"], row["annotator_id"])
    query = "SELECT id FROM judgements WHERE item_id = ?"
    return items, [name for item in items for name in _ids(db, query, item)]


def _ids(db: sqlite3.Connection, query: str, *values: str) -> list[str]:
    return [row["id"] for row in db.execute(query, values)]


def _snapshots(db: sqlite3.Connection, judgements: Sequence[str]) -> tuple[SnapshotUse, ...]:
    query = (
        "SELECT sha256, path FROM snapshots JOIN snapshot_judgements ON snapshot = sha256 "
        "WHERE judgement_id = ?"
    )
    found = {
        (row["sha256"], row["path"]) for name in judgements for row in db.execute(query, (name,))
    }
    return tuple(SnapshotUse(sha256=sha256, path=path) for sha256, path in sorted(found))


def _delete(
    db: sqlite3.Connection, items: Sequence[str], judgements: Sequence[str], annotator: str | None
) -> None:
    db.execute("INSERT INTO forgetting VALUES (1)")
    db.execute("PRAGMA defer_foreign_keys = ON")  # revisions name one another
    db.executemany("DELETE FROM judgements WHERE id = ?", [(name,) for name in judgements])
    db.executemany("DELETE FROM items WHERE id = ?", [(name,) for name in items])
    if annotator is not None:
        for table in ("leases", "drafts"):
            db.execute(f"DELETE FROM {table} WHERE annotator_id = ?", (annotator,))
        db.execute("UPDATE invites SET annotator_id = NULL WHERE annotator_id = ?", (annotator,))
        db.execute("DELETE FROM annotators WHERE id = ?", (annotator,))
    db.execute("DELETE FROM forgetting")


def _write(db: sqlite3.Connection, stone: Tombstone) -> None:
    entry: dict[str, Any] = asdict(stone)
    db.execute(
        "INSERT INTO tombstones (created_at, kind, items, judgements, snapshots, models) "
        "VALUES (:created_at, :kind, :items, :judgements, :snapshots, :models)",
        {
            **entry,
            "snapshots": json.dumps(entry["snapshots"]),
            "models": json.dumps(entry["models"]),
        },
    )
