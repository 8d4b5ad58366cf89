"""Shapes of rows, and errors that name file and row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.contracts.errors import UserError
from learner.offline.datasets import hold_out, read_demonstrations, read_rankings

USER = {"role": "user", "content": "How long?"}
YES = {"role": "assistant", "content": "Ten hours."}
NO = {"role": "assistant", "content": "Ten years."}


def write(folder: Path, *rows: Any) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, YES], "extra": 1},
        {"prompt": [USER], "completion": [YES]},
        {"prompt": [USER], "completion": "Ten hours.", "text": None},
    ],
)
def test_conversational_demonstrations_are_one_conversation(tmp_path: Path, row: Any) -> None:
    (read,) = read_demonstrations(write(tmp_path, row)).items
    assert read.messages == (USER, YES)
    assert read.answer is None
    assert read.key == '[["user", "How long?"]]'


def test_plain_demonstrations_use_no_template(tmp_path: Path) -> None:
    pair, text = read_demonstrations(
        write(tmp_path, {"prompt": "Q:", "completion": " A"}, {"text": "all of it"})
    ).items
    assert (pair.messages[0], pair.answer) == ({"role": "text", "content": "Q:"}, " A")
    assert (text.messages[0]["content"], text.answer) == ("all of it", None)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [YES], "rejected": [NO], "margin": 2},
        {"prompt": [USER], "chosen": "Ten hours.", "rejected": "Ten years.", "margin": 2.0},
        {"chosen": [USER, YES], "rejected": [USER, NO], "margin": 2},
    ],
)
def test_conversational_comparisons(tmp_path: Path, row: Any) -> None:
    (read,) = read_rankings(write(tmp_path, row)).items
    assert read.messages == (USER,)
    assert (read.shape.ranked, read.shape.margin) == (("Ten hours.", "Ten years."), 2.0)


def test_shared_text_is_cut_between_words(tmp_path: Path) -> None:
    row = {"chosen": "Human: hi\n\nBot: there", "rejected": "Human: hi\n\nBot: then"}
    (read,) = read_rankings(write(tmp_path, row)).items
    assert read.messages[0]["content"] == "Human: hi\n\nBot:"
    assert read.shape.ranked == (" there", " then")


def test_parquet_reads_as_jsonl_does(tmp_path: Path) -> None:
    rows = [{"prompt": [USER], "chosen": [YES], "rejected": [NO]}] * 3
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    read = read_rankings(str(tmp_path / "rows.parquet")).items
    assert [row.shape.ranked[0] for row in read] == ["Ten hours."] * 3
    assert read[2].where.endswith("rows.parquet, row 3")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"messages": [USER, YES]}, {"question": "x", "prompt": "y"}],
            r"line 2: the columns are of no known shape \(it lacks completion beside prompt\); "
            "the row has question, prompt",
        ),
        ([{"messages": "hello"}], "line 1: column 'messages' holds text"),
        (
            [{"messages": [{"role": "user"}]}],
            "column 'messages', message 1 is no message",
        ),
        ([{"messages": [USER]}], r"line 1: no assistant turn .*user"),
        ([], "holds no rows"),
        ([[1]], "line 1: holds a list, not an object"),
    ],
)
def test_what_is_wrong_with_a_demonstration(tmp_path: Path, rows: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_demonstrations(write(tmp_path, *rows))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "it lacks rejected beside chosen and prompt"),
        ({"prompt": [USER], "chosen": [USER, YES], "rejected": [NO]}, "one assistant message"),
        (
            {"chosen": [USER, YES], "rejected": [YES, NO]},
            "the same conversation|not end with",
        ),
        ({"chosen": "abc", "rejected": "xyz"}, "begin with the same text"),
        ({"prompt": "a", "chosen": "", "rejected": " "}, "both answers are empty"),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "margin": True},
            "'margin' must be a finite",
        ),
    ],
)
def test_what_is_wrong_with_a_comparison(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_rankings(write(tmp_path, row))
    assert "rows.jsonl, line 1" in str(caught.value)


def test_broken_json_and_unknown_files(tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": \n', encoding="utf-8")
    with pytest.raises(UserError, match="line 3: is not JSON"):
        read_demonstrations(str(path))
    with pytest.raises(UserError, match="no such file"):
        read_demonstrations(str(tmp_path / "none.jsonl"))
    (tmp_path / "store.db").touch()
    with pytest.raises(UserError, match="preferences export"):
        read_rankings(str(tmp_path / "store.db"))
    (tmp_path / "x.txt").touch()
    with pytest.raises(UserError, match=r"unknown kind of file '\.txt'"):
        read_rankings(str(tmp_path / "x.txt"))


def test_a_prompt_is_on_one_side_only_whatever_the_file(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i % 50}", "completion": str(i)} for i in range(200)]
    train, held = hold_out(read_demonstrations(write(tmp_path, *rows)).items, 0.3)
    assert len(train) + len(held) == 200
    held_keys = {row.key for row in held}
    assert not held_keys & {row.key for row in train}
    assert 5 <= len(held_keys) <= 25
    _, again = hold_out(read_demonstrations(write(tmp_path, *rows[::-1][:120])).items, 0.3)
    assert {row.key for row in again} <= held_keys


def test_few_prompts_still_leave_both_sides_something(tmp_path: Path) -> None:
    rows = read_demonstrations(write(tmp_path, {"text": "a"}, {"text": "b"})).items
    for fraction in (0.01, 0.99):
        train, held = hold_out(rows, fraction)
        assert (len(train), len(held)) == (1, 1)
    assert hold_out(rows, 0.0) == (rows, [])


def test_a_datasets_name_is_loaded_by_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load(name: str, split: str) -> Any:
        asked.append((name, split))
        return datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = read_demonstrations("datasets:owner/name", "test").items
    assert asked == [("owner/name", "test")]
    assert [row.key for row in rows] == ["a", "b"]
    assert rows[1].where == "datasets:owner/name, split test, row 2"

    def unreachable(name: str, split: str) -> Any:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match="split train: cannot load the data set: no network"):
        read_demonstrations("datasets:owner/name")
