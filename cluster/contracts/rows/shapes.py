"""What a row says, recognised by its columns: a prompt, a demonstration, or a comparison.

    prompts          prompt; messages; conversations (ShareGPT); input; chosen; a question of a
                     standard evaluation set (``question_sets``)
    demonstrations   messages; conversations; prompt + completion; text; chosen + rejected
    comparisons      prompt + chosen + rejected; chosen + rejected that begin alike

Wherever a text or a conversation is expected, ``messages.read_messages`` says what may stand there.
Everything here is pure; every mistake is a BadRow.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.contracts.chat import is_text, text_prompt
from cluster.contracts.rows.columns import (
    columns_of,
    listed,
    optional_number,
    present,
    unknown_shape,
)
from cluster.contracts.rows.files import BadRow, Columns, kind_of
from cluster.contracts.rows.messages import (
    Messages,
    hh_turns,
    is_hh,
    read_messages,
    without_reply,
)
from cluster.contracts.rows.question_sets import question_of

PROMPT_COLUMNS = ("prompt", "messages", "conversations", "input", "chosen")
WHOLE_CONVERSATIONS = ("messages", "conversations", "chosen")
DEMONSTRATION_SHAPES = (
    ("messages",),
    ("conversations",),
    ("prompt", "completion"),
    ("text",),
    ("chosen", "rejected"),
)
COMPARISON_SHAPES = (("prompt", "chosen", "rejected"), ("chosen", "rejected"))
THREE_COLUMNS = "give prompt, chosen and rejected as three columns"


@dataclass(frozen=True, slots=True)
class PromptShape:
    """``metadata``: every other column of the row."""

    messages: Messages
    metadata: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class DemonstrationShape:
    """A conversation with at least one assistant turn; or a plain-text prompt with ``answer``; or
    (``answer`` None) a plain text that is trained as a whole."""

    messages: Messages
    answer: str | None


@dataclass(frozen=True, slots=True)
class ComparisonShape:
    """``margin``: how much better ``chosen`` is, None where the row does not say."""

    messages: Messages
    chosen: str
    rejected: str
    margin: float | None


# -- prompts ---------------------------------------------------------------------------------------


def prompt_shape(columns: Columns, key: str = "") -> PromptShape:
    """The prompt in column ``key``, or (empty) in the first column that may hold one."""
    question = None if key else question_of(columns)
    if question is not None:
        metadata = _metadata(columns, set(question.used)) | question.metadata()
        return PromptShape(({"role": "user", "content": question.turns[0]},), metadata)
    column = key or next((c for c in PROMPT_COLUMNS if columns.get(c) is not None), "")
    if not column or columns.get(column) is None:
        wanted = f"column {key!r}" if key else f"column {listed(PROMPT_COLUMNS)}"
        raise BadRow(
            f"no prompt: there is no {wanted}; {columns_of(columns)}",
            "name the prompt's column in data.prompt_key",
        )
    value = columns[column]
    if column == "chosen" and isinstance(value, str) and not is_hh(value):
        raise BadRow(
            "column 'chosen' holds text that is not in the HH-RLHF form",
            "begin it with a blank line and 'Human:', or give a column 'prompt'",
        )
    messages = read_messages(value, column)
    if column in WHOLE_CONVERSATIONS or isinstance(value, str):
        messages = without_reply(messages)
    if not messages or messages[-1]["role"] == "assistant":
        raise BadRow(
            f"column {column!r} holds no question before the assistant's answer",
            "let the conversation end with a user's turn (or one answer to it)",
        )
    used = {column, "rejected"} if column == "chosen" else {column}
    return PromptShape(messages, _metadata(columns, used))


def _metadata(columns: Columns, used: set[str]) -> dict[str, Any]:
    metadata = {name: value for name, value in columns.items() if name not in used}
    nested = metadata.get("metadata")
    if isinstance(nested, dict):  # its entries count as columns of the row
        metadata = {**metadata.pop("metadata"), **metadata}
    style = metadata.get("reward_model")  # verl keeps the label one level down
    if isinstance(style, dict) and "ground_truth" in style:
        metadata.setdefault("ground_truth", style["ground_truth"])
    for name, value in metadata.items():
        _require_json(name, value)
    return metadata


def _require_json(name: str, value: Any) -> None:
    """The columns beside the prompt travel to the reward service as JSON."""
    try:
        json.dumps(value, default=_date)
    except (TypeError, ValueError, RecursionError):
        raise BadRow(
            f"column {name!r} holds {kind_of(value)}, which a reward function cannot be given",
            "leave the column out of the file, or store it as text or numbers",
        ) from None


def _date(value: Any) -> str:
    if hasattr(value, "isoformat"):
        return str(value.isoformat())
    raise TypeError


# -- demonstrations --------------------------------------------------------------------------------


def demonstration_shape(columns: Columns) -> DemonstrationShape:
    there = present(columns)
    for column in ("messages", "conversations"):
        if column in there:
            return _conversation(_chat(columns[column], column))
    if {"prompt", "completion"} <= there:
        return _completed(columns["prompt"], columns["completion"])
    if "text" in there:
        text = columns["text"]
        if not isinstance(text, str) or not text:
            found = "an empty text" if text == "" else kind_of(text)
            raise BadRow(f"column 'text' holds {found}", "give it a text")
        return _conversation(hh_turns(text)) if is_hh(text) else _plain(text, None)
    if {"chosen", "rejected"} <= there:
        pair = comparison_shape(columns)
        return _completed(pair.messages, pair.chosen)
    raise unknown_shape(columns, DEMONSTRATION_SHAPES)


def _completed(prompt: Any, completion: Any) -> DemonstrationShape:
    before = read_messages(prompt, "prompt")
    if is_text(before):
        return DemonstrationShape(before, completion_text(completion, "completion"))
    after: Messages
    if isinstance(completion, str):
        after = ({"role": "assistant", "content": completion},)
    else:
        after = _chat(completion, "completion")
    return _conversation((*before, *after))


def _plain(text: str, answer: str | None) -> DemonstrationShape:
    return DemonstrationShape(text_prompt(text), answer)


def _conversation(messages: Messages) -> DemonstrationShape:
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise BadRow(
            f"no assistant turn to learn from (roles: {', '.join(roles)})",
            "end the conversation with a message of the role assistant",
        )
    return DemonstrationShape(messages, None)


# -- comparisons -----------------------------------------------------------------------------------


def comparison_shape(columns: Columns) -> ComparisonShape:
    there = present(columns)
    if not {"chosen", "rejected"} <= there:
        raise unknown_shape(columns, COMPARISON_SHAPES)
    chosen, rejected = columns["chosen"], columns["rejected"]
    if "prompt" in there:
        messages, one, other = _with_prompt(columns["prompt"], chosen, rejected)
    else:
        messages, one, other = _split_shared(chosen, rejected)
    # One empty answer is a fact worth learning (the policy said nothing); two are a mistake.
    if not one.strip() and not other.strip():
        raise BadRow("both answers are empty")
    return ComparisonShape(messages, one, other, optional_number(columns, "margin"))


def prompt_messages(prompt: Any) -> Messages:
    """The column `prompt` beside completions: it ends where a completion can follow."""
    messages = read_messages(prompt, "prompt")
    if messages[-1]["role"] == "assistant":
        raise BadRow("the prompt ends with the assistant's turn", "end it with the user's turn")
    return messages


def _with_prompt(prompt: Any, chosen: Any, rejected: Any) -> tuple[Messages, str, str]:
    messages = prompt_messages(prompt)
    if all(isinstance(side, list) and len(side) > 1 for side in (chosen, rejected)):
        shared, one, other = _split_shared(chosen, rejected)
        same = shared[-1]["content"] if isinstance(prompt, str) else shared
        if same not in (prompt, messages):
            raise BadRow("the conversations in chosen and rejected do not begin with the prompt")
        return shared, one, other
    one, other = completion_text(chosen, "chosen"), completion_text(rejected, "rejected")
    if isinstance(prompt, str) and not is_text(messages):  # HH-RLHF: the blank belongs to the form
        one, other = one.strip(), other.strip()
    return messages, one, other


def completion_text(value: Any, column: str) -> str:
    """A completion beside a prompt: text, or one assistant message."""
    if isinstance(value, str):
        return value
    messages = _chat(value, column)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise BadRow(
            f"column {column!r} beside a prompt must be one assistant message; its roles are "
            f"{', '.join(message['role'] for message in messages)}",
            "move earlier turns into `prompt`, or drop `prompt` and give whole conversations",
        )
    return messages[0]["content"]


def _split_shared(chosen: Any, rejected: Any) -> tuple[Messages, str, str]:
    """Prompt and answers of two whole texts or conversations that begin alike."""
    texts = isinstance(chosen, str) and isinstance(rejected, str)
    if texts and not (is_hh(chosen) and is_hh(rejected)):
        return _split_texts(chosen, rejected)
    one, other = _whole(chosen, "chosen"), _whole(rejected, "rejected")
    if len(one) < 2 or one[:-1] != other[:-1]:
        raise BadRow(
            "without a prompt, chosen and rejected must be the same conversation up to one last "
            "assistant message",
            THREE_COLUMNS,
        )
    return one[:-1], one[-1]["content"], other[-1]["content"]


def _whole(value: Any, column: str) -> Messages:
    """A conversation that ends with the assistant's answer, which may be empty in HH-RLHF."""
    messages = read_messages(value, column)
    if isinstance(value, str) and value.rstrip().endswith("\n\nAssistant:"):
        messages = (*messages, {"role": "assistant", "content": ""})
    if messages[-1]["role"] != "assistant":
        raise BadRow(
            f"column {column!r} does not end with the assistant's answer",
            "end both conversations with the answers that are compared",
        )
    return messages


def _split_texts(chosen: str, rejected: str) -> tuple[Messages, str, str]:
    same = 0
    while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
        same += 1
    # Answers may begin with the same letters: go back to where a word begins.
    while same > 0 and not chosen[same - 1].isspace():
        same -= 1
    prompt = chosen[:same].rstrip()
    if not prompt:
        raise BadRow(
            "without a prompt, chosen and rejected must begin with the same text", THREE_COLUMNS
        )
    return text_prompt(prompt), chosen[len(prompt) :], rejected[len(prompt) :]


def _chat(value: Any, column: str) -> Messages:
    if isinstance(value, str) and not is_hh(value):
        raise BadRow(
            f"column {column!r} holds text, not messages",
            'give a list of {"role": "user", "content": "..."}',
        )
    return read_messages(value, column)
