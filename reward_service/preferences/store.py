"""Human preferences in one SQLite file: items to compare, and labels that are only ever added.

Several processes may write at once (WAL, one writer at a time, the others wait). Not for network
file systems, where WAL does not work.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from cluster.contracts.errors import UserError
from cluster.contracts.records import PreferencePair
from reward_service.preferences.labels import PreferenceItem, PreferenceLabel, prompt_hash

BUSY_TIMEOUT_MS = 30_000
SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE items (
  seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, prompt_hash TEXT NOT NULL,
  messages TEXT NOT NULL, answer_a TEXT NOT NULL, answer_b TEXT NOT NULL,
  policy_version_a TEXT, policy_version_b TEXT, sampling_a TEXT, sampling_b TEXT,
  source TEXT NOT NULL, license TEXT NOT NULL, created_at TEXT NOT NULL
) STRICT;
CREATE TABLE labels (
  seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE,
  item_id TEXT NOT NULL REFERENCES items(id), annotator_id TEXT NOT NULL,
  choice TEXT NOT NULL CHECK (choice IN ('a', 'b', 'tie', 'both_bad')),
  strength REAL, criteria TEXT NOT NULL,
  shown_order TEXT NOT NULL CHECK (shown_order IN ('ab', 'ba')),
  duration_s REAL, guideline_version TEXT NOT NULL, consent TEXT NOT NULL,
  created_at TEXT NOT NULL, supersedes TEXT UNIQUE REFERENCES labels(id)
) STRICT;
CREATE INDEX labels_by_item ON labels (item_id, annotator_id);
CREATE TRIGGER labels_kept BEFORE DELETE ON labels
  BEGIN SELECT RAISE(ABORT, 'labels are append-only'); END;
CREATE TRIGGER labels_fixed BEFORE UPDATE ON labels
  BEGIN SELECT RAISE(ABORT, 'labels are append-only'); END;
CREATE TRIGGER items_kept BEFORE DELETE ON items
  BEGIN SELECT RAISE(ABORT, 'items are append-only'); END;
CREATE TRIGGER items_fixed BEFORE UPDATE ON items
  BEGIN SELECT RAISE(ABORT, 'items are append-only'); END;
"""
ITEM_COLUMNS = (
    "id", "prompt_hash", "messages", "answer_a", "answer_b", "policy_version_a", "policy_version_b",
    "sampling_a", "sampling_b", "source", "license", "created_at",
)  # fmt: skip
LABEL_COLUMNS = (
    "id", "item_id", "annotator_id", "choice", "strength", "criteria", "shown_order", "duration_s",
    "guideline_version", "consent", "created_at", "supersedes",
)  # fmt: skip
CURRENT = "NOT EXISTS (SELECT 1 FROM labels later WHERE later.supersedes = labels.id)"


