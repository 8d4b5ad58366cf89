"""Messages -> token ids, once, the same way everywhere (rollouts, SFT, reward model, DPO).

The tokenizer is passed in (a transformers tokenizer; nothing heavy is imported here). The chat
template owns every special token: text is rendered first and encoded without adding any, so that
BOS is never doubled. A prompt that is plain text is one message with the role ``text``: it is
encoded as the tokenizer does by itself, without a template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.contracts.errors import UserError

TEXT = "text"
Messages = Sequence[Mapping[str, str]]


class TemplateRefusal(UserError):
    """A chat template raised an error for the messages of one row."""


def text_prompt(text: str) -> tuple[dict[str, str], ...]:
    return ({"role": TEXT, "content": text},)


def is_text(messages: Messages) -> bool:
    return len(messages) == 1 and messages[0]["role"] == TEXT


def require_template(tokenizer: Any, where: str) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "the tokenizer has no chat template, but the data holds chat messages",
            where=where,
            fix="set model.chat_template to a Jinja file, or give prompts as plain text",
        )


def render_prompt(tokenizer: Any, messages: Messages) -> list[int]:
    """Ids of the prompt up to where the assistant's answer begins."""
    if is_text(messages):
        return list(tokenizer(messages[0]["content"])["input_ids"])
    return _encode(tokenizer, _render(tokenizer, messages, generation=True))


def render_answered(tokenizer: Any, messages: Messages, answer: str) -> tuple[list[int], list[int]]:
    """(prompt ids, answer ids): the answer with the end token(s) the template puts after it.

    Raises UserError when the template's rendering of the answered conversation does not begin with
    its rendering of the prompt, because token positions would then mean different things in
    training and in generation.
    """
    if is_text(messages):
        prompt = render_prompt(tokenizer, messages)
        ids = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
        return prompt, [*ids, tokenizer.eos_token_id]
    before = _render(tokenizer, messages, generation=True)
    whole = _render(
        tokenizer, [*messages, {"role": "assistant", "content": answer}], generation=False
    )
    if not whole.startswith(before):
        raise UserError(
            "the chat template renders an answered conversation differently from its prompt",
            where=str(getattr(tokenizer, "name_or_path", "tokenizer")),
            fix="use a template whose generation prompt is a prefix of the assistant turn",
        )
    # A template may end the turn with white space after the end token; the model stops at the end
    # token, so nothing after it is ever generated or trained.
    return _encode(tokenizer, before), _encode(
        tokenizer, _cut_after_end(tokenizer, whole[len(before) :])
    )


def render_conversation(tokenizer: Any, messages: Messages) -> tuple[list[int], list[bool]]:
    """Ids of a whole conversation and which of them the assistant wrote (end token included).

    Each assistant turn is found by rendering the conversation up to it, never by searching strings.
    """
    ids: list[int] = []
    mask: list[bool] = []
    done = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:index], generation=True)
        after = _render(tokenizer, messages[: index + 1], generation=False)
        if not before.startswith(done) or not after.startswith(before):
            raise UserError(
                "the chat template is not stable under adding turns, so the assistant's tokens "
                "cannot be told apart",
                where=str(getattr(tokenizer, "name_or_path", "tokenizer")),
                fix="use a template that only appends text for each turn",
            )
        context, turn = before[len(done) :], after[len(before) :]
        ended = _cut_after_end(tokenizer, turn)
        for piece, own in ((context, False), (ended, True), (turn[len(ended) :], False)):
            new = _encode(tokenizer, piece) if piece else []
            ids += new
            mask += [own] * len(new)
        done = after
    last = max((i for i, own in enumerate(mask) if own), default=-1)
    return ids[: last + 1], mask[: last + 1]


def _cut_after_end(tokenizer: Any, turn: str) -> str:
    end = tokenizer.eos_token
    return turn[: turn.rindex(end) + len(end)] if end and end in turn else turn


def _render(tokenizer: Any, messages: Messages, *, generation: bool) -> str:
    plain = [dict(message) for message in messages]
    try:
        return str(
            tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=generation)
        )
    except Exception as problem:  # a template is a program: it raises what it likes
        roles = ", ".join(message["role"] for message in messages)
        raise TemplateRefusal(
            f"the chat template refuses these messages (roles: {roles}): {problem}",
            where=str(getattr(tokenizer, "name_or_path", "tokenizer")),
            fix="order the roles as the template wants, or set model.chat_template to another one",
        ) from problem


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
