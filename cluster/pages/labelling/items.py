"""Rows of a file -> items to label. Which completion is "a" tells nothing about where it came from.

prompt + completions (a list of texts)
prompt + completion_a + completion_b (to completion_d)
prompt + chosen + rejected: a pair; which one was chosen is forgotten
prompt + completion: one per row, as `accord generate` writes them; rows of one prompt are put
together
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.contracts.rows.columns import present, unknown_shape
from cluster.contracts.rows.files import BadRow, Columns, Place, kind_of
from cluster.contracts.rows.messages import Messages, read_messages
from cluster.contracts.rows.reader import LeftOut, read_rows
from cluster.contracts.rows.shapes import comparison_shape
from reward_service.preferences.records import (
    LETTERS,
    Candidate,
    Gold,
    Item,
    derived_id,
    prompt_hash,
)

SHAPES = (
    ("prompt", "completions"),
    ("prompt", "completion_a", "completion_b"),
    ("prompt", "chosen", "rejected"),
    ("prompt", "completion"),
)


@dataclass
class _Prompt:
    messages: Messages
    topic: str = ""
    candidates: dict[str, Candidate] = field(default_factory=dict)  # by text: none twice

    def add(self, new: Iterable[Candidate]) -> None:
        for candidate in new:
            self.candidates.setdefault(candidate.text, candidate)


@dataclass(frozen=True, slots=True)
class ReadItems:
    """``too_few``: prompts without enough different completions for one more item."""

    items: list[Item]
    too_few: int
    left_out: LeftOut


def read_items(path: str, *, completions: int, license: str, created_at: str) -> ReadItems:
    """Items of ``completions`` completions each. A prompt with more of them becomes several items.
    Raises UserError naming file and row."""
    prompts: dict[str, _Prompt] = {}

    def make(place: Place, columns: Columns) -> None:
        messages, candidates = _candidates(columns)
        found = prompts.setdefault(prompt_hash(messages), _Prompt(messages, _topic(columns)))
        found.add(candidates)

    read = read_rows(path, "train", make)
    items, too_few = [], 0
    for prompt in prompts.values():
        all_of_it = list(prompt.candidates.values())
        groups = [all_of_it[at : at + completions] for at in range(0, len(all_of_it), completions)]
        whole = [group for group in groups if len(group) == completions]
        too_few += not whole
        items += [_item(prompt, group, path, license, created_at) for group in whole]
    return ReadItems(items, too_few, read.left_out)


def read_gold(path: str, *, license: str, created_at: str) -> list[Item]:
    """Pairs whose answer is known: the chosen completion."""

    def make(place: Place, columns: Columns) -> Item:
        pair = comparison_shape(columns)
        if pair.chosen == pair.rejected:
            raise BadRow("chosen and rejected are the same completion")
        prompt = _Prompt(pair.messages, _topic(columns))
        group = [Candidate(text=pair.chosen), Candidate(text=pair.rejected)]
        return _item(prompt, group, path, license, created_at, best=pair.chosen)

    return list({item.id: item for item in read_rows(path, "train", make).items}.values())


def _item(
    prompt: _Prompt,
    group: Sequence[Candidate],
    path: str,
    license: str,
    created_at: str,
    best: str | None = None,
) -> Item:
    messages = prompt.messages
    ordered = sorted(group, key=lambda one: derived_id(messages, one.text))
    return Item(
        id=derived_id(messages, best is not None, *(one.text for one in ordered)),
        messages=messages,
        completions=tuple(ordered),
        source=Path(path).name,
        license=license,
        created_at=created_at,
        topic=prompt.topic,
        gold=Gold(ranks=tuple(1 if c.text == best else 2 for c in ordered)) if best else None,
    )


def _candidates(columns: Columns) -> tuple[Messages, list[Candidate]]:
    there = present(columns)
    if {"chosen", "rejected"} <= there:
        pair = comparison_shape(columns)
        return pair.messages, [
            Candidate(text=text, **_provenance(columns, f"_{side}"))
            for side, text in (("chosen", pair.chosen), ("rejected", pair.rejected))
        ]
    if "prompt" not in there:
        raise unknown_shape(columns, SHAPES)
    messages = read_messages(columns["prompt"], "prompt")
    if messages[-1]["role"] == "assistant":
        raise BadRow("the prompt ends with the assistant's turn", "end it with the user's turn")
    if "completions" in there:
        return messages, _listed(columns["completions"])
    lettered = [f"completion_{letter}" for letter in LETTERS if f"completion_{letter}" in there]
    if len(lettered) > 1:
        return messages, [
            Candidate(text=_text(columns[name], name), **_provenance(columns, name[-2:]))
            for name in lettered
        ]
    if "completion" in there:
        text = _text(columns["completion"], "completion")
        return messages, [Candidate(text=text, **_provenance(columns, ""))]
    raise unknown_shape(columns, SHAPES)


def _listed(value: Any) -> list[Candidate]:
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= 64:
        raise BadRow(
            f"column 'completions' holds {kind_of(value)}, expected a list of 1 to 64 texts"
        )
    found = []
    for entry in value:
        if isinstance(entry, Mapping) and "role" not in entry and "text" in entry:
            found.append(Candidate(text=_text(entry["text"], "completions"), **_provenance(entry)))
        else:
            found.append(Candidate(text=_text(entry, "completions")))
    return found


def _text(value: Any, column: str) -> str:
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, Mapping) and value.get("role") == "assistant":
        value = value.get("content")
    if not isinstance(value, str):
        raise BadRow(f"column {column!r} holds {kind_of(value)} where a completion is expected")
    return value


def _provenance(columns: Columns, ending: str = "") -> dict[str, Any]:
    version, run = columns.get(f"policy_version{ending}"), columns.get("run")
    sampling = columns.get(f"sampling{ending}")
    return {
        "policy_version": None if version is None else str(version),
        "run": None if run is None else str(run),
        "sampling": dict(sampling) if isinstance(sampling, Mapping) else None,
    }


def _topic(columns: Columns) -> str:
    metadata = columns.get("metadata")
    found = columns.get("topic") or (metadata.get("topic") if isinstance(metadata, dict) else None)
    return found if isinstance(found, str) else ""
