from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from cluster.contracts.config.preferences import SnapshotConfig
from cluster.contracts.errors import UserError
from cluster.contracts.rows.files import raw_rows
from cluster.contracts.rows.folders import read_snapshot
from learner.offline.datasets import read_preferences
from reward_service.preferences.audit import audit_store
from reward_service.preferences.export import export_preferences
from reward_service.preferences.forget import forget, tombstones
from reward_service.preferences.forgotten import Forgotten
from reward_service.preferences.imports import add_preferences
from reward_service.preferences.imports import read_preferences as read_rows
from reward_service.preferences.people import Annotator, People
from reward_service.preferences.records import Candidate, Gold, Item, Judgement, prompt_hash
from reward_service.preferences.snapshot import held_out, write_snapshot
from reward_service.preferences.store import PreferenceStore

WHEN = "2026-01-02T03:04:05+00:00"
SECRET = "told in confidence"


def item(n: int, **keys: Any) -> Item:
    given: dict[str, Any] = {
        "id": f"i{n}",
        "messages": ({"role": "user", "content": f"question {n}"},),
        "completions": (Candidate(text=f"yes {n}"), Candidate(text=f"no {n}")),
        "source": "s",
        "license": "MIT",
        "created_at": WHEN,
    }
    return Item(**given | keys)


def judged(n: int, who: str = "ann", **keys: Any) -> Judgement:
    given: dict[str, Any] = {
        "id": f"j{n}/{who}",
        "item_id": f"i{n}",
        "annotator_id": who,
        "answer": "ranking",
        "ranks": (1, 2),
        "strength": 2.0,
        "consent": "c1",
        "created_at": WHEN,
    }
    return Judgement(**given | keys)


@pytest.fixture
def store(tmp_path: Path) -> PreferenceStore:
    made = PreferenceStore(tmp_path / "p.db")
    three = tuple(Candidate(text=text) for text in ("one", "two", "three"))
    items = [item(n) for n in range(40)]
    items += [item(40, completions=three), item(41), item(42, gold=Gold(ranks=(1, 2)))]
    judgements = [judged(n) for n in range(40)]
    judgements += [
        judged(40, ranks=(2, 1, 3), strength=None),
        judged(41, ranks=(1, 1), demonstration="mine", rationale=SECRET),
        judged(42),
        judged(0, "bob", ranks=(2, 1), rationale=SECRET),
        judged(1, "bob", answer="skip", ranks=()),
    ]
    made.add(items, judgements)
    return made


def test_what_a_snapshot_holds(store: PreferenceStore, tmp_path: Path) -> None:
    done = write_snapshot(store, tmp_path / "s", SnapshotConfig(test_fraction=0.25))
    rows = {path.stem: pq.read_table(path).to_pylist() for path in done.path.glob("*.parquet")}
    assert set(rows) == {
        *("train", "train_rankings", "train_demonstrations"),
        *("test", "test_rankings", "test_demonstrations"),
    }
    assert len(rows["train"]) + len(rows["test"]) == 40 + 3 + 1
    assert len(rows["train_rankings"]) + len(rows["test_rankings"]) == 43
    assert 4 <= len(rows["test_rankings"]) <= 18
    prompts = [{row["prompt"][0]["content"] for row in rows[s]} for s in ("train", "test")]
    assert not prompts[0] & prompts[1]
    manifest = json.loads((done.path / "snapshot.json").read_text())
    assert manifest["sha256"] == done.sha256
    assert manifest["counts"]["left_out"] == {"control items": 1, "skip": 1}
    assert manifest["split"] == {"by": "prompt hash", "test_fraction": 0.25}
    ranked = [r for side in ("train", "test") for r in rows[f"{side}_rankings"]]
    (three,) = [row for row in ranked if len(row["ranks"]) == 3]
    assert (three["completions"], three["ranks"]) == (["one", "two", "three"], [2, 1, 3])
    written = [r for side in ("train", "test") for r in rows[f"{side}_demonstrations"]]
    assert [row["completion"][0]["content"] for row in written] == ["mine"]


def test_training_reads_a_snapshot_as_any_rows_file(store: PreferenceStore, tmp_path: Path) -> None:
    done = write_snapshot(store, tmp_path / "s", SnapshotConfig(test_fraction=0.25))
    read = read_preferences(str(done.path)).items
    assert len(read) == done.counts["train.parquet"]
    assert len(read_preferences(str(done.path), "test").items) == done.counts["test.parquet"]
    whole = write_snapshot(store, tmp_path / "whole", SnapshotConfig(test_fraction=0))
    pairs = [(c.chosen, c.rejected) for c in read_preferences(str(whole.path)).items]
    rankings = read_preferences(str(whole.path), "train_rankings")
    assert [(c.chosen, c.rejected) for c in rankings.items] == pairs
    assert rankings.left_out.count == 1, "the tie is counted, not lost without a word"
    with pytest.raises(UserError, match="has no split 'validation'"):
        read_preferences(str(done.path), "validation")


