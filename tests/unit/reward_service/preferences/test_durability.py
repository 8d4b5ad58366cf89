"""A preference store through crashes, a full disk, damage, a second writer, and an old schema."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.contracts.errors import UserError
from reward_service.preferences.records import Candidate, ChosenBy, Item, Judgement, prompt_hash
from reward_service.preferences.store import PreferenceStore
from tests.preference_records import WHEN, record

ROOT = Path(__file__).parents[4]
KILLS = 20


def test_killed_twenty_times_in_the_middle_of_writing(tmp_path: Path) -> None:
    """What the writer was told is stored is there, whole and once, after each kill -9."""
    path, rng, acknowledged = tmp_path / "p.db", random.Random(0), -1
    PreferenceStore(path)
    for _ in range(KILLS):
        writer = subprocess.Popen(
            [sys.executable, "-m", "tests.preference_records", str(path), str(acknowledged + 1)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert writer.stdout is not None
        for _ in range(rng.randint(1, 12)):
            acknowledged = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)
        rest = writer.stdout.read().split()  # written before the kill reached it
        writer.wait()
        acknowledged = int(rest[-1]) if rest else acknowledged
        store = PreferenceStore(path)
        ids = [entry.id for entry in store.judgements(history=True)]
        assert ids[: acknowledged + 1] == [f"j{n}" for n in range(acknowledged + 1)]
        assert len(ids) in (acknowledged + 1, acknowledged + 2)
        assert [item.id for item in store.items()] == [f"i{n}" for n in range(len(ids))]
        acknowledged = len(ids) - 1  # the one in between was stored, and not said to be
    assert store.database.damage() == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "none", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a small disk")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_one_error_and_loses_nothing(small_disk: Path) -> None:
    store, stored = PreferenceStore(small_disk / "p.db"), 0
    problem = ""
    while not problem:
        item, judgement = record(stored)
        try:
            store.add([item], [judgement])
            stored += 1
        except UserError as full:
            problem = str(full)
    assert "disk" in problem
    assert "nothing of this call was stored" in problem
    assert "free some space" in problem
    assert stored > 20
    assert len(store.judgements()) == len(store.items()) == stored


def test_a_damaged_file_is_one_error(tmp_path: Path) -> None:
    store = PreferenceStore(tmp_path / "p.db")
    records = [record(number) for number in range(300)]
    store.add([item for item, _ in records], [judgement for _, judgement in records])
    with sqlite3.connect(store.path) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert store.database.damage() == []
    content = bytearray(store.path.read_bytes())
    content[4096 * 2 :] = os.urandom(len(content) - 4096 * 2)
    store.path.write_bytes(content)
    with pytest.raises(UserError, match=r"p\.db: is damaged"):
        PreferenceStore(store.path).judged()


def test_a_second_writer_waits_and_then_says_so(tmp_path: Path) -> None:
    store = PreferenceStore(tmp_path / "p.db", busy_timeout_s=0.05)
    item, judgement = record(1)
    with sqlite3.connect(store.path, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(UserError, match="another process has been writing"):
            store.add([item], [judgement])
        assert store.items() == [], "reading goes on meanwhile"
        other.execute("ROLLBACK")
    assert store.add([item], [judgement]) == (1, 1)


SCHEMA_1 = """
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
INSERT INTO items VALUES (1, 'i1', '{prompt_hash}', '[{"content": "q", "role": "user"}]',
  'yes', 'no', 'run1/7', NULL, '{"temperature": 0.7}', NULL, 'run1', 'MIT', '{when}');
INSERT INTO labels VALUES (1, 'l1', 'i1', 'ann', 'a', 2.0, '{"helpful": 1}', 'ba', 3.5, 'g1',
  'c1', '{when}', NULL);
INSERT INTO labels VALUES (2, 'l2', 'i1', 'ann', 'b', NULL, '{}', 'ab', NULL, '', 'c1', '{when}',
  'l1');
INSERT INTO labels VALUES (3, 'l3', 'i1', 'bob', 'tie', NULL, '{}', 'ab', NULL, '', 'simulated',
  '{when}', NULL);
INSERT INTO labels VALUES (4, 'l4', 'i1', 'cem', 'both_bad', NULL, '{}', 'ab', NULL, '', 'c1',
  '{when}', NULL);
PRAGMA user_version = 1;
"""


def test_a_store_of_the_first_schema_is_brought_up_to_date(tmp_path: Path) -> None:
    messages = ({"role": "user", "content": "q"},)
    script = SCHEMA_1.replace("{when}", WHEN).replace("{prompt_hash}", prompt_hash(messages))
    with sqlite3.connect(tmp_path / "p.db") as db:
        db.executescript(script)
    store = PreferenceStore(tmp_path / "p.db")
    (item,) = store.items()
    assert item == Item(
        id="i1",
        messages=messages,
        completions=(
            Candidate(text="yes", policy_version="run1/7", sampling={"temperature": 0.7}),
            Candidate(text="no"),
        ),
        source="run1",
        license="MIT",
        created_at=WHEN,
    )
    assert store.add_items([item]) == 0, "stored as it would be today"
    history = {entry.id: entry for entry in store.judgements(history=True)}
    assert history["l1"] == Judgement(
        id="l1",
        item_id="i1",
        annotator_id="ann",
        answer="ranking",
        ranks=(1, 2),
        strength=2.0,
        criteria={"helpful": 1},
        shown_order="ba",
        duration_s=3.5,
        guideline_version="g1",
        consent="c1",
        source="import",
        created_at=WHEN,
    )
    assert not store.add_judgement(history["l1"])
    choices = {entry.id: (entry.choice, entry.source) for entry in store.judgements()}
    assert choices == {
        "l2": ("b", "import"),
        "l3": ("tie", "simulated"),
        "l4": ("both_bad", "import"),
    }
    with sqlite3.connect(store.path) as db, pytest.raises(sqlite3.IntegrityError, match="append"):
        db.execute("DELETE FROM judgements")
    assert PreferenceStore(store.path).database.damage() == []


def test_a_store_of_the_second_schema_is_brought_up_to_date(tmp_path: Path) -> None:
    item, judgement = record(0)
    PreferenceStore(tmp_path / "p.db").add([item], [judgement])
    with sqlite3.connect(tmp_path / "p.db") as db:
        db.executescript("DROP TABLE forgotten; DROP TABLE forgotten_salt;")
        db.execute("ALTER TABLE items DROP COLUMN chosen_by")
        db.execute("PRAGMA user_version = 2")
    store = PreferenceStore(tmp_path / "p.db")
    assert store.items() == [item]
    assert store.judgements() == [judgement]
    chosen = replace(item, id="next", chosen_by=ChosenBy(strategy="uncertainty", value=0.9))
    assert store.add_items([chosen]) == 1
    assert store.item("next") == chosen


def test_rows_or_a_folder_in_the_place_of_a_store_are_named(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("")
    with pytest.raises(UserError, match=r"is a file of rows \(\.jsonl\)"):
        PreferenceStore(rows)
    with pytest.raises(UserError, match="is a folder, but a preference store is a file"):
        PreferenceStore(tmp_path)
    assert rows.read_text() == ""
