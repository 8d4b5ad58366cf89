"""One SQLite file: connections, transactions, and what to tell the user when SQLite refuses.

Several processes may write at once (WAL, one writer at a time, the others wait). Not for network
file systems, where WAL does not work. A transaction that has returned is on disk: it survives
``kill -9`` and a power failure (synchronous = FULL).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from cluster.contracts.errors import UserError
from reward_service.preferences import schema

BUSY_TIMEOUT_S = 30.0
ROWS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz")

_REFUSALS = {  # start of SQLite's error name -> what is wrong, what to do
    "SQLITE_BUSY": (
        "another process has been writing to it for too long",
        "end that process, or try again later",
    ),
    "SQLITE_FULL": ("the disk is full; nothing of this call was stored", "free some space"),
    "SQLITE_IOERR": (
        "the disk does not take or give its bytes; nothing of this call was stored",
        "free some space, or check the disk",
    ),
    "SQLITE_READONLY": ("cannot be written", "make the file and its folder writable"),
    "SQLITE_CANTOPEN": ("cannot be opened", "check the path, its permissions and the free space"),
    "SQLITE_CORRUPT": (
        "is damaged",
        "restore it from a copy; `sqlite3 FILE .recover` reads what is left",
    ),
    "SQLITE_CONSTRAINT_FOREIGNKEY": (
        "a record that this one belongs to is not there, or was forgotten meanwhile",
        "try again",
    ),
    "SQLITE_NOTADB": (
        "is no SQLite database",
        "give a file made by Accord, or a new one, on a local disk",
    ),
}


class Database:
    """Thread-safe; every transaction opens the file for itself, so nothing is held between calls.

    Raises UserError for a file that is not a preference store or cannot be used. Stores of older
    versions of Accord are brought up to date when they are opened.
    """

    def __init__(self, path: str | Path, busy_timeout_s: float = BUSY_TIMEOUT_S) -> None:
        self.path = Path(path)
        self.where = f"preference store {self.path}"
        self._busy_timeout_s = busy_timeout_s
        self._refuse_other_files()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise UserError(
                f"its folder cannot be made: {problem.strerror}", where=self.where
            ) from None
        with self._refusals(), closing(self._connect()) as db:
            db.execute("PRAGMA journal_mode = WAL")
        with self.reading() as db:
            ready = db.execute("PRAGMA user_version").fetchone()[0] == schema.SCHEMA_VERSION
            ready = ready and schema.has_table(db, "judgements")
        if not ready:
            with self.writing() as db:
                self._prepare(db)

    def _refuse_other_files(self) -> None:
        """A file of rows in the place of a store is the usual mistake."""
        if self.path.is_dir():
            raise UserError(
                "is a folder, but a preference store is a file",
                where=self.where,
                fix="give a *.db file; a snapshot is for data.path of a training command",
            )
        if self.path.suffix in ROWS and self.path.is_file():
            raise UserError(
                f"is a file of rows ({self.path.suffix}), but a preference store is a *.db file",
                where=self.where,
                fix=f"import it: accord preferences import {self.path} preferences.db",
            )

    def _prepare(self, db: sqlite3.Connection) -> None:
        version = db.execute("PRAGMA user_version").fetchone()[0]
        empty = db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0] == 0
        if version == schema.SCHEMA_VERSION and schema.has_table(db, "judgements"):
            return  # another process was faster
        if version == 0 and empty:
            schema.create(db)
        elif not schema.migrate(db, version):
            raise UserError(
                f"not a preference store of this version of Accord (schema {version}, "
                f"expected {schema.SCHEMA_VERSION})",
                where=self.where,
                fix="export with the version that made it, and import here",
            )

    def _connect(self) -> sqlite3.Connection:
        # isolation_level None: transactions begin where we say so, not where the module guesses.
        db = sqlite3.connect(self.path, timeout=self._busy_timeout_s, isolation_level=None)
        db.row_factory = sqlite3.Row
        db.execute("PRAGMA foreign_keys = ON")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA secure_delete = ON")
        return db

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            name = getattr(error, "sqlite_errorname", None) or ""
            for start, (what, fix) in _REFUSALS.items():
                if name.startswith(start):
                    raise UserError(f"{what} ({error})", where=self.where, fix=fix) from error
            raise

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """All reads within see one moment."""
        with self._refusals(), closing(self._connect()) as db:
            db.execute("BEGIN")
            yield db

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, and on disk when this returns."""
        with self._refusals(), closing(self._connect()) as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:  # SQLite has rolled back by itself when the disk is full
                    db.execute("ROLLBACK")
                raise

    def shrink(self) -> None:
        """Leave nothing of deleted rows in the file and its write-ahead log."""
        with self._refusals(), closing(self._connect()) as db:
            db.execute("VACUUM")
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def damage(self) -> list[str]:
        """What SQLite's own check finds wrong with the file; empty: nothing."""
        with self.reading() as db:
            found = [row[0] for row in db.execute("PRAGMA integrity_check")]
            found += [f"foreign key of {row[0]}" for row in db.execute("PRAGMA foreign_key_check")]
        return [line for line in found if line != "ok"]
