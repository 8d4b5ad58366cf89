"""Rows that judge several completions: one shape for all of them, and mistakes named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from cluster.contracts.errors import UserError
from cluster.contracts.rows.files import BadRow, raw_rows
from cluster.contracts.rows.judged import dense_ranks, judged_shape, orders_within, pairs_within

USER = {"role": "user", "content": "How long?"}
MESSAGES = (USER,)


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


ULTRAFEEDBACK = {
    "source": "evol_instruct",
    "instruction": "How long?",
    "models": ["m1", "m2", "m3"],
    "completions": [
        {"model": "m1", "response": "Ten hours.", "overall_score": 8.5, "fine-grained_score": 4.0},
        {"model": "m2", "response": "Ten years.", "overall_score": 2.0, "fine-grained_score": 4.5},
        {"model": "m3", "response": "Long.", "overall_score": 8.5, "fine-grained_score": 1.0},
    ],
}
NEMO = {
    "context": [USER],
    "completions": [
        {"rank": 1, "completion": answer("Ten years.")},
        {"rank": 0, "completion": answer("Ten hours.")},
    ],
    "task_name": "help",
}
LABEL_STUDIO = {
    "id": 7,
    "data": {"prompt": "How long?", "answer1": "Ten hours.", "answer2": "Ten years."},
    "annotations": [
        {
            "completed_by": 3,
            "lead_time": 12.5,
            "created_at": "2026-01-02T03:04:05Z",
            "result": [
                {
                    "type": "pairwise",
                    "from_name": "better",
                    "to_name": "answer1,answer2",
                    "value": {"selected": "right"},
                },
                {"type": "textarea", "from_name": "why", "value": {"text": ["it is", "true"]}},
            ],
        },
        {"completed_by": {"id": 4}, "was_cancelled": True, "result": []},
        {
            "completed_by": {"id": 5, "email": "a@example.org"},
            "result": [{"type": "choices", "value": {"choices": ["both bad"]}}],
        },
    ],
}
RANKED = {
    "data": {
        "prompt": "How long?",
        "items": [
            {"id": "m1", "title": "first", "body": "Ten hours."},
            {"id": "m2", "title": "second", "body": "Ten years."},
            {"id": "m3", "title": "third", "body": "Long."},
        ],
    },
    "annotations": [
        {
            "completed_by": 1,
            "result": [{"type": "ranker", "value": {"ranker": {"rank": ["m3", "m1", "m2"]}}}],
        }
    ],
}
ARGILLA_2 = {
    "id": "u1",
    "fields": {"prompt": "How long?", "response1": "Ten hours.", "response2": "Ten years."},
    "metadata": {},
    "suggestions": {},
    "responses": {
        "comment": [{"value": "the first is true", "user_id": "u-1"}],
        "preference": [
            {"value": "response2", "user_id": "u-1", "status": "submitted"},
            {"value": "A", "user_id": "u-2", "status": "submitted"},
            {"value": "tie", "user_id": "u-3", "status": "discarded"},
        ],
    },
}
ARGILLA_FLAT = {
    "prompt": "How long?",
    "response-1": "Ten hours.",
    "response-2": "Ten years.",
    "preference.responses": [["response-2", "response-1"], ["response-1", "response-2"]],
    "preference.responses.users": ["u-1", "u-2"],
    "preference.responses.status": ["submitted", "submitted"],
}
ARGILLA_1 = {
    "prompt": "How long?",
    "response-1": "Ten hours.",
    "response-2": "Ten years.",
    "preference": [
        {
            "user_id": "u-1",
            "value": [{"value": "response-1", "rank": 2}, {"value": "response-2", "rank": 1}],
            "status": "submitted",
        },
        {"user_id": "u-2", "value": [{"value": "response-1", "rank": 1}, {"value": "response-2"}]},
    ],
}


@pytest.mark.parametrize(
    ("row", "texts", "ranks", "who"),
    [
        (ULTRAFEEDBACK, ("Ten hours.", "Ten years.", "Long."), [(1, 2, 1)], [""]),
        (NEMO, ("Ten years.", "Ten hours."), [(2, 1)], [""]),
        (
            {"prompt": [USER], "completions": ["x", "y", "z"], "ranks": [2, 1, 2]},
            ("x", "y", "z"),
            [(2, 1, 2)],
            [""],
        ),
        (
            {"prompt": [USER], "chosen_response": "x", "rejected_response": "y"},
            ("x", "y"),
            [(1, 2)],
            [""],
        ),
        ({"prompt": [USER], "chosen": answer("x"), "rejected": "y"}, ("x", "y"), [(1, 2)], [""]),
        ({"chosen": [USER, *answer("x")], "rejected": [USER, *answer("y")]}, ("x", "y"),
         [(1, 2)], [""]),
        (
            {"chosen": "\n\nHuman: How long?\n\nAssistant: x",
             "rejected": "\n\nHuman: How long?\n\nAssistant: y"}, ("x", "y"), [(1, 2)], [""],
        ),
        (
            {"data_source": "d", "prompt": [USER], "chosen": "x", "rejected": "y",
             "extra_info": {"index": 1}}, ("x", "y"), [(1, 2)], [""],
        ),
        (LABEL_STUDIO, ("Ten hours.", "Ten years."), [(2, 1), ()],
         ["label-studio-3", "label-studio-5"]),
        (RANKED, ("Ten hours.", "Ten years.", "Long."), [(2, 3, 1)], ["label-studio-1"]),
        (ARGILLA_2, ("Ten hours.", "Ten years."), [(2, 1), (1, 2)], ["argilla-u-1", "argilla-u-2"]),
        (ARGILLA_FLAT, ("Ten hours.", "Ten years."), [(2, 1), (1, 2)],
         ["argilla-u-1", "argilla-u-2"]),
        (ARGILLA_1, ("Ten hours.", "Ten years."), [(2, 1), (1, 2)],
         ["argilla-u-1", "argilla-u-2"]),
    ],
)  # fmt: skip
def test_shapes(row: Any, texts: Any, ranks: Any, who: Any) -> None:
    shape = judged_shape(row)
    assert shape.messages[-1]["content"] == "How long?"
    assert shape.completions == texts
    assert [verdict.ranks for verdict in shape.verdicts] == ranks
    assert [verdict.annotator for verdict in shape.verdicts] == who


def test_what_exports_know_beside_the_order() -> None:
    first, second = judged_shape(LABEL_STUDIO).verdicts
    assert (first.duration_s, first.created_at) == (12.5, "2026-01-02T03:04:05Z")
    assert first.rationale == "it is true"
    assert second.all_bad
    assert judged_shape(ULTRAFEEDBACK).writers == ("m1", "m2", "m3")


def test_pairs_for_training() -> None:
    pairs = pairs_within(ULTRAFEEDBACK)
    assert [(p["chosen"], p["rejected"], p["margin"]) for p in pairs] == [
        ("Ten hours.", "Ten years.", 6.5),
        ("Long.", "Ten years.", 6.5),
    ]
    assert all(p["prompt"] == "How long?" for p in pairs)
    assert [p["annotator"] for p in pairs_within(ARGILLA_1)] == ["argilla-u-1", "argilla-u-2"]
    assert pairs_within({"prompt": "q", "completions": ["x", "y"], "ranks": [1, 1]}) == []
    plain = {"prompt": "q", "chosen": "x", "rejected": "y"}
    assert pairs_within(plain) == [plain]
    single = {"prompt": "q", "completion": "x", "label": True}
    assert pairs_within(single) == [single]


def changed(row: Any, **keys: Any) -> Any:
    return {**json.loads(json.dumps(row)), **keys}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "q"}, "of no known shape"),
        (changed(ULTRAFEEDBACK, completions=[{"response": "x", "overall_score": 1}]),
         "'completions' holds a list of 1"),
        (changed(ULTRAFEEDBACK, completions=[{"response": "x"}, {"response": "y"}]),
         "have neither rank nor score"),
        (changed(ULTRAFEEDBACK, completions=[{"response": "x", "score": 1}, {"response": "y"}]),
         "'completions.score', entry 2 is empty"),
        (changed(ULTRAFEEDBACK, completions=[{"model": "x", "score": 1}, {"response": "y"}]),
         "'completions', entry 1 has no response"),
        (changed(NEMO, completions=[{"rank": "first", "completion": "x"},
                                    {"rank": 1, "completion": "y"}]),
         "completions.rank, entry 1' must be a finite number"),
        (changed(NEMO, completions=[{"rank": 0, "completion": 3}, {"rank": 1, "completion": "y"}]),
         "completions, entry 1 holds a number"),
        ({"prompt": "q", "completions": ["x", "y"], "ranks": [1]},
         "'ranks' holds 1 entries for 2 completions"),
        (changed(LABEL_STUDIO, data={"prompt": "q", "answer1": "x"}),
         "'data' has 1 fields that look like completions"),
        (changed(LABEL_STUDIO, data={"answer1": "x", "answer2": "y"}),
         "'data' has no field prompt"),
        (changed(LABEL_STUDIO, annotations=[{"result": [{"value": {"rating": 3}}]}]),
         "'annotations', entry 1 holds no comparison"),
        (changed(ARGILLA_2, responses={"preference": [{"value": "third", "user_id": "u"}]}),
         "'preference' answers 'third', which names no completion"),
        (changed(ARGILLA_FLAT, **{"preference.responses": [["response-1"], ["response-2"]]}),
         "'preference' ranks response-1, but the completions are response-1, response-2"),
    ],
)  # fmt: skip
def test_a_mistake_names_its_column(row: Any, says: str) -> None:
    with pytest.raises(BadRow) as problem:
        judged_shape(row)
    assert says in problem.value.what


def test_dense_ranks() -> None:
    assert dense_ranks([3.0, 1.0, 3.0, 2.0]) == (3, 1, 3, 2)


def test_data_sets_on_disk(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "chosen": "x", "rejected": "y"}]
    table = datasets.Dataset.from_list(rows)
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(str(tmp_path / "two"))
    assert [row.columns() for row in raw_rows(str(tmp_path / "one"))] == rows
    (row,) = raw_rows(str(tmp_path / "two"), "test")
    assert row.place.where == f"{tmp_path / 'two'}, split test, row 1"
    with pytest.raises(UserError, match="has no split 'dev'"):
        list(raw_rows(str(tmp_path / "two"), "dev"))
    (tmp_path / "one" / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match="one: is not a readable data set"):
        list(raw_rows(str(tmp_path / "one")))


def test_orders_within_keeps_rankings_whole_and_ties_if_asked() -> None:
    strict = {"prompt": "q", "completions": ["x", "y", "z"], "ranks": [3, 1, 2], "topic": "t"}
    (row,) = orders_within(strict, rankings=True)
    assert (row["ranking"], row["topic"]) == (["y", "z", "x"], "t")
    assert len(orders_within(strict)) == 3
    tied = {**strict, "ranks": [1, 1, 2]}
    found = orders_within(tied, rankings=True, ties=True)
    assert [(row["chosen"], row["rejected"], row.get("tie")) for row in found] == [
        ("x", "y", True), ("x", "z", None), ("y", "z", None),
    ]  # fmt: skip
    assert [row.get("tie") for row in orders_within(tied, rankings=True)] == [None, None]
