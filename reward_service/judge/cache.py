"""A judge's answers on disk, by the hash of the whole request."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path

from cluster.contracts.errors import UserError
from reward_service.judge.records import Reply

BUSY_TIMEOUT_S = 30.0
TABLE = "CREATE TABLE IF NOT EXISTS judge_replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL)"


class ReplyCache:
    """Thread-safe, and safe with several processes. An answer that ``put`` has returned for is on
    disk, also after `kill -9`. Raises UserError for a file that cannot be used."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with self._open() as db:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute(TABLE)

    def get(self, key: str) -> Reply | None:
        with self._open() as db:
            row = db.execute("SELECT reply FROM judge_replies WHERE key = ?", (key,)).fetchone()
        return None if row is None else Reply(**json.loads(row[0]))

    def put(self, key: str, reply: Reply) -> None:
        with self._open() as db:
            text = json.dumps(asdict(reply))
            db.execute("INSERT OR REPLACE INTO judge_replies VALUES (?, ?)", (key, text))

    def copy_to(self, path: str | Path) -> None:
        """A whole copy, also while others write."""
        with self._open() as db, closing(sqlite3.connect(path)) as copy:
            db.backup(copy)

    def add_from(self, path: str | Path) -> None:
        """Add the answers of another cache; those that are here stay."""
        with self._open() as db:
            other = sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)
            with closing(other):
                rows = other.execute("SELECT key, reply FROM judge_replies").fetchall()
            db.executemany("INSERT OR IGNORE INTO judge_replies VALUES (?, ?)", rows)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_S)) as db:
                db.execute("PRAGMA synchronous = FULL")
                with db:
                    yield db
        except (sqlite3.Error, OSError) as problem:
            raise UserError(
                f"cannot be used: {problem}",
                where=f"cache of the judge's answers {self.path}",
                fix="free some space, remove a damaged file, or name another with judge.cache",
            ) from problem
