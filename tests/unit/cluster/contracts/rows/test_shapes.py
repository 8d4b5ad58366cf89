"""What rows say: the shapes in which people keep prompts, demonstrations and comparisons."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from cluster.contracts.rows.files import BadRow
from cluster.contracts.rows.judgements import JudgementShape, is_judgement, judgement_shape
from cluster.contracts.rows.shapes import comparison_shape, demonstration_shape, prompt_shape


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def by(speaker: str, value: str) -> dict[str, str]:
    return {"from": speaker, "value": value}


HI, YO, NO = said("user", "Hi"), said("assistant", "Yo"), said("assistant", "No")
TEXT = said("text", "Hi")
SHAREGPT = [by("system", "Be kind"), by("human", "Hi"), by("gpt", "Yo")]
HH = "\n\nHuman: Hi\n\nAssistant: Yo"


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"prompt": "Hi"}, [TEXT]),
        ({"prompt": [HI]}, [HI]),
        ({"prompt": HI}, [HI]),
        ({"prompt": [TEXT]}, [TEXT]),  # as `accord generate` once wrote plain text
        ({"messages": [HI, YO]}, [HI]),
        ({"messages": [HI, YO, HI]}, [HI, YO, HI]),
        ({"conversations": SHAREGPT}, [said("system", "Be kind"), HI]),
        ({"conversations": [HI, YO]}, [HI]),
        ({"input": "Hi"}, [TEXT]),
        # HH-RLHF as it is, and its rows that begin or end oddly.
        ({"prompt": "\n\nHuman: Hi\n\nAssistant:"}, [HI]),
        ({"chosen": HH, "rejected": HH}, [HI]),
        ({"chosen": HH + HH}, [HI, YO, HI]),
        ({"chosen": HH + "\n\nHuman: Hi"}, [HI, YO, HI]),  # ends with a question
        ({"chosen": "Human: Hi\n\nAssistant: Yo"}, [HI]),  # no blank line at the start
        ({"chosen": "\n\nHuman: Hi\n\nAssistant:"}, [HI]),  # an empty answer
        ({"chosen": HH + "\n\nAssistant: Yo"}, [HI]),  # two answers
        ({"chosen": "\n\nAssistant: Yo" + HH}, [YO, HI]),  # the assistant begins
        ({"chosen": "\n\nHuman: \n\nAssistant: Yo"}, [said("user", "")]),
        ({"chosen": [HI, YO], "rejected": [HI, NO]}, [HI]),
    ],
)
def test_prompts(row: dict[str, Any], messages: list[dict[str, str]]) -> None:
    assert list(prompt_shape(row).messages) == messages


def test_completions_of_generate_are_prompts_with_their_columns() -> None:
    row = {
        "prompt": [HI],
        "completion": [YO],
        "sample": 1,
        "metadata": {"label": "x"},
    }
    shape = prompt_shape(row)
    assert shape.messages == (HI,)
    assert shape.metadata == {"label": "x", "completion": [YO], "sample": 1}


def test_columns_beside_the_prompt_are_what_json_can_hold() -> None:
    row = {"prompt": "Hi", "at": datetime(2026, 1, 2, tzinfo=UTC), "n": [1, {"a": None}]}
    assert set(prompt_shape(row).metadata) == {"at", "n"}
    with pytest.raises(BadRow, match="column 'image' holds a value of type bytes, which a reward"):
        prompt_shape({"prompt": "Hi", "image": b"\x89PNG"})


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({}, "there is no column prompt, messages, .* or chosen; the row has no columns"),
        ({"prompt": ""}, "column 'prompt' is empty"),
        ({"prompt": {}}, "message 1 is no message"),
        ({"prompt": True}, "column 'prompt' holds true or false"),
        ({"prompt": [HI, TEXT]}, "mixes plain text with messages"),
        ({"prompt": [HI, YO]}, "holds no question before"),
        ({"messages": [YO]}, "holds no question before"),
        ({"conversations": [by("alien", "Hi")]}, "message 1 is no message with a role"),
        ({"conversations": [by("human", 3)]}, "message 1 is no message with a role"),  # type: ignore[arg-type]
        ({"chosen": "Hi"}, "not in the HH-RLHF form"),
        ({"chosen": "\n\nAssistant: Yo"}, "holds no question before"),
    ],
)
def test_what_is_wrong_with_a_prompt(row: dict[str, Any], says: str) -> None:
    with pytest.raises(BadRow, match=says):
        prompt_shape(row)


@pytest.mark.parametrize(
    ("row", "messages", "answer"),
    [
        ({"messages": [HI, YO]}, [HI, YO], None),
        ({"conversations": SHAREGPT}, [said("system", "Be kind"), HI, YO], None),
        ({"prompt": [HI], "completion": "Yo"}, [HI, YO], None),
        ({"prompt": "Hi", "completion": "Yo"}, [TEXT], "Yo"),
        ({"prompt": "Hi", "completion": [YO]}, [TEXT], "Yo"),
        ({"prompt": [TEXT], "completion": [YO]}, [TEXT], "Yo"),  # once written by generate
        ({"text": "Hi"}, [TEXT], None),
        ({"text": HH}, [HI, YO], None),
        ({"chosen": HH, "rejected": "\n\nHuman: Hi\n\nAssistant: No"}, [HI, YO], None),
        ({"prompt": "Hi", "chosen": "Yo", "rejected": "No"}, [TEXT], "Yo"),
    ],
)
def test_demonstrations(row: Any, messages: list[dict[str, str]], answer: str | None) -> None:
    shape = demonstration_shape(row)
    assert (list(shape.messages), shape.answer) == (messages, answer)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [HI], "chosen": [YO], "rejected": [NO]},
        {"prompt": [HI], "chosen": YO, "rejected": NO},
        {"prompt": [HI], "chosen": "Yo", "rejected": "No"},
        {"prompt": "Hi", "chosen": [HI, YO], "rejected": [HI, NO]},
        {"chosen": [HI, YO], "rejected": [HI, NO]},
        {"chosen": [by("human", "Hi"), by("gpt", "Yo")], "rejected": [HI, NO]},
        {"chosen": HH, "rejected": "\n\nHuman: Hi\n\nAssistant: No"},
        {"chosen": HH, "rejected": "Human: Hi\n\nAssistant: No"},
        {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Yo", "rejected": " No"},
    ],
)
def test_comparisons_of_conversations(row: dict[str, Any]) -> None:
    shape = comparison_shape(row)
    assert (list(shape.messages), shape.chosen, shape.rejected) == ([HI], "Yo", "No")


def test_an_empty_answer_of_hh_rlhf_is_an_answer() -> None:
    shape = comparison_shape({"chosen": HH, "rejected": "\n\nHuman: Hi\n\nAssistant:"})
    assert (list(shape.messages), shape.chosen, shape.rejected) == ([HI], "Yo", "")


@pytest.mark.parametrize(("margin", "number"), [(2, 2.0), ("1.5", 1.5), ("", None), (None, None)])
def test_margins_may_be_text_as_in_a_table(margin: Any, number: float | None) -> None:
    row = {"prompt": "Hi", "chosen": "Yo", "rejected": "No", "margin": margin}
    assert comparison_shape(row).margin == number


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"question": "x"}, "of no known shape; the row has question"),
        ({"prompt": "x", "chosen": "y"}, "it lacks rejected beside chosen and prompt"),
        ({"chosen": HH + "\n\nHuman: Hi", "rejected": HH}, "'chosen' does not end with the assist"),
        ({"chosen": HH, "rejected": HH + HH}, "the same conversation up to one last"),
        ({"prompt": "Ho", "chosen": [HI, YO], "rejected": [HI, NO]}, "do not begin with the prom"),
        ({"prompt": [HI, YO], "chosen": "x", "rejected": "y"}, "ends with the assistant's turn"),
        ({"prompt": "x", "chosen": "y", "rejected": "z", "margin": "nan"}, "a finite number"),
    ],
)
def test_what_is_wrong_with_a_comparison(row: dict[str, Any], says: str) -> None:
    with pytest.raises(BadRow, match=says):
        comparison_shape(row)


@pytest.mark.parametrize(
    ("label", "good"), [(True, True), ("False", False), (1, True), (0.0, False), ("1", True)]
)
def test_judgements_of_single_completions(label: Any, good: bool) -> None:
    row = {"prompt": [HI], "completion": [YO], "label": label}
    assert is_judgement(row)
    assert judgement_shape(row) == JudgementShape((HI,), "Yo", good)
    assert judgement_shape({**row, "completion": "Yo"}).completion == "Yo"
    assert not is_judgement({**row, "chosen": "Yo", "rejected": "No"})  # a pair says more


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "Hi", "completion": "Yo", "label": "good"}, "column 'label' holds 'good'"),
        ({"prompt": "Hi", "completion": "Yo", "label": 0.5}, "column 'label' holds 0.5"),
        ({"completion": "Yo", "label": True}, "lacks prompt beside completion and label"),
        ({"prompt": [HI, YO], "completion": "Yo", "label": True}, "ends with the assistant"),
    ],
)
def test_bad_judgements(row: dict[str, Any], what: str) -> None:
    with pytest.raises(BadRow, match=what):
        judgement_shape(row)
