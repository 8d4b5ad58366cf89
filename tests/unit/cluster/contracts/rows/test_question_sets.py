"""Rows of the standard evaluation sets, written after the sets' own documentation."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.contracts.rows.files import BadRow
from cluster.contracts.rows.shapes import prompt_shape

ALPACA_EVAL = {
    "dataset": "helpful_base", "instruction": "Name an actor.", "output": "Jane Doe.",
    "generator": "some-model",
}  # fmt: skip
MT_BENCH = {
    "question_id": 101, "category": "reasoning", "turns": ["Who is first?", "And last?"],
    "reference": ["You are second.", "Uncertain."],
}  # fmt: skip
ARENA_HARD_0 = {
    "question_id": "ab", "category": "arena-hard-v0.1", "cluster": "ABC",
    "turns": [{"content": "Write a parser."}],
}  # fmt: skip
ARENA_HARD_2 = {
    "uid": "ab",
    "category": "hard_prompt",
    "subcategory": "coding",
    "prompt": "Write a parser.",
}
IFEVAL = {
    "key": 1000, "prompt": "Write without commas.",
    "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}],
}  # fmt: skip
TRUTHFUL = {
    "type": "Adversarial", "category": "Misconceptions", "question": "Can pigs fly?",
    "best_answer": "No.", "correct_answers": ["No."], "incorrect_answers": ["Yes."],
}  # fmt: skip
TRUTHFUL_CSV = {
    "Type": "Adversarial", "Category": "Misconceptions", "Question": "Can pigs fly?",
    "Best Answer": "No.", "Correct Answers": "No.; Never.", "Incorrect Answers": "Yes.",
}  # fmt: skip
ALPACA = {"instruction": "Translate.", "input": "Bonjour", "output": "Hello"}


@pytest.mark.parametrize(
    ("row", "asked", "category", "reference"),
    [
        (ALPACA_EVAL, "Name an actor.", "helpful_base", None),
        (MT_BENCH, "Who is first?", "reasoning", "You are second."),
        ({**MT_BENCH, "reference": None}, "Who is first?", "reasoning", None),
        (ARENA_HARD_0, "Write a parser.", "arena-hard-v0.1", None),
        (ARENA_HARD_2, "Write a parser.", "hard_prompt", None),
        (IFEVAL, "Write without commas.", None, None),
        (TRUTHFUL, "Can pigs fly?", "Misconceptions", "No."),
        (TRUTHFUL_CSV, "Can pigs fly?", "Misconceptions", "No."),
        (ALPACA, "Translate.\n\nBonjour", None, None),
    ],
    ids=["alpaca-eval", "mt-bench", "mt-bench-plain", "arena-hard-0", "arena-hard-2", "ifeval",
         "truthful", "truthful-csv", "alpaca"],
)  # fmt: skip
def test_a_question_is_a_users_message(
    row: dict[str, Any], asked: str, category: str | None, reference: str | None
) -> None:
    shape = prompt_shape(row)
    assert shape.messages == ({"role": "user", "content": asked},)
    assert shape.metadata.get("category") == category
    assert shape.metadata.get("reference") == reference


def test_what_is_asked_later_and_what_a_function_may_check_is_kept() -> None:
    metadata = prompt_shape(MT_BENCH).metadata
    assert metadata["later_turns"] == ["And last?"]
    assert metadata["later_references"] == ["Uncertain."]
    assert prompt_shape(IFEVAL).metadata["instruction_id_list"] == ["punctuation:no_comma"]
    assert prompt_shape(TRUTHFUL).metadata["incorrect_answers"] == ["Yes."]
    assert prompt_shape(ALPACA_EVAL).metadata["output"] == "Jane Doe."


def test_plain_rows_stay_plain_and_may_have_a_category() -> None:
    shape = prompt_shape({"prompt": "Hi", "category": "greeting", "reference": "Hello"})
    assert shape.messages == ({"role": "text", "content": "Hi"},)
    assert shape.metadata == {"category": "greeting", "reference": "Hello"}
    chat = prompt_shape({"prompt": [{"role": "user", "content": "Hi"}], "uid": "1"})
    assert chat.messages == ({"role": "user", "content": "Hi"},)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"turns": []}, "'turns'"),
        ({"turns": ["a", {"text": "b"}]}, "turn 2"),
        ({"turns": "a"}, "'turns' holds text"),
        ({"turns": ["a"], "reference": 3}, "'reference'"),
        ({"instruction": " "}, "'instruction'"),
        ({"question": 7, "best_answer": "x"}, "'question'"),
    ],
)
def test_a_broken_row_is_named(row: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRow, match=words):
        prompt_shape(row)