def test_the_same_rows_have_the_same_hash_and_a_snapshot_never_changes(
    store: PreferenceStore, tmp_path: Path
) -> None:
    first = write_snapshot(store, tmp_path / "one", SnapshotConfig())
    again = write_snapshot(store, tmp_path / "two", SnapshotConfig())
    assert first.sha256 == again.sha256
    assert read_snapshot(again.path)["parents"]["snapshot"] == first.sha256
    with pytest.raises(UserError, match="exists already"):
        write_snapshot(store, first.path, SnapshotConfig())
    store.add([], [judged(3, "bob")])
    later = write_snapshot(store, tmp_path / "three", SnapshotConfig())
    assert later.sha256 != first.sha256
    assert {path.name for path in tmp_path.iterdir()} >= {"one", "two", "three"}
    assert not list(tmp_path.glob(".*.part"))


def test_filters(store: PreferenceStore, tmp_path: Path) -> None:
    config = SnapshotConfig(without_annotators=["ann"], test_fraction=0)
    assert write_snapshot(store, tmp_path / "s", config).counts["train.parquet"] == 1
    with pytest.raises(UserError, match=r"no judgement is left .*43 consent"):
        write_snapshot(store, tmp_path / "t", SnapshotConfig(consents=["c2"]))
    strong = write_snapshot(store, tmp_path / "u", SnapshotConfig(min_strength=3))
    assert strong.left_out["strength"] == 42


@pytest.mark.parametrize("broken", ["no manifest", "missing", "short", "changed", "manifest"])
def test_a_half_written_snapshot_is_refused_by_name(
    store: PreferenceStore, tmp_path: Path, broken: str
) -> None:
    done = write_snapshot(store, tmp_path / "s", SnapshotConfig())
    copy = Path(shutil.copytree(done.path, tmp_path / "copy"))
    for path in copy.iterdir():
        path.chmod(0o644)
    file, manifest = copy / "train.parquet", copy / "snapshot.json"
    content = file.read_bytes()
    if broken == "no manifest":
        manifest.unlink()
    elif broken == "missing":
        file.unlink()
    elif broken == "short":
        file.write_bytes(content[:-9])
    elif broken == "changed":
        file.write_bytes(bytes([content[0]]) + b"x" + content[2:])
    else:
        manifest.write_text(manifest.read_text().replace(done.sha256, "0" * 64))
    what = {
        "no manifest": r"snapshot\.json is missing: it was not written to the end",
        "missing": r"train\.parquet is missing",
        "short": r"train\.parquet has another length since it was written",
        "changed": r"train\.parquet has changed since it was written",
        "manifest": r"snapshot\.json has changed since it was written",
    }[broken]
    with pytest.raises(UserError, match=rf"copy: is no whole snapshot: {what}"):
        list(raw_rows(str(copy)))


def run_of(folder: Path, name: str, **manifest: Any) -> Path:
    path = folder / "runs" / name
    path.mkdir(parents=True)
    (path / "manifest.json").write_text(json.dumps({"name": name, "parents": {}, **manifest}))
    return path.resolve()


def test_forgetting_an_annotator(store: PreferenceStore, tmp_path: Path) -> None:
    people = People(store)
    people.register(Annotator(id="bob", role="annotator"))
    cookie = people.open_session("bob")
    before = write_snapshot(store, tmp_path / "before", SnapshotConfig())
    reward = run_of(tmp_path, "reward", snapshot=before.sha256)
    policy = run_of(tmp_path, "policy", parents={"reward": str(reward / "reward_model")})
    run_of(tmp_path, "other", snapshot="0" * 64, parents={"data": "pairs.jsonl"})

    stone = forget(store, "annotator", "bob", [tmp_path / "runs"])
    assert (stone.kind, stone.items, stone.judgements) == ("annotator", 0, 2)
    assert [(use.sha256, use.path) for use in stone.snapshots] == [
        (before.sha256, str(before.path.absolute()))
    ]
    assert stone.models == (str(policy), str(reward))
    assert tombstones(store) == [stone]
    assert "bob" not in json.dumps(audit_store(store)["tombstones"])

    assert people.session(cookie) is None
    assert people.annotators() == []
    assert "bob" not in store.stats()["annotators"]
    after = write_snapshot(store, tmp_path / "after", SnapshotConfig())
    export_preferences(store, tmp_path / "after.jsonl")
    exported = (tmp_path / "after.jsonl").read_text()
    names = {row.columns()["annotator"] for row in raw_rows(str(after.path))}
    assert names == {"ann"}
    assert "bob" not in exported
    assert audit_store(store)["problems"] == []
    with pytest.raises(UserError, match="there is no annotator 'bob'"):
        forget(store, "annotator", "bob")


