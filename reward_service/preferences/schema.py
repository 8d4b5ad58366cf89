"""The tables of a preference store, and how the tables of older versions become them."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator

from reward_service.preferences.encoding import completions_text
from reward_service.preferences.records import Candidate

SCHEMA_VERSION = 4

# Salted hashes of the ids that were forgotten, so that no import brings them back.
FORGOTTEN = """CREATE TABLE forgotten_salt (salt TEXT NOT NULL) STRICT;
CREATE TABLE forgotten (hash TEXT PRIMARY KEY) STRICT;
"""

# The triggers refuse every change of items and judgements. Only ``forget`` may delete: within its
# transaction the table ``forgetting`` has a row.
SCHEMA = (
    """
CREATE TABLE items (
  seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, prompt_hash TEXT NOT NULL,
  messages TEXT NOT NULL, completions TEXT NOT NULL, topic TEXT NOT NULL, gold TEXT,
  source TEXT NOT NULL, license TEXT NOT NULL, created_at TEXT NOT NULL, chosen_by TEXT
) STRICT;
CREATE INDEX items_by_prompt ON items (prompt_hash);
CREATE TABLE judgements (
  seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
  item_id TEXT NOT NULL REFERENCES items(id), annotator_id TEXT NOT NULL,
  answer TEXT NOT NULL CHECK (answer IN
    ('ranking', 'all_bad', 'demonstration', 'skip', 'flag', 'withdrawn')),
  ranks TEXT, strength REAL, demonstration TEXT, reason TEXT NOT NULL, rationale TEXT NOT NULL,
  criteria TEXT NOT NULL, shown_order TEXT NOT NULL, duration_s REAL,
  guideline_version TEXT NOT NULL, guideline_sha256 TEXT NOT NULL, consent TEXT NOT NULL,
  source TEXT NOT NULL CHECK (source IN ('person', 'import', 'rule', 'ai', 'simulated')),
  judge TEXT, created_at TEXT NOT NULL, supersedes TEXT UNIQUE REFERENCES judgements(id)
) STRICT;
CREATE INDEX judgements_by_item ON judgements (item_id, annotator_id);
CREATE INDEX judgements_by_annotator ON judgements (annotator_id);
CREATE TABLE forgetting (running INTEGER NOT NULL) STRICT;
CREATE TRIGGER judgements_kept BEFORE DELETE ON judgements
  WHEN NOT EXISTS (SELECT 1 FROM forgetting)
  BEGIN SELECT RAISE(ABORT, 'judgements are append-only'); END;
CREATE TRIGGER judgements_fixed BEFORE UPDATE ON judgements
  BEGIN SELECT RAISE(ABORT, 'judgements are append-only'); END;
CREATE TRIGGER items_kept BEFORE DELETE ON items
  WHEN NOT EXISTS (SELECT 1 FROM forgetting)
  BEGIN SELECT RAISE(ABORT, 'items are append-only'); END;
CREATE TRIGGER items_fixed BEFORE UPDATE ON items
  BEGIN SELECT RAISE(ABORT, 'items are append-only'); END;
CREATE TABLE priorities (
  item_id TEXT PRIMARY KEY REFERENCES items(id) ON DELETE CASCADE, priority REAL NOT NULL
) STRICT;
CREATE TABLE documents (
  kind TEXT NOT NULL CHECK (kind IN ('guideline', 'consent', 'warning')),
  version TEXT NOT NULL, sha256 TEXT NOT NULL, text TEXT NOT NULL, created_at TEXT NOT NULL,
  seq INTEGER PRIMARY KEY AUTOINCREMENT, UNIQUE (kind, version)
) STRICT;
CREATE TABLE annotators (
  id TEXT PRIMARY KEY, role TEXT NOT NULL CHECK (role IN ('admin', 'annotator')),
  team TEXT NOT NULL, created_at TEXT NOT NULL
) STRICT;
CREATE TABLE consents (
  annotator_id TEXT NOT NULL REFERENCES annotators(id) ON DELETE CASCADE,
  version TEXT NOT NULL, created_at TEXT NOT NULL, PRIMARY KEY (annotator_id, version)
) STRICT;
CREATE TABLE invites (
  token_sha256 TEXT PRIMARY KEY, role TEXT NOT NULL, team TEXT NOT NULL,
  expires_at REAL NOT NULL, used_at REAL, annotator_id TEXT
) STRICT;
CREATE TABLE sessions (
  token_sha256 TEXT PRIMARY KEY,
  annotator_id TEXT NOT NULL REFERENCES annotators(id) ON DELETE CASCADE, expires_at REAL NOT NULL
) STRICT;
CREATE TABLE leases (
  item_id TEXT NOT NULL REFERENCES items(id) ON DELETE CASCADE, annotator_id TEXT NOT NULL,
  expires_at REAL NOT NULL, PRIMARY KEY (item_id, annotator_id)
) STRICT;
CREATE TABLE drafts (
  item_id TEXT NOT NULL REFERENCES items(id) ON DELETE CASCADE, annotator_id TEXT NOT NULL,
  content TEXT NOT NULL, saved_at REAL NOT NULL, PRIMARY KEY (item_id, annotator_id)
) STRICT;
CREATE TABLE snapshots (
  sha256 TEXT PRIMARY KEY, path TEXT NOT NULL, rows INTEGER NOT NULL, created_at TEXT NOT NULL
) STRICT;
CREATE TABLE snapshot_judgements (
  snapshot TEXT NOT NULL REFERENCES snapshots(sha256),
  judgement_id TEXT NOT NULL REFERENCES judgements(id) ON DELETE CASCADE,
  PRIMARY KEY (snapshot, judgement_id)
) STRICT;
CREATE TABLE tombstones (
  seq INTEGER PRIMARY KEY AUTOINCREMENT, created_at TEXT NOT NULL, kind TEXT NOT NULL,
  items INTEGER NOT NULL, judgements INTEGER NOT NULL, snapshots TEXT NOT NULL, models TEXT NOT NULL
) STRICT;
CREATE TRIGGER tombstones_kept BEFORE DELETE ON tombstones
  BEGIN SELECT RAISE(ABORT, 'tombstones are append-only'); END;
