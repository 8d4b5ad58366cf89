"""Rows of a file -> demonstrations, rankings or preferences, with their place and hold-out key.

``cluster.contracts.rows`` reads the files and knows their shapes. Nothing is tokenised here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

from cluster.contracts.chat import is_text
from cluster.contracts.rows.files import BadRow, Columns, Place
from cluster.contracts.rows.judged import orders_within, pairs_within
from cluster.contracts.rows.judgements import is_judgement, judgement_shape
from cluster.contracts.rows.messages import Messages
from cluster.contracts.rows.rankings import RankingShape, ranking_shape
from cluster.contracts.rows.reader import ReadRows, read_rows
from cluster.contracts.rows.shapes import comparison_shape, demonstration_shape


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
class Ranking:
    """Completions of one prompt in order; `columns`: the whole row."""

    where: str
    messages: Messages
    shape: RankingShape
    columns: Columns
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """A pair, or a single completion that somebody judged: good ones are `chosen`, bad ones
    `rejected`, and the other side is None."""

    where: str
    messages: Messages
    chosen: str | None
    rejected: str | None
    key: str


def read_demonstrations(
    path: str, split: str = "train", skip_bad: bool = False
) -> ReadRows[Demonstration]:
    """Raises UserError naming file and row; `skip_bad` leaves bad rows out and counts them."""
    return read_rows(path, split, _demonstration, skip_bad=skip_bad)


def read_rankings(
    path: str,
    split: str = "train",
    skip_bad: bool = False,
    *,
    rankings: bool = False,
    ties: bool = False,
) -> ReadRows[Ranking]:
    """rankings, ties: see ``judged.orders_within``. Raises UserError naming file and row;
    `skip_bad` leaves bad rows out and counts them."""
    expand = partial(orders_within, rankings=rankings, ties=ties)
    return read_rows(path, split, _ranking, skip_bad=skip_bad, expand=expand)


def read_preferences(
    path: str, split: str = "train", skip_bad: bool = False, *, singles: bool = False
) -> ReadRows[Preference]:
    """Pairs, and with `singles` also single judged completions. Raises UserError naming file and
    row; `skip_bad` leaves bad rows out and counts them."""
    make = _preference if singles else _pair
    return read_rows(path, split, make, skip_bad=skip_bad, expand=pairs_within)


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


def _demonstration(place: Place, columns: Columns) -> Demonstration:
    shape = demonstration_shape(columns)
    key = shape.messages[0]["content"]
    if not is_text(shape.messages):
        roles = [message["role"] for message in shape.messages]
        key = _key(shape.messages[: roles.index("assistant")])
    return Demonstration(where=place.where, messages=shape.messages, answer=shape.answer, key=key)


def _ranking(place: Place, columns: Columns) -> Ranking:
    shape = ranking_shape(columns)
    return Ranking(
        where=place.where,
        messages=shape.messages,
        shape=shape,
        columns=columns,
        key=_key(shape.messages),
    )


def _pair(place: Place, columns: Columns) -> Preference:
    if is_judgement(columns):
        raise BadRow(
            "judges a single completion, but this loss compares two",
            "set loss='kto', or give rows with prompt, chosen and rejected",
        )
    pair = comparison_shape(columns)
    return Preference(
        where=place.where,
        messages=pair.messages,
        chosen=pair.chosen,
        rejected=pair.rejected,
        key=_key(pair.messages),
    )


def _preference(place: Place, columns: Columns) -> Preference:
    if not is_judgement(columns):
        return _pair(place, columns)
    shape = judgement_shape(columns)
    return Preference(
        where=place.where,
        messages=shape.messages,
        chosen=shape.completion if shape.good else None,
        rejected=None if shape.good else shape.completion,
        key=_key(shape.messages),
    )


def _key(messages: Messages) -> str:
    return json.dumps([[m["role"], m["content"]] for m in messages], ensure_ascii=False)
