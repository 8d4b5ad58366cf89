"""One cell of a row -> messages: lists of messages, ShareGPT turns, HH-RLHF text, plain text."""

from __future__ import annotations

import re
from typing import Any

from cluster.contracts.chat import is_text, text_prompt
from cluster.contracts.rows.files import BadRow, kind_of

Messages = tuple[dict[str, str], ...]

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    **{role: role for role in ROLES},
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
}
WANTED = 'give text, or a list of {"role": "user", "content": "..."}'

_HH_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_HH_START = re.compile(r"\A\s*\n\n(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


def read_messages(value: Any, column: str) -> Messages:
    """Messages of a cell. Plain text is one message with the role ``text``.

    Text in the HH-RLHF form becomes its turns; the empty "Assistant:" that such a prompt ends with
    is dropped. Raises BadRow.
    """
    if isinstance(value, str):
        if not value.strip():
            raise BadRow(f"column {column!r} is empty", "give it a text")
        return hh_turns(value) if is_hh(value) else text_prompt(value)
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, list | tuple) or not turns:
        found = "an empty list" if isinstance(turns, list | tuple) else kind_of(value)
        raise BadRow(f"column {column!r} holds {found}", WANTED)
    messages = tuple(_message(turn, column, place) for place, turn in enumerate(turns, start=1))
    # `accord generate` and preference stores write plain text as a message with the role "text".
    if any(m["role"] == "text" for m in messages) and not is_text(messages):
        raise BadRow(f"column {column!r} mixes plain text with messages", WANTED)
    return messages


def _message(turn: Any, column: str, place: int) -> dict[str, str]:
    fields = turn if isinstance(turn, dict) else {}
    if "from" in fields and "role" not in fields:
        role, content = SHAREGPT_ROLES.get(str(fields["from"])), fields.get("value")
    else:
        role, content = fields.get("role"), fields.get("content")
    if role not in (*ROLES, "text") or not isinstance(content, str):
        raise BadRow(
            f"column {column!r}, message {place} is no message with a role ({', '.join(ROLES)}) "
            "and text",
            WANTED,
        )
    return {"role": str(role), "content": content}


def is_hh(text: str) -> bool:
    """Whether a text is a conversation in the form of Anthropic's HH-RLHF data: turns that begin
    with a blank line and "Human:" or "Assistant:". A few of its rows lack the first blank line."""
    if _HH_START.match(text):
        return True
    first = _HH_TURN.match(text)
    return first is not None and "\n\nAssistant:" in text


def hh_turns(text: str) -> Messages:
    """The turns of a text for which ``is_hh``; a last "Assistant:" with nothing after it marks
    where an answer goes and is no turn."""
    pieces = _HH_TURN.split(text)[1:]
    turns = tuple(
        {"role": _HH_ROLES[name], "content": content.strip()}
        for name, content in zip(pieces[::2], pieces[1::2], strict=True)
    )
    if len(turns) > 1 and turns[-1] == {"role": "assistant", "content": ""}:
        return turns[:-1]
    return turns


def without_reply(messages: Messages) -> Messages:
    """A conversation up to the assistant's last reply, which may be several turns, or none."""
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    return messages[:end]