class PreferenceStore:
    """Thread-safe; every method opens the file for itself, so nothing is held between calls.

    Raises UserError for a file that is not a preference store or cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._where = f"preference store {self.path}"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with closing(self._connect()) as db:
                db.execute("PRAGMA journal_mode = WAL")
            with self._writing() as db:
                self._create(db)
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"cannot be used: {error}",
                where=self._where,
                fix="give a file made by Accord, or a new one, on a local disk",
            ) from error

    def _create(self, db: sqlite3.Connection) -> None:
        version = db.execute("PRAGMA user_version").fetchone()[0]
        tables = {row["name"] for row in db.execute("SELECT name FROM sqlite_master")}
        if version == 0 and not tables:
            for statement in _statements(SCHEMA):
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        elif version != SCHEMA_VERSION or "labels" not in tables:
            raise UserError(
                f"not a preference store of this version of Accord (schema {version}, "
                f"expected {SCHEMA_VERSION})",
                where=self._where,
                fix="export with the version that made it, and import here",
            )

    def _connect(self) -> sqlite3.Connection:
        # isolation_level None: transactions begin where we say so, not where the module guesses.
        db = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_MS / 1000, isolation_level=None)
        db.row_factory = sqlite3.Row
        db.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        db.execute("PRAGMA foreign_keys = ON")
        return db

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with closing(self._connect()) as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")

    def add_items(self, items: Iterable[PreferenceItem]) -> int:
        """How many were new. An id that is there with other content is a UserError, and then
        nothing of this call is stored."""
        return self.add(items, [])[0]

    def add(
        self, items: Iterable[PreferenceItem], labels: Iterable[PreferenceLabel]
    ) -> tuple[int, int]:
        """``add_items`` and ``add_labels`` in one transaction; how many of each were new."""
        with self._writing() as db:
            new = sum(self._add(db, "items", ITEM_COLUMNS, item_row(item)) for item in items)
            return new, sum(self._add_label(db, label) for label in labels)

    def add_label(self, label: PreferenceLabel) -> bool:
        """False when this very label is there already (a page that lost its connection repeats).

        Raises UserError: unknown item; the annotator labelled the item before and ``supersedes``
        does not name that label; ``supersedes`` names another's label or one already superseded.
        """
        return self.add_labels([label]) == 1

    def add_labels(self, labels: Iterable[PreferenceLabel]) -> int:
        """As ``add_label``, all or none; how many were new."""
        return self.add([], labels)[1]

    def _add_label(self, db: sqlite3.Connection, label: PreferenceLabel) -> bool:
        if db.execute("SELECT 1 FROM labels WHERE id = ?", (label.id,)).fetchone() is None:
            self._check_label(db, label)
        return self._add(db, "labels", LABEL_COLUMNS, label_row(label))

    def _check_label(self, db: sqlite3.Connection, label: PreferenceLabel) -> None:
        if db.execute("SELECT 1 FROM items WHERE id = ?", (label.item_id,)).fetchone() is None:
            raise UserError(f"there is no item {label.item_id!r}", where=self._where)
        query = f"SELECT id FROM labels WHERE item_id = ? AND annotator_id = ? AND {CURRENT}"
        row = db.execute(query, (label.item_id, label.annotator_id)).fetchone()
        current = row["id"] if row is not None else None
        if current == label.supersedes:
            return
        if label.supersedes is None:
            raise UserError(
                f"{label.annotator_id!r} labelled item {label.item_id!r} before (as {current!r})",
                where=self._where,
                fix="to change an answer, add a label that supersedes that one",
            )
        raise UserError(
            f"label {label.supersedes!r} is not the current label of {label.annotator_id!r} for "
            f"item {label.item_id!r} (that is {current!r})",
            where=self._where,
            fix="supersede the annotator's own, newest label",
        )

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
                where=self._where,
                fix="give new content a new id",
            )
        return False

    def items(self) -> list[PreferenceItem]:
        """In the order they were added."""
        return self._read("SELECT * FROM items ORDER BY seq", item_from)

    def labels(self, *, history: bool = False) -> list[PreferenceLabel]:
        """Current labels in the order they were added; ``history``: also the superseded ones."""
        where = "" if history else f"WHERE {CURRENT}"
        return self._read(f"SELECT * FROM labels {where} ORDER BY seq", label_from)

    def _read(self, query: str, make: Callable[[sqlite3.Row], Any]) -> list[Any]:
        with closing(self._connect()) as db:
            return [make(row) for row in db.execute(query)]

    def labelled(self) -> list[tuple[PreferenceItem, PreferenceLabel]]:
        """Every current label with its item, of one moment."""
        with closing(self._connect()) as db:
            db.execute("BEGIN")
            items = {row["id"]: item_from(row) for row in db.execute("SELECT * FROM items")}
            query = f"SELECT * FROM labels WHERE {CURRENT} ORDER BY seq"
            return [(items[row["item_id"]], label_from(row)) for row in db.execute(query)]

    def pairs(self) -> list[PreferencePair]:
        """One a current label that prefers an answer; ties and "both bad" are left out (``stats``
        counts them). Labels of several annotators on one item stay several pairs."""
        found = []
        for item, label in self.labelled():
            if label.choice not in ("a", "b"):
                continue
            a_won = label.choice == "a"
            found.append(
                PreferencePair(
                    id=label.id,
                    messages=item.messages,
                    chosen=item.answer_a if a_won else item.answer_b,
                    rejected=item.answer_b if a_won else item.answer_a,
                    margin=label.strength,
                    annotator=label.annotator_id,
                    source=item.source,
                    consent=label.consent,
                    created_at=label.created_at,
                )
            )
        return found

    def stats(self) -> dict[str, Any]:
        """Counts: items, unlabelled items, prompts, labels (current), superseded, each choice,
        annotators with their labels, pairs (what ``pairs`` and the export give)."""
        labels = self.labels()
        with closing(self._connect()) as db:
            one = [
                db.execute(f"SELECT COUNT({what}) FROM {table}").fetchone()[0]
                for what, table in (
                    ("*", "items"), ("DISTINCT prompt_hash", "items"), ("*", "labels")
                )
            ]  # fmt: skip
        choices = Counter(label.choice for label in labels)
        return {
            "items": one[0],
            "prompts": one[1],
            "unlabelled": one[0] - len({label.item_id for label in labels}),
            "labels": len(labels),
            "superseded": one[2] - len(labels),
            "pairs": choices["a"] + choices["b"],
            "choices": {choice: choices[choice] for choice in ("a", "b", "tie", "both_bad")},
            "annotators": dict(sorted(Counter(label.annotator_id for label in labels).items())),
        }


def item_row(item: PreferenceItem) -> tuple[Any, ...]:
    return (
        item.id, prompt_hash(item.messages), _json([dict(m) for m in item.messages]),
        item.answer_a, item.answer_b, item.policy_version_a, item.policy_version_b,
        _json(item.sampling_a), _json(item.sampling_b), item.source, item.license, item.created_at,
    )  # fmt: skip


def item_from(row: sqlite3.Row) -> PreferenceItem:
    fields: dict[str, Any] = {k: row[k] for k in ITEM_COLUMNS if k != "prompt_hash"}
    for key in ("sampling_a", "sampling_b"):
        fields[key] = json.loads(row[key]) if row[key] is not None else None
    fields["messages"] = tuple(json.loads(row["messages"]))
    return PreferenceItem(**fields)


def label_row(label: PreferenceLabel) -> tuple[Any, ...]:
    return (
        label.id, label.item_id, label.annotator_id, label.choice, label.strength,
        _json(dict(label.criteria)), label.shown_order, label.duration_s, label.guideline_version,
        label.consent, label.created_at, label.supersedes,
    )  # fmt: skip


def label_from(row: sqlite3.Row) -> PreferenceLabel:
    plain = {k: row[k] for k in LABEL_COLUMNS if k != "criteria"}
    return PreferenceLabel(criteria=json.loads(row["criteria"]), **plain)


def _json(value: Any) -> str | None:
    if value is None:
        return None
    return json.dumps(value, ensure_ascii=True, sort_keys=True, allow_nan=False)


def _statements(script: str) -> Iterator[str]:
    """One statement at a time: ``executescript`` would end our transaction first."""
    statement = ""
    for line in script.strip().splitlines():
        statement += line + "\n"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
