"""Rows of a file -> items to label. Which completion is "a" tells nothing about where it came from.

prompt + completions (a list of texts)
prompt + completion_a + completion_b (to completion_d)
prompt + chosen + rejected: a pair; which one was chosen is forgotten
prompt + completion: one per row, as `accord generate` writes them; rows of one prompt are put
together

A row with as many completions as an item has becomes an item of its own, with what its
`chosen_by` says (`accord preferences choose`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cluster.contracts.rows.columns import present, unknown_shape
from cluster.contracts.rows.files import BadRow, Columns, Place, kind_of
from cluster.contracts.rows.messages import Messages, read_messages
from cluster.contracts.rows.reader import LeftOut, read_rows
from cluster.contracts.rows.shapes import comparison_shape
from reward_service.preferences.choice import CompletionGroup
from reward_service.preferences.records import (
    LETTERS,
    Candidate,
    ChosenBy,
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
    alike: tuple[str, ...] = ()
    candidates: dict[str, Candidate] = field(default_factory=dict)  # by text: none twice

    def add(self, new: Iterable[Candidate]) -> None:
        for candidate in new:
            self.candidates.setdefault(candidate.text, candidate)


class _Prompts:
    """The prompts of a file, with all completions of their rows."""

    def __init__(self) -> None:
        self._by_hash: dict[str, _Prompt] = {}

    def of(self, messages: Messages, columns: Columns) -> _Prompt:
        made = _Prompt(messages, _topic(columns), _alike(columns))
        return self._by_hash.setdefault(prompt_hash(messages), made)

    def __iter__(self) -> Iterator[_Prompt]:
        return iter(self._by_hash.values())


@dataclass(frozen=True, slots=True)
class ReadItems:
    """``too_few``: prompts without enough different completions for one more item."""

    items: list[Item]
    too_few: int
    left_out: LeftOut


def read_items(path: str, *, completions: int, license: str, created_at: str) -> ReadItems:
    """Items of ``completions`` completions each. A prompt with more of them becomes several items.
    Raises UserError naming file and row."""
    prompts = _Prompts()
    items: list[Item] = []

    def make(place: Place, columns: Columns) -> None:
        messages, candidates = _candidates(columns)
        if 1 < completions == len({candidate.text for candidate in candidates}) == len(candidates):
            prompt = _Prompt(messages, _topic(columns))
            item = _item(prompt, candidates, path, license, created_at)
            items.append(replace(item, chosen_by=_chosen_by(columns)))
        else:
            prompts.of(messages, columns).add(candidates)

    read = read_rows(path, "train", make)
    too_few = 0
    for prompt in prompts:
        all_of_it = list(prompt.candidates.values())
        groups = [all_of_it[at : at + completions] for at in range(0, len(all_of_it), completions)]
        whole = [group for group in groups if len(group) == completions]
        too_few += not whole
        items += [_item(prompt, group, path, license, created_at) for group in whole]
    return ReadItems(list({item.id: item for item in items}.values()), too_few, read.left_out)


def read_groups(path: str, split: str = "train") -> list[CompletionGroup]:
    """All completions of each prompt, to choose from. Raises UserError naming file and row."""
    prompts = _Prompts()

    def make(place: Place, columns: Columns) -> None:
        messages, candidates = _candidates(columns)
        prompts.of(messages, columns).add(candidates)

    read_rows(path, split, make)
    return [
        CompletionGroup(
            messages=prompt.messages,
            completions=tuple(prompt.candidates.values()),
            topic=prompt.topic,
            alike=prompt.alike,
        )
        for prompt in prompts
    ]


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


def _alike(columns: Columns) -> tuple[str, ...]:
    """The texts in a row's metadata, by which prompts have something in common."""
    metadata = columns.get("metadata")
    named = metadata.items() if isinstance(metadata, Mapping) else ()
    return tuple(f"{name}/{value}" for name, value in named if isinstance(value, str) and value)


def _chosen_by(columns: Columns) -> ChosenBy | None:
    value = columns.get("chosen_by")
    try:
        fields = json.loads(value) if isinstance(value, str) and value else value
        return ChosenBy(**fields) if fields else None
    except (TypeError, ValueError) as problem:
        raise BadRow(f"column 'chosen_by' holds no strategy and value: {problem}") from None
