"""Rows of a file -> demonstrations or comparisons, in the shapes TRL made customary.

Supervised: `messages`; `prompt` + `completion`; `text`. Comparisons: `prompt` + `chosen` +
`rejected`; `chosen` + `rejected` that share their beginning; an optional number `margin`. Prompts
and answers are strings (a string prompt is used as it is, without a chat template) or lists of
{role, content} messages. Every error names file and row. Nothing is tokenised here.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from cluster.contracts.chat import text_prompt
from cluster.contracts.errors import UserError
from learner.offline.row_files import Row, read_rows

Messages = tuple[dict[str, str], ...]

SFT_SHAPES = (("messages",), ("prompt", "completion"), ("text",))
PAIR_SHAPES = (("prompt", "chosen", "rejected"), ("chosen", "rejected"))


class Keyed(Protocol):
    @property
    def key(self) -> str: ...


K = TypeVar("K", bound=Keyed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """messages: a conversation with at least one assistant turn, or a plain-text prompt with
    `answer`, or (answer None) a plain text trained as a whole. where: file and row. key: the
    prompt, by which rows are held out."""

    where: str
    messages: Messages
    answer: str | None
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One prompt, a preferred and a rejected answer. margin: how much better, None if unknown."""

    where: str
    messages: Messages
    chosen: str
    rejected: str
    margin: float | None
    key: str


def read_demonstrations(path: str, split: str = "train") -> list[Demonstration]:
    return [_demonstration(row, where) for where, row in read_rows(path, split)]


def read_comparisons(path: str, split: str = "train") -> list[Comparison]:
    return [_comparison(row, where) for where, row in read_rows(path, split)]


def hold_out(rows: Iterable[K], fraction: float) -> tuple[list[K], list[K]]:
    """(training rows, held-out rows), all rows of one prompt on one side, whatever else is in the
    file: the side depends on the prompt's hash alone. With a fraction over 0 and two prompts or
    more, neither side is empty."""
    rows = list(rows)
    share = {row.key: _unit_hash(row.key) for row in rows}
    held = {key for key, value in share.items() if value < fraction}
    if fraction > 0 and len(share) > 1:
        ordered = sorted(share, key=lambda key: share[key])
        held = (held or {ordered[0]}) - ({ordered[-1]} if len(held) == len(share) else set())
    return [r for r in rows if r.key not in held], [r for r in rows if r.key in held]


def _unit_hash(key: str) -> float:
    return int.from_bytes(hashlib.sha256(key.encode("utf-8")).digest()[:8], "big") / 2**64


def _demonstration(row: Row, where: str) -> Demonstration:
    present = _columns(row)
    if "messages" in present:
        messages = _messages(row["messages"], "messages", where)
        return _conversation(messages, where)
    if {"prompt", "completion"} <= present:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            return Demonstration(
                where=where, messages=text_prompt(prompt), answer=completion, key=prompt
            )
        before = _prompt(prompt, where)
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        return _conversation((*before, *_messages(completion, "completion", where)), where)
    if "text" in present:
        text = row["text"]
        if not isinstance(text, str) or not text:
            raise _wrong_type("text", text, "a text that is not empty", where)
        return Demonstration(where=where, messages=text_prompt(text), answer=None, key=text)
    raise _unknown_shape(row, SFT_SHAPES, where)


def _conversation(messages: Messages, where: str) -> Demonstration:
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise UserError(
            f"no assistant turn to learn from (roles: {', '.join(roles)})",
            where=where,
            fix="end the conversation with a message of the role assistant",
        )
    before = messages[: roles.index("assistant")]
    return Demonstration(where=where, messages=messages, answer=None, key=_key(before))


