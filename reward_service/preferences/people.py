"""Who labels, and what they were shown and agreed to: texts, one-time links, sessions.

Tokens of links and cookies are stored as hashes only.
"""

from __future__ import annotations

import secrets
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from cluster.contracts.errors import UserError
from reward_service.preferences.records import text_hash, utc_now
from reward_service.preferences.store import PreferenceStore

WITHDRAWN = 0.0  # a time at which no link ends by itself
Role = Literal["admin", "annotator"]
DocumentKind = Literal["guideline", "consent", "warning"]


class InviteRefused(UserError):
    """A link that is unknown, used already, or too old."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A text that annotators are shown: guideline, terms (consent), or content warning."""

    kind: DocumentKind
    version: str
    text: str
    sha256: str
    created_at: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Invite:
    """A one-time link, without its secret. ``id``: the hash of the secret. ``used_by``: the
    annotator it made; "": not used. ``expires_at`` 0: it was withdrawn."""

    id: str
    role: Role
    team: str
    expires_at: float  # seconds since 1970
    used_by: str

    @property
    def withdrawn(self) -> bool:
        return self.expires_at == WITHDRAWN


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotator:
    """``id`` is a pseudonym. ``team``: any group by which judgements are compared."""

    id: str
    role: Role
    team: str = ""


