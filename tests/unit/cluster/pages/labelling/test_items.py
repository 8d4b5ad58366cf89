"""Files of completions become items."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.contracts.errors import UserError
from cluster.pages.labelling.items import read_gold, read_items
from reward_service.preferences.records import ChosenBy


def written(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def items_of(path: str, completions: int = 2) -> Any:
    return read_items(path, completions=completions, license="CC0", created_at="2027-01-01")


def test_what_generate_writes_is_put_together_by_prompt(tmp_path: Path) -> None:
    prompt = [{"role": "user", "content": "hi"}]
    rows = [
        {"prompt": prompt, "completion": [{"role": "assistant", "content": text}], "sample": n}
        for n, text in enumerate(["a", "b", "b", "c", "d", "e"])
    ]
    rows.insert(3, {"prompt": "other", "completion": "alone"})
    read = items_of(written(tmp_path / "c.jsonl", *rows))
    assert [sorted(c.text for c in item.completions) for item in read.items] == [
        ["a", "b"],
        ["c", "d"],
    ]
    assert read.too_few == 1
    item = read.items[0]
    assert item.messages == ({"role": "user", "content": "hi"},)
    assert (item.license, item.source, item.gold) == ("CC0", "c.jsonl", None)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "completions": ["x", "y"]},
        {"prompt": "q", "completions": [{"text": "x"}, {"role": "assistant", "content": "y"}]},
        {"prompt": "q", "completion_a": "x", "completion_b": "y"},
        {"prompt": "q", "chosen": "x", "rejected": "y"},
        {"prompt": "q", "chosen": "y", "rejected": "x"},
    ],
)
def test_every_shape_gives_the_same_item(tmp_path: Path, row: dict[str, Any]) -> None:
    plain = items_of(written(tmp_path / "a.jsonl", {"prompt": "q", "completions": ["y", "x"]}))
    found = items_of(written(tmp_path / "b.jsonl", row))
    assert found.items[0].id == plain.items[0].id
    assert [c.text for c in found.items[0].completions] == [
        c.text for c in plain.items[0].completions
    ]


def test_which_completion_was_chosen_does_not_show_in_the_letters(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n}", "chosen": "good", "rejected": "bad"} for n in range(200)]
    read = items_of(written(tmp_path / "p.jsonl", *rows))
    firsts = [item.completions[0].text for item in read.items]
    assert 60 < firsts.count("good") < 140


def test_provenance_and_topic_are_kept(tmp_path: Path) -> None:
    row = {
        "prompt": "q",
        "topic": "maths",
        "run": "runs/x",
        "completions": [{"text": "x", "policy_version": 3, "sampling": {"seed": 1}}, "y"],
    }
    (item,) = items_of(written(tmp_path / "p.jsonl", row)).items
    known = {c.text: c for c in item.completions}
    assert item.topic == "maths"
    assert (known["x"].policy_version, known["x"].sampling) == ("3", {"seed": 1})


def test_four_completions_and_one(tmp_path: Path) -> None:
    path = written(tmp_path / "p.jsonl", {"prompt": "q", "completions": list("abcdefghi")})
    assert [len(item.completions) for item in items_of(path, 4).items] == [4, 4]
    assert len(items_of(path, 1).items) == 9


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"question": "q"}, "no known shape"),
        ({"prompt": "q"}, "no known shape"),
        ({"prompt": "q", "completions": "x"}, "column 'completions' holds text"),
        ({"prompt": "q", "completions": [1]}, "column 'completions' holds a number"),
        ({"prompt": "q", "completions": []}, "expected a list"),
        ({"prompt": [{"role": "assistant", "content": "x"}], "completion": "y"}, "assistant"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: dict[str, Any], what: str) -> None:
    path = written(tmp_path / "p.jsonl", {"prompt": "q", "completions": ["x", "y"]}, row)
    with pytest.raises(UserError, match=what) as problem:
        items_of(path)
    assert "p.jsonl, line 2" in str(problem.value)


def test_gold_knows_its_answer(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n}", "chosen": "good", "rejected": "bad"} for n in range(20)]
    for item in read_gold(
        written(tmp_path / "g.jsonl", *rows), license="unknown", created_at="2027-01-01"
    ):
        assert item.gold is not None
        assert item.completions[item.gold.ranks.index(1)].text == "good"
    same = {"prompt": "q", "chosen": "x", "rejected": "x"}
    with pytest.raises(UserError, match="the same completion"):
        read_gold(written(tmp_path / "h.jsonl", same), license="", created_at="")


def test_a_row_that_says_why_it_was_chosen_stays_an_item(tmp_path: Path) -> None:
    """Also where pairs of one prompt share a completion."""
    reason = {"strategy": "uncertainty", "value": 0.9, "judgements": 2}
    rows = [
        {"prompt": "q", "completion_a": a, "completion_b": b, "chosen_by": reason}
        for a, b in ("xy", "yz", "zx", "xy")
    ]
    items = items_of(written(tmp_path / "i.jsonl", *rows)).items
    assert [sorted(c.text for c in item.completions) for item in items] == [
        ["x", "y"],
        ["y", "z"],
        ["x", "z"],
    ]
    assert {item.chosen_by for item in items} == {ChosenBy(**reason)}
    rows[1]["chosen_by"] = {"value": 0.9}
    with pytest.raises(UserError, match="'chosen_by' holds no strategy") as problem:
        items_of(written(tmp_path / "i.jsonl", *rows))
    assert "line 2" in str(problem.value)
