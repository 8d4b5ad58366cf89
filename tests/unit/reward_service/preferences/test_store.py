from __future__ import annotations

import dataclasses
import json
import multiprocessing
import sqlite3
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from cluster.contracts.errors import UserError
from reward_service.preferences.export import export_preferences
from reward_service.preferences.imports import add_preferences, read_preferences
from reward_service.preferences.records import PAIR_RANKS, Candidate, Item, Judgement
from reward_service.preferences.store import PreferenceStore

WHEN = "2026-01-02T03:04:05+00:00"


def item(name: str = "i1", **keys: Any) -> Item:
    yes = Candidate(
        text=keys.pop("answer_a", "yes"), policy_version="run1/7", sampling={"temperature": 0.7}
    )
    no = Candidate(text="no", run="runs/x", sampling=keys.pop("sampling_b", None))
    given: dict[str, Any] = {
        "id": name,
        "messages": ({"role": "user", "content": f"ask {name} \u2603"},),
        "completions": (yes, no),
        "source": "run1",
        "license": "CC0-1.0",
        "created_at": WHEN,
    }
    return Item(**given | keys)


def label(name: str, item_id: str = "i1", choice: str = "a", **keys: Any) -> Judgement:
    given: dict[str, Any] = {
        "id": name,
        "item_id": item_id,
        "annotator_id": "ann",
        "answer": "all_bad" if choice == "both_bad" else "ranking",
        "ranks": PAIR_RANKS.get(choice, ()),
        "strength": 2.0,
        "criteria": {"helpful": 1},
        "rationale": "says it all",
        "shown_order": "ba",
        "duration_s": 3.5,
        "guideline_version": "g1",
        "guideline_sha256": "5e1f",
        "consent": "c1",
        "created_at": WHEN,
    }
    return Judgement(**given | keys)


@pytest.fixture
def store(tmp_path: Path) -> PreferenceStore:
    made = PreferenceStore(tmp_path / "made" / "preferences.db")
    made.add_items([item("i1"), item("i2"), item("i3")])
    return made


def test_everything_comes_back(store: PreferenceStore) -> None:
    assert store.add_judgement(label("l1"))
    again = PreferenceStore(store.path)
    assert again.items() == [item("i1"), item("i2"), item("i3")]
    assert again.judgements() == [label("l1")]
    with sqlite3.connect(store.path) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_adding_again_is_no_change_and_other_content_is_refused(store: PreferenceStore) -> None:
    assert store.add_items([item("i1"), item("i4")]) == 1
    assert store.add_judgement(label("l1")) is True
    assert store.add_judgement(label("l1")) is False
    with pytest.raises(UserError, match="id 'l1' is in judgements already, with another ranks"):
        store.add_judgement(label("l1", choice="b"))
    with pytest.raises(UserError, match="completions"):
        store.add_items([item("i5"), item("i1", answer_a="other")])
    assert len(store.items()) == 4  # i5 was not kept either


@pytest.mark.parametrize("table", ["judgements", "items"])
@pytest.mark.parametrize("statement", ["DELETE FROM {}", "UPDATE {} SET created_at = ''"])
def test_the_file_itself_refuses_changes(
    store: PreferenceStore, table: str, statement: str
) -> None:
    store.add_judgement(label("l1"))
    with sqlite3.connect(store.path) as db, pytest.raises(sqlite3.IntegrityError, match="append"):
        db.execute(statement.format(table))


def test_a_change_of_mind_supersedes(store: PreferenceStore) -> None:
    store.add_judgement(label("l1"))
    with pytest.raises(UserError, match="'ann' judged item 'i1' before \\(as 'l1'\\)"):
        store.add_judgement(label("l2", choice="b"))
    store.add_judgement(label("l2", choice="b", supersedes="l1"))
    assert [entry.id for entry in store.judgements()] == ["l2"]
    assert [entry.id for entry in store.judgements(history=True)] == ["l1", "l2"]
    assert store.stats()["superseded"] == 1
    assert store.pairs()[0].chosen == "no"
    with pytest.raises(UserError, match="not the current judgement"):
        store.add_judgement(label("l3", supersedes="l1"))
    with pytest.raises(UserError, match="not the current judgement of 'bob'"):
        store.add_judgement(label("l3", annotator_id="bob", supersedes="l2"))
    assert store.add_judgement(label("l3", annotator_id="bob"))