"""
    + FORGOTTEN
)


# Version 1 knew pairs and their labels only.
FROM_1 = """
ALTER TABLE items RENAME TO items_1;
ALTER TABLE labels RENAME TO labels_1;
DROP TRIGGER labels_kept;
DROP TRIGGER labels_fixed;
DROP TRIGGER items_kept;
DROP TRIGGER items_fixed;
{schema}
INSERT INTO items (seq, id, prompt_hash, messages, completions, topic, source, license, created_at)
  SELECT seq, id, prompt_hash, messages,
    pair(answer_a, policy_version_a, sampling_a, answer_b, policy_version_b, sampling_b),
    '', source, license, created_at FROM items_1 ORDER BY seq;
INSERT INTO judgements (seq, id, item_id, annotator_id, answer, ranks, strength, reason, rationale,
    criteria, shown_order, duration_s, guideline_version, guideline_sha256, consent, source,
    created_at, supersedes)
  SELECT seq, id, item_id, annotator_id,
    CASE choice WHEN 'both_bad' THEN 'all_bad' ELSE 'ranking' END,
    CASE choice WHEN 'a' THEN '[1, 2]' WHEN 'b' THEN '[2, 1]' WHEN 'tie' THEN '[1, 1]' END,
    strength, '', '', criteria, shown_order, duration_s, guideline_version, '', consent,
    CASE consent WHEN 'simulated' THEN 'simulated' ELSE 'import' END,
    created_at, supersedes FROM labels_1 ORDER BY seq;
DROP TABLE labels_1;
DROP TABLE items_1;
"""

# Version 2 did not know why an item is asked.
FROM_2 = "ALTER TABLE items ADD COLUMN chosen_by TEXT;\n"


def create(db: sqlite3.Connection) -> None:
    """Make the tables in an empty database. Within the caller's transaction."""
    _run(db, SCHEMA)


def migrate(db: sqlite3.Connection, version: int) -> bool:
    """Bring tables of an older ``version`` up to this one, within the caller's transaction. False
    where there is no way from it."""
    if version == 1 and has_table(db, "labels"):
        db.create_function("pair", 6, _pair, deterministic=True)
        _run(db, FROM_1.replace("{schema}", SCHEMA))
    elif version == 2 and has_table(db, "judgements"):
        _run(db, FROM_2 + FORGOTTEN)
    elif version == 3 and has_table(db, "judgements"):
        _run(db, FORGOTTEN)
    else:
        return False
    return True


def has_table(db: sqlite3.Connection, name: str) -> bool:
    query = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?"
    return db.execute(query, (name,)).fetchone() is not None


def _pair(*sides: str | None) -> str:
    """Text, policy version and sampling of two completions, as they are stored today."""
    candidates = [
        Candidate(text=text or "", policy_version=version, sampling=json.loads(sampling or "null"))
        for text, version, sampling in (sides[:3], sides[3:])
    ]
    return completions_text(candidates)


def _run(db: sqlite3.Connection, script: str) -> None:
    for statement in _statements(script):
        db.execute(statement)
    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _statements(script: str) -> Iterator[str]:
    """One statement at a time: ``executescript`` would end our transaction first."""
    statement = ""
    for line in script.strip().splitlines():
        statement += line + "\n"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