def _comparison(row: Row, where: str) -> Comparison:
    present = _columns(row)
    if not {"chosen", "rejected"} <= present:
        raise _unknown_shape(row, PAIR_SHAPES, where)
    if "prompt" in present:
        messages = _prompt(row["prompt"], where)
        chosen, rejected = (_answer(row[name], name, where) for name in ("chosen", "rejected"))
    else:
        messages, chosen, rejected = _split_shared(row["chosen"], row["rejected"], where)
    # One empty answer is a fact worth learning (the policy said nothing); two are a mistake.
    if not chosen.strip() and not rejected.strip():
        raise UserError("both answers are empty", where=where, fix="leave the row out")
    return Comparison(
        where=where,
        messages=messages,
        chosen=chosen,
        rejected=rejected,
        margin=_margin(row.get("margin"), where),
        key=_key(messages),
    )


def _prompt(prompt: Any, where: str) -> Messages:
    return text_prompt(prompt) if isinstance(prompt, str) else _messages(prompt, "prompt", where)


def _answer(value: Any, column: str, where: str) -> str:
    if isinstance(value, str):
        return value
    messages = _messages(value, column, where)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise UserError(
            f"`{column}` beside a prompt must be one assistant message, found roles "
            f"{[message['role'] for message in messages]}",
            where=where,
            fix="move earlier turns into `prompt`, or drop `prompt` and give whole conversations",
        )
    return messages[0]["content"]


def _split_shared(chosen: Any, rejected: Any, where: str) -> tuple[Messages, str, str]:
    """Prompt and answers of two whole texts or conversations that begin alike."""
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _split_texts(chosen, rejected, where)
    one, other = _messages(chosen, "chosen", where), _messages(rejected, "rejected", where)
    ends = (one[-1]["role"], other[-1]["role"])
    if one[:-1] != other[:-1] or len(one) < 2 or ends != ("assistant", "assistant"):
        raise UserError(
            "without a `prompt`, chosen and rejected must be the same conversation up to one last "
            "assistant message",
            where=where,
            fix="give prompt, chosen and rejected as three columns",
        )
    return one[:-1], one[-1]["content"], other[-1]["content"]


def _split_texts(chosen: str, rejected: str, where: str) -> tuple[Messages, str, str]:
    same = 0
    while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
        same += 1
    # Answers may begin with the same letters: go back to where a word begins.
    while same > 0 and not chosen[same - 1].isspace():
        same -= 1
    prompt = chosen[:same].rstrip()
    if not prompt:
        raise UserError(
            "without a `prompt`, chosen and rejected must begin with the same text",
            where=where,
            fix="give prompt, chosen and rejected as three columns",
        )
    return text_prompt(prompt), chosen[len(prompt) :], rejected[len(prompt) :]


def _messages(value: Any, column: str, where: str) -> Messages:
    wanted = "a list of {role, content} messages"
    if not isinstance(value, list | tuple) or not value:
        raise _wrong_type(column, value, wanted, where)
    result = []
    for item in value:
        fields = item if isinstance(item, dict) else {}
        role, content = fields.get("role"), fields.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise _wrong_type(column, item, wanted, where)
        result.append({"role": role, "content": content})
    return tuple(result)


def _margin(value: Any, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _wrong_type("margin", value, "a finite number", where)
    return float(value)


def _key(messages: Messages) -> str:
    return json.dumps([[m["role"], m["content"]] for m in messages], ensure_ascii=False)


def _columns(row: Row) -> set[str]:
    return {name for name, value in row.items() if value is not None}


def _wrong_type(column: str, value: Any, wanted: str, where: str) -> UserError:
    shown = repr(value) if len(repr(value)) < 60 else repr(value)[:57] + "..."
    return UserError(
        f"`{column}` must be {wanted}, found {shown}", where=where, fix="correct the row"
    )


def _unknown_shape(row: Row, shapes: tuple[tuple[str, ...], ...], where: str) -> UserError:
    found = _columns(row)
    nearest = max(shapes, key=lambda shape: (len(found & set(shape)), -len(shape)))
    missing = [name for name in nearest if name not in found]
    known = "; ".join(" + ".join(shape) for shape in shapes)
    return UserError(
        f"columns {sorted(found)} are of no known shape; the nearest is {' + '.join(nearest)}, "
        f"which lacks {', '.join(missing)}",
        where=where,
        fix=f"rename the columns to one of: {known}",
    )