class People:
    """Thread-safe, several processes may use it. ``clock``: seconds since 1970."""

    def __init__(self, store: PreferenceStore, clock: Callable[[], float] = time.time) -> None:
        self.store = store
        self.clock = clock

    # -- texts -------------------------------------------------------------------------------------

    def publish(self, kind: DocumentKind, version: str, text: str) -> Document:
        """Make a text the newest of its kind. The same text under the same version changes nothing.
        Raises UserError for another text under a version that is taken."""
        sha256, now = text_hash(text), utc_now()
        with self.store.database.writing() as db:
            query = "SELECT * FROM documents WHERE kind = ? AND version = ?"
            known = db.execute(query, (kind, version)).fetchone()
            if known is not None and known["sha256"] != sha256:
                raise UserError(
                    f"version {version!r} of the {kind} is there already, with another text",
                    where=self.store.database.where,
                    fix="give the changed text a new version",
                )
            if known is not None:
                return _document(known)
            db.execute(
                "INSERT INTO documents (kind, version, sha256, text, created_at) "
                "VALUES (?, ?, ?, ?, ?)",
                (kind, version, sha256, text, now),
            )
        return Document(kind=kind, version=version, text=text, sha256=sha256, created_at=now)

    def document(self, kind: DocumentKind, version: str | None = None) -> Document | None:
        """A version of a text, or (None) the newest."""
        query = "SELECT * FROM documents WHERE kind = ? AND (? IS NULL OR version = ?)"
        row = self._one(f"{query} ORDER BY seq DESC LIMIT 1", kind, version, version)
        return None if row is None else _document(row)

    def agree(self, annotator_id: str, version: str) -> None:
        """The annotator agrees to a version of the terms; again changes nothing."""
        with self.store.database.writing() as db:
            db.execute(
                "INSERT OR IGNORE INTO consents VALUES (?, ?, ?)",
                (annotator_id, version, utc_now()),
            )

    def has_agreed(self, annotator_id: str, version: str) -> bool:
        query = "SELECT 1 FROM consents WHERE annotator_id = ? AND version = ?"
        return self._one(query, annotator_id, version) is not None

    # -- people ------------------------------------------------------------------------------------

    def invite(self, role: Role = "annotator", team: str = "", valid_s: float = 7 * 86400) -> str:
        """The secret of a one-time link. Only its hash is kept: show it now or never."""
        token = secrets.token_urlsafe(24)
        with self.store.database.writing() as db:
            db.execute(
                "INSERT INTO invites (token_sha256, role, team, expires_at) VALUES (?, ?, ?, ?)",
                (text_hash(token), role, team, self.clock() + valid_s),
            )
        return token

    def redeem(self, token: str) -> Annotator:
        """The new annotator of a link, under a random pseudonym. Raises InviteRefused for a link
        that is unknown, used or too old."""
        with self.store.database.writing() as db:
            query = "SELECT * FROM invites WHERE token_sha256 = ?"
            row = db.execute(query, (text_hash(token),)).fetchone()
            why = None
            if row is None:
                why = "is not known here"
            elif row["used_at"] is not None:
                why = "has been used already"
            elif row["expires_at"] == WITHDRAWN:
                why = "was withdrawn"
            elif row["expires_at"] <= self.clock():
                why = "is too old"
            if why is not None:
                raise InviteRefused(f"this invitation {why}", fix="ask for a new link")
            made = Annotator(
                id=f"{row['role']}-{secrets.token_hex(4)}", role=row["role"], team=row["team"]
            )
            self._register(db, made)
            db.execute(
                "UPDATE invites SET used_at = ?, annotator_id = ? WHERE token_sha256 = ?",
                (self.clock(), made.id, row["token_sha256"]),
            )
        return made

    def withdraw_invite(self, invite_id: str) -> bool:
        """Nobody can use the link any more. False for one that is unknown or used already."""
        with self.store.database.writing() as db:
            changed = db.execute(
                "UPDATE invites SET expires_at = ? WHERE token_sha256 = ? AND used_at IS NULL",
                (WITHDRAWN, invite_id),
            )
            return changed.rowcount > 0

    def invites(self) -> list[Invite]:
        """Those made last come first."""
        with self.store.database.reading() as db:
            rows = db.execute("SELECT * FROM invites ORDER BY rowid DESC").fetchall()
        return [
            Invite(
                id=row["token_sha256"],
                role=row["role"],
                team=row["team"],
                expires_at=row["expires_at"],
                used_by=row["annotator_id"] or "",
            )
            for row in rows
        ]

    def register(self, annotator: Annotator) -> None:
        """Add somebody under a pseudonym of the caller's; again changes nothing."""
        with self.store.database.writing() as db:
            self._register(db, annotator)

    def _register(self, db: sqlite3.Connection, annotator: Annotator) -> None:
        db.execute(
            "INSERT OR IGNORE INTO annotators VALUES (?, ?, ?, ?)",
            (annotator.id, annotator.role, annotator.team, utc_now()),
        )

    def annotators(self) -> list[Annotator]:
        with self.store.database.reading() as db:
            rows = db.execute("SELECT * FROM annotators ORDER BY created_at, id").fetchall()
        return [Annotator(id=row["id"], role=row["role"], team=row["team"]) for row in rows]

    def open_session(self, annotator_id: str, valid_s: float = 30 * 86400) -> str:
        """The secret for a cookie. Sessions outlive the page's process."""
        token = secrets.token_urlsafe(32)
        with self.store.database.writing() as db:
            db.execute("DELETE FROM sessions WHERE expires_at <= ?", (self.clock(),))
            db.execute(
                "INSERT INTO sessions VALUES (?, ?, ?)",
                (text_hash(token), annotator_id, self.clock() + valid_s),
            )
        return token

    def session(self, token: str) -> Annotator | None:
        """Whose cookie this is; None for one that is unknown, closed or too old."""
        row = self._one(
            "SELECT annotators.* FROM sessions JOIN annotators ON annotators.id = annotator_id "
            "WHERE token_sha256 = ? AND expires_at > ?",
            text_hash(token),
            self.clock(),
        )
        return row and Annotator(id=row["id"], role=row["role"], team=row["team"])

    def close_session(self, token: str) -> None:
        with self.store.database.writing() as db:
            db.execute("DELETE FROM sessions WHERE token_sha256 = ?", (text_hash(token),))

    def close_sessions(self, annotator_id: str) -> None:
        """Sign somebody out everywhere; only a new link lets a person in again."""
        with self.store.database.writing() as db:
            db.execute("DELETE FROM sessions WHERE annotator_id = ?", (annotator_id,))

    def _one(self, query: str, *values: Any) -> Any:
        with self.store.database.reading() as db:
            return db.execute(query, values).fetchone()


def _document(row: sqlite3.Row) -> Document:
    return Document(
        kind=row["kind"],
        version=row["version"],
        text=row["text"],
        sha256=row["sha256"],
        created_at=row["created_at"],
    )