@pytest.mark.parametrize(
    "change",
    [
        {"answer": "c"},
        {"ranks": ()},
        {"strength": -1.0},
        {"duration_s": float("nan")},
        {"shown_order": "aa"},
    ],
)
def test_impossible_labels(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        label("l", **change)


def test_unknown_items_and_foreign_files(store: PreferenceStore, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no item 'absent'"):
        store.add_judgement(label("l", "absent"))
    (tmp_path / "text.db").write_text("not a database" * 100)
    with pytest.raises(UserError, match="is no SQLite database"):
        PreferenceStore(tmp_path / "text.db")
    with sqlite3.connect(tmp_path / "other.db") as db:
        db.execute("CREATE TABLE mine (x)")
    with pytest.raises(UserError, match="not a preference store"):
        PreferenceStore(tmp_path / "other.db")


def fill(store: PreferenceStore) -> None:
    store.add(
        [],
        [
            label("l1", "i1", "b", strength=None),
            label("l2", "i2", "tie"),
            label("l3", "i3", "both_bad"),
            label("l4", "i1", "a", annotator_id="bob"),
            label("l5", "i2", "a", annotator_id="bob"),
            label("l6", "i2", "both_bad", annotator_id="bob", supersedes="l5"),
        ],
    )


def test_pairs_leave_ties_out_and_stats_count_them(store: PreferenceStore) -> None:
    fill(store)
    found = [(p.id, p.chosen, p.rejected, p.margin, p.annotator) for p in store.pairs()]
    assert found == [("l1", "no", "yes", None, "ann"), ("l4", "yes", "no", 2.0, "bob")]
    assert store.stats() == {
        "items": 3,
        "prompts": 3,
        "unlabelled": 0,
        "labels": 5,
        "superseded": 1,
        "pairs": 2,
        "choices": {"a": 1, "b": 1, "tie": 1, "both_bad": 2},
        "rankings": 0,
        "demonstrations": 0,
        "skips": 0,
        "flags": 0,
        "annotators": {"ann": 3, "bob": 2},
    }


def test_export_shape_and_report(store: PreferenceStore, tmp_path: Path) -> None:
    fill(store)
    report = export_preferences(store, tmp_path / "out.jsonl")
    assert (report.rows, report.ties, report.both_bad, report.superseded) == (2, 1, 2, 1)
    row = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    assert row["prompt"] == [{"role": "user", "content": "ask i1 \u2603"}]
    assert row["chosen"] == [{"role": "assistant", "content": "no"}]
    assert row["rejected"] == [{"role": "assistant", "content": "yes"}]
    assert (row["margin"], row["policy_version_rejected"], row["annotator"]) == (
        None,
        "run1/7",
        "ann",
    )
    export_preferences(store, tmp_path / "out.parquet")
    table = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [entry["chosen"][0]["content"] for entry in table] == ["no", "yes"]
    assert json.loads(table[0]["sampling_rejected"]) == {"temperature": 0.7}
    export_preferences(store, tmp_path / "out.jsonl", drop_annotator=True)
    assert "bob" not in (tmp_path / "out.jsonl").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "out.jsonl", "out.parquet"]
    with pytest.raises(UserError, match=r"no export to '\.csv'"):
        export_preferences(store, tmp_path / "out.csv")


def test_an_empty_store_exports_an_empty_file(tmp_path: Path) -> None:
    store = PreferenceStore(tmp_path / "p.db")
    assert export_preferences(store, tmp_path / "o.parquet").rows == 0
    assert pq.read_table(tmp_path / "o.parquet").num_rows == 0


@pytest.mark.parametrize("text", [False, True])
def test_export_and_import_lose_nothing(store: PreferenceStore, tmp_path: Path, text: bool) -> None:
    if text:
        plain = ({"role": "text", "content": "plain prompt"},)
        store.add_items([item("i4", messages=plain, sampling_b={"top_p": 0.9})])
        store.add_judgement(label("l9", "i4", "b"))
    fill(store)
    export_preferences(store, tmp_path / "out.jsonl")
    other = PreferenceStore(tmp_path / "other.db")
    report = add_preferences(other, read_preferences(tmp_path / "out.jsonl"))
    exported = [entry for entry in store.judgements() if entry.choice in ("a", "b")]
    assert other.judgements() == exported
    assert other.pairs() == store.pairs()
    wanted = {entry.item_id for entry in exported}
    assert {i.id: i for i in other.items()} == {i.id: i for i in store.items() if i.id in wanted}
    assert (report.rows, report.labels) == (len(exported), len(exported))
    again = add_preferences(other, read_preferences(tmp_path / "out.jsonl"))
    assert (again.items, again.labels) == (0, 0)


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_import_of_trl_shapes(tmp_path: Path) -> None:
    user = {"role": "user", "content": "q"}
    good, bad = ({"role": "assistant", "content": text} for text in ("good", "bad"))
    rows = [
        {"prompt": "q", "chosen": "good", "rejected": "bad", "margin": 1},
        {"prompt": [user], "chosen": [good], "rejected": [bad]},
        {"chosen": [user, good], "rejected": [user, bad]},  # the same pair, implicit prompt
        {"prompt": [user], "chosen": [bad], "rejected": [good]},  # somebody else's view of it
    ]
    store = PreferenceStore(tmp_path / "p.db")
    path = write(tmp_path / "in.jsonl", *rows)
    report = add_preferences(store, read_preferences(path, consent="yes", license="MIT"))
    assert (report.rows, report.items, report.labels) == (4, 2, 4)
    pairs = store.pairs()
    assert [pair.chosen for pair in pairs] == ["good", "good", "good", "bad"]
    assert (pairs[0].margin, pairs[1].margin, pairs[0].consent) == (1.0, None, "yes")
    assert (store.items()[0].source, store.items()[0].license) == ("in.jsonl", "MIT")
    report = add_preferences(store, read_preferences(path, consent="yes", license="MIT"))
    assert (report.items, report.labels) == (0, 0)


def test_import_does_not_tell_by_position_which_is_better(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n}", "chosen": "x", "rejected": "y"} for n in range(200)]
    store = PreferenceStore(tmp_path / "p.db")
    add_preferences(store, read_preferences(write(tmp_path / "in.jsonl", *rows)))
    assert 70 < store.stats()["choices"]["a"] < 130


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "q", "chosen": "x"}, "lacks rejected beside chosen and prompt"),
        ({"prompt": "q", "chosen": "x", "rejected": "x"}, "the same completion"),
        ({"chosen": "x", "rejected": "y"}, "begin with the same text"),
        ({"prompt": [], "chosen": "x", "rejected": "y"}, "'prompt' holds an empty list"),
        ({"prompt": "q", "chosen": 3, "rejected": "y"}, "'chosen' holds a number"),
        ({"prompt": "q", "chosen": "x", "rejected": "y", "margin": -1}, "strength is -1"),
        ({"prompt": "q", "chosen": "x", "rejected": "y", "choice": "tie"}, "neither a nor b"),
        ([1], "holds a list, not an object"),
    ],
)
def test_a_bad_row_is_named_and_nothing_is_imported(tmp_path: Path, row: Any, says: str) -> None:
    store = PreferenceStore(tmp_path / "p.db")
    good = {"prompt": "q", "chosen": "x", "rejected": "y"}
    with pytest.raises(UserError, match=f"in.jsonl, line 2: .*{says}"):
        add_preferences(store, read_preferences(write(tmp_path / "in.jsonl", good, row)))
    assert store.items() == []


def test_one_annotator_labels_a_pair_once(tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen": "x", "rejected": "y", "annotator": "ann"}
    turned = row | {"chosen": "y", "rejected": "x"}
    store = PreferenceStore(tmp_path / "p.db")
    with pytest.raises(UserError, match=r"line 2: 'ann' judges item .* a second time"):
        add_preferences(store, read_preferences(write(tmp_path / "in.jsonl", row, turned)))


def _writer(path: str, name: str, count: int) -> None:
    store = PreferenceStore(path)
    for n in range(count):
        store.add_items([item(f"{name}-{n}")])
        store.add_judgement(label(f"{name}-{n}", f"{name}-{n}"))
        store.add_items([item(f"shared-{n}")])


def test_concurrent_writers_of_one_new_file_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "shared.db"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_writer, args=(str(path), name, 20)) for name in "abcd"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0, 0, 0]
    store = PreferenceStore(path)
    assert len(store.items()) == 4 * 20 + 20
    assert len(store.judgements()) == 80
    assert dataclasses.asdict(store.judgements()[0])["criteria"] == {"helpful": 1}
