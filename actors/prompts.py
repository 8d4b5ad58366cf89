"""Prompts in a fixed, seekable order, from the shapes in which people keep them.

Recognised by their columns, in this order:

    prompt            text, or messages (TRL; verl's Parquet adds reward_model and extra_info)
    messages          a conversation; the assistant's last turn is dropped
    input             text (OpenRLHF)
    chosen            HH-RLHF text with "\\n\\nHuman:" turns, or messages; the last turn is dropped

Every other column becomes the prompt's metadata. All rows are read, checked and tokenised before
training starts, so that row 90 000 cannot end a run in its second hour.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.contracts.chat import is_text, render_prompt, require_template, text_prompt
from cluster.contracts.config.rollout import DataConfig
from cluster.contracts.errors import UserError
from cluster.contracts.records import Message, Prompt

DATASETS = "datasets:"
ROLES = ("system", "user", "assistant")
HH_TURN = re.compile(r"\n\n(Human|Assistant):")
HH_ROLES = {"Human": "user", "Assistant": "assistant"}
SHAPES = "prompt, messages, input, or chosen"

Row = Mapping[str, Any]


class FilePromptSource:
    """``PromptSource`` over a list. ``prompt(n)`` depends on n, the seed and the file alone.

    Each epoch is a permutation of its own, so the position in the data is just a number and
    resuming needs no other state. ``skipped`` counts the rows left out as too long.
    """

    def __init__(
        self, prompts: Sequence[Prompt], seed: int, shuffle: bool = True, skipped: int = 0
    ) -> None:
        if not prompts:
            raise ValueError("no prompts")
        self._prompts = tuple(prompts)
        self._seed = seed
        self._shuffle = shuffle
        self.skipped = skipped
        self._epoch = -1
        self._order: list[int] = []

    def __len__(self) -> int:
        return len(self._prompts)

    def prompt(self, ordinal: int) -> Prompt:
        """The ordinal-th prompt ever admitted, from 0; without end."""
        if ordinal < 0:
            raise IndexError(f"prompt {ordinal}")
        epoch, place = divmod(ordinal, len(self._prompts))
        if not self._shuffle:
            return self._prompts[place]
        if epoch != self._epoch:
            order = list(range(len(self._prompts)))
            random.Random(f"prompts/{self._seed}/{epoch}").shuffle(order)
            self._epoch, self._order = epoch, order
        return self._prompts[self._order[place]]


def load_prompts(
    cfg: DataConfig, tokenizer: Any, seed: int, room: int | None = None
) -> FilePromptSource:
    """Read, check and tokenise everything ``cfg.prompts`` names. ``room``: tokens that the model's
    context leaves for a prompt.

    Raises UserError naming file and row for a missing or empty file, a row that is no JSON object
    or has no prompt, text that is not valid Unicode, a prompt over ``max_prompt_tokens`` or
    ``room``.
    """
    prompts: list[Prompt] = []
    skipped = 0
    for where, number, row in read_rows(cfg.prompts, cfg.split):
        prompt = _prompt(row, cfg.prompt_key, tokenizer, number, where)
        tokens = len(prompt.token_ids)
        if tokens <= min(cfg.max_prompt_tokens, room or tokens):
            prompts.append(prompt)
        elif cfg.skip_long_prompts:
            skipped += 1
        else:
            raise _too_long(tokens, cfg.max_prompt_tokens, room, where)
    if not prompts:
        what = f"all {skipped} prompts are too long" if skipped else "there are no prompts"
        raise UserError(what, where=cfg.prompts, fix="give a file with at least one usable row")
    return FilePromptSource(prompts, seed, cfg.shuffle, skipped)


def _too_long(tokens: int, most: int, room: int | None, where: str) -> UserError:
    if room is not None and room < most:
        limit = f"the model's context leaves {room} beside rollout.max_tokens"
        fix = "shorten the prompt, lower rollout.max_tokens"
    else:
        limit, fix = f"data.max_prompt_tokens is {most}", "raise data.max_prompt_tokens"
    return UserError(
        f"the prompt has {tokens} tokens, {limit}",
        where=where,
        fix=f"{fix}, or set data.skip_long_prompts = true",
    )


# -- rows ------------------------------------------------------------------------------------------


def read_rows(path: str, split: str) -> Iterator[tuple[str, int, Row]]:
    """(where, number, row) of a JSONL or Parquet file or a datasets name; numbers start at 1."""
    if path.startswith(DATASETS):
        yield from _datasets_rows(path.removeprefix(DATASETS), split)
        return
    file = Path(path)
    if not file.is_file():
        what = "is a directory" if file.is_dir() else "no such file"
        raise UserError(what, where=path, fix="give a JSONL or Parquet file, or datasets:NAME")
    if file.suffix == ".parquet":
        yield from _parquet_rows(file)
    elif file.suffix in (".jsonl", ".json", ".ndjson"):
        yield from _jsonl_rows(file)
    else:
        raise UserError(
            f"unknown kind of file {file.suffix!r}",
            where=path,
            fix="name it .jsonl or .parquet, as what it is",
        )


def _jsonl_rows(file: Path) -> Iterator[tuple[str, int, Row]]:
    number = 0
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    where = f"{file}, line {number}"
                    yield where, number, _json_row(line, where)
    except UnicodeDecodeError as problem:
        raise UserError(
            f"not valid UTF-8: {problem.reason}",
            where=f"{file}, after line {number}",
            fix="save the file as UTF-8",
        ) from None


def _json_row(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as problem:
        raise UserError(
            f"not JSON: {problem.msg}, column {problem.colno}",
            where=where,
            fix="write one JSON object a line",
        ) from None
    if not isinstance(row, dict):
        raise UserError(
            f"holds a {type(row).__name__}, not an object",
            where=where,
            fix="write one JSON object a line",
        )
    return row


def _parquet_rows(file: Path) -> Iterator[tuple[str, int, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
        number = 0
        for batch in table.iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{file}, row {number}", number, row
    except (pa.ArrowInvalid, OSError) as problem:
        raise UserError(
            f"not a readable Parquet file: {problem}", where=str(file), fix="write it again"
        ) from None


def _datasets_rows(name: str, split: str) -> Iterator[tuple[str, int, Row]]:
    import datasets

    try:
        data = datasets.load_dataset(name, split=split)
    except Exception as problem:  # it raises a dozen types, for the network and for names
        raise UserError(
            f"cannot load the data set: {problem}",
            where=f"{DATASETS}{name}, split {split}",
            fix="check the name, data.split and the network",
        ) from problem
    for number, row in enumerate(data, start=1):
        yield f"{DATASETS}{name}, split {split}, row {number}", number, row


# -- one row ---------------------------------------------------------------------------------------


def _prompt(row: Row, key: str, tokenizer: Any, number: int, where: str) -> Prompt:
    _check_unicode(row, where)
    messages, metadata = _messages_and_metadata(row, key, where)
    if not is_text(messages):
        require_template(tokenizer, where)
    token_ids = tuple(render_prompt(tokenizer, messages))
    if not token_ids:
        raise UserError("the prompt is empty", where=where, fix="remove that row")
    content = json.dumps(messages, ensure_ascii=False, sort_keys=True).encode()
    return Prompt(
        id=f"{number:07d}-{hashlib.sha256(content).hexdigest()[:16]}",
        messages=messages,
        token_ids=token_ids,
        metadata=metadata,
    )


def _messages_and_metadata(
    row: Row, key: str, where: str
) -> tuple[tuple[Message, ...], dict[str, Any]]:
    column = key or next(
        (name for name in ("prompt", "messages", "input", "chosen") if row.get(name) is not None),
        "",
    )
    if not column or row.get(column) is None:
        wanted = f"column {key!r}" if key else f"column {SHAPES}"
        raise UserError(
            f"no prompt: there is no {wanted}; the row has {', '.join(map(str, row)) or 'nothing'}",
            where=where,
            fix="name the column in data.prompt_key",
        )
    messages = _messages(row[column], column, where)
    used = {column, "rejected"} if column == "chosen" else {column}
    metadata = {str(name): value for name, value in row.items() if name not in used}
    nested = metadata.get("metadata")
    if isinstance(nested, dict):  # its entries count as columns of the row
        metadata = {**metadata.pop("metadata"), **metadata}
    style = metadata.get("reward_model")  # verl keeps the label one level down
    if isinstance(style, dict) and "ground_truth" in style:
        metadata.setdefault("ground_truth", style["ground_truth"])
    return messages, metadata


def _messages(value: Any, column: str, where: str) -> tuple[Message, ...]:
    answered = column in ("messages", "chosen")
    if isinstance(value, str):
        if not value.strip():
            raise UserError("the prompt is empty", where=where, fix="remove that row")
        if column != "chosen":
            return text_prompt(value)
        messages = _human_assistant_turns(value, where)
    else:
        messages = _checked_messages(value, column, where)
    if answered and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1]["role"] == "assistant":
        raise UserError(
            f"column {column!r} holds no question before the assistant's answer",
            where=where,
            fix="let the conversation end with a user's turn (or one answer to it)",
        )
    return tuple(messages)


def _checked_messages(value: Any, column: str, where: str) -> list[dict[str, str]]:
    fix = 'give text, or a list of {"role": "user", "content": "..."}'
    if not isinstance(value, list) or not value:
        kind = "an empty list" if value == [] else f"a {type(value).__name__}"
        raise UserError(f"column {column!r} holds {kind}", where=where, fix=fix)
    messages = []
    for place, message in enumerate(value):
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if role not in ROLES or not isinstance(content, str):
            raise UserError(
                f"column {column!r}, message {place + 1} is no message with a role "
                f"({', '.join(ROLES)}) and text",
                where=where,
                fix=fix,
            )
        messages.append({"role": role, "content": content})
    return messages


def _human_assistant_turns(text: str, where: str) -> list[dict[str, str]]:
    before, *pieces = HH_TURN.split(text)
    if before.strip() or not pieces:
        raise UserError(
            "column 'chosen' is not in the HH-RLHF form",
            where=where,
            fix="begin it with a blank line and 'Human:', or give a column 'prompt'",
        )
    return [
        {"role": HH_ROLES[name], "content": content.strip()}
        for name, content in zip(pieces[::2], pieces[1::2], strict=True)
    ]


def _check_unicode(row: Row, where: str) -> None:
    """JSON can spell half a surrogate pair, which no tokenizer, Arrow table or message takes."""
    for column, value in row.items():
        text = json.dumps([column, value], ensure_ascii=False, default=str)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"column {column!r} holds half of a surrogate pair, which is no character",
                where=where,
                fix="write the text as valid Unicode",
            ) from None