def test_what_was_forgotten_is_not_in_the_file(store: PreferenceStore, tmp_path: Path) -> None:
    def bytes_of_store() -> bytes:
        return b"".join(path.read_bytes() for path in sorted(tmp_path.glob("p.db*")))

    assert SECRET.encode() in bytes_of_store()
    forget(store, "annotator", "bob")
    forget(store, "record", "j41/ann")
    assert SECRET.encode() not in bytes_of_store()


def test_forgetting_records_and_prompts(store: PreferenceStore, tmp_path: Path) -> None:
    store.add([], [judged(0, name, id=f"new/{name}", supersedes=f"j0/{name}") for name in ("ann",)])
    done = forget(store, "record", "new/ann")
    assert (done.items, done.judgements) == (0, 2), "all revisions go together"
    done = forget(store, "prompt", "question 0")
    assert (done.items, done.judgements) == (1, 1)
    done = forget(store, "prompt", prompt_hash(item(1).messages))
    assert (done.items, done.judgements) == (1, 2)
    done = forget(store, "record", "i2")
    assert (done.items, done.judgements) == (1, 1)
    assert len(store.items()) == 40
    assert len(tombstones(store)) == 4
    assert audit_store(store)["problems"] == []
    with pytest.raises(UserError, match="there is no record 'i2'"):
        forget(store, "record", "i2")


def test_the_audit_names_what_is_broken(store: PreferenceStore, tmp_path: Path) -> None:
    done = write_snapshot(store, tmp_path / "s", SnapshotConfig())
    found = audit_store(store)
    assert (found["problems"], found["snapshots"][0]["state"]) == ([], "whole")
    assert found["provenance"]["consent"] == 1.0
    file = done.path / "train.parquet"
    file.chmod(0o644)
    file.write_bytes(b"")
    with store.database.writing() as db:
        db.execute("DROP TRIGGER items_fixed")
        db.execute("UPDATE items SET prompt_hash = 'x' WHERE id = 'i1'")
    problems = audit_store(store)["problems"]
    assert problems[0] == "item 'i1': its prompt does not have its hash"
    assert "train.parquet has another length" in problems[1]


def test_held_out_is_stable_by_prompt_and_near_its_fraction() -> None:
    hashes = [prompt_hash([{"role": "user", "content": str(n)}]) for n in range(4000)]
    out = [held_out(h, 0.1) for h in hashes]
    assert out == [held_out(h, 0.1) for h in hashes]
    assert sum(out) == pytest.approx(400, abs=70)
    wider = [held_out(h, 0.2) for h in hashes]
    assert all(b for a, b in zip(out, wider, strict=True) if a)
    assert out != [held_out(h, 0.1, "other") for h in hashes]
    assert not any(held_out(h, 0.0) for h in hashes)


def test_what_was_forgotten_does_not_come_back_with_the_same_file(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": f"question {n}", "chosen": "yes", "rejected": "no", "annotator": who}
        for n in range(4)
        for who in ("ann", "bob")
    ]
    rows += [{"prompt": "question 9", "chosen": "yes", "rejected": "no"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = PreferenceStore(tmp_path / "p.db")
    done = add_preferences(store, read_rows(str(file)))
    assert (done.items, done.labels, done.forgotten) == (5, 9, 0)
    export_preferences(store, tmp_path / "all.jsonl")
    first = store.judgements()[0]
    forget(store, "annotator", "bob")
    forget(store, "record", first.id)
    forget(store, "prompt", "question 2")
    forget(store, "annotator", "unknown-0")
    kept = {entry.id for entry in store.judgements()}
    assert len(kept) == 2
    for source in (file, tmp_path / "all.jsonl"):
        again = add_preferences(store, read_rows(str(source)))
        assert (again.items, again.labels) == (0, 0)
        # bob's 4, ann's of question 0, question 2 with ann's, the unnamed one
        assert again.forgotten == 8
        assert {entry.id for entry in store.judgements()} == kept
    # Another file's rows without a name are somebody else's.
    other = {"prompt": "question 7", "chosen": "yes", "rejected": "no"}
    file.write_text(json.dumps(other) + "\n")
    assert add_preferences(store, read_rows(str(file))).labels == 1
    assert b"bob" not in (tmp_path / "p.db").read_bytes()


def test_a_store_of_the_version_before_forgets_as_well(tmp_path: Path) -> None:
    path = tmp_path / "p.db"
    PreferenceStore(path).add([item(0)], [judged(0)])
    with sqlite3.connect(path) as db:
        db.executescript(
            "DROP TABLE forgotten; DROP TABLE forgotten_salt; PRAGMA user_version = 3;"
        )
    store = PreferenceStore(path)
    forget(store, "annotator", "ann")
    assert Forgotten.of(store).judgement(judged(0))
