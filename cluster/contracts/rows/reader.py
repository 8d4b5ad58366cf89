"""Rows of a file, each made into what a command wants; bad rows are named, or left out and counted.

Prompts, SFT, reward model, DPO and `accord preferences import` all read through ``read_rows``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from cluster.contracts.errors import UserError
from cluster.contracts.rows.files import BadRow, Columns, Place, raw_rows

T = TypeVar("T")

SKIP_KEY = "data.skip_bad_rows = true"
NO_PREFERENCE = "no completion is preferred to another"


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Bad rows that were not read: how many, and what was wrong with the first."""

    count: int = 0
    first: str = ""

    def with_row(
        self, problem: BadRow | UserError, where: str, *, skip_bad: bool, skip_with: str = SKIP_KEY
    ) -> LeftOut:
        """With one bad row more; raises it as a UserError unless ``skip_bad``."""
        if not skip_bad:
            fix = f"{problem.fix}, or leave bad rows out with {skip_with}"
            raise UserError(problem.what, where=where, fix=fix) from None
        return self.and_also(LeftOut(1, f"{where}: {problem.what}"))

    def and_also(self, other: LeftOut) -> LeftOut:
        return LeftOut(self.count + other.count, self.first or other.first)

    def __str__(self) -> str:
        rows = "1 bad row" if self.count == 1 else f"{self.count} bad rows"
        return f"left out {rows}; the first: {self.first}"


NOTHING = LeftOut()


@dataclass(frozen=True, slots=True)
class ReadRows(Generic[T]):
    items: list[T]
    left_out: LeftOut


def read_rows(
    path: str,
    split: str,
    make: Callable[[Place, Columns], T],
    *,
    skip_bad: bool = False,
    skip_with: str = SKIP_KEY,
    expand: Callable[[Columns], list[Columns]] | None = None,
) -> ReadRows[T]:
    """``make(place, columns)`` of every row, in order.

    expand: makes one row of the file into several, or into none; then the row is left out and
    counted.
    skip_bad: leave a row out for which reading it or ``make`` raises BadRow, and count it.
    skip_with: how the user says so, for the message.
    Raises UserError naming file and row for the first bad row otherwise, for a file without rows or
    without a good one, and for what ``raw_rows`` raises.
    """
    items: list[T] = []
    left_out = NOTHING
    for row in raw_rows(path, split):
        try:
            columns = row.columns()
            _require_characters(columns)
            made = [make(row.place, part) for part in (expand(columns) if expand else [columns])]
            items += made
            if not made:
                left_out = left_out.and_also(LeftOut(1, f"{row.place.where}: {NO_PREFERENCE}"))
        except BadRow as problem:
            left_out = left_out.with_row(
                problem, row.place.where, skip_bad=skip_bad, skip_with=skip_with
            )
    if not items:
        what = f"none of its rows is usable; {left_out}" if left_out.count else "holds no rows"
        raise UserError(what, where=path, fix="give a file with at least one usable row")
    return ReadRows(items, left_out)


def _require_characters(columns: Columns) -> None:
    """JSON can spell half a surrogate pair, which no tokenizer, Arrow table or message takes."""
    try:
        _text(columns).encode()
    except UnicodeEncodeError:
        column = next(name for name, value in columns.items() if not _encodes([name, value]))
        shown = column.encode(errors="backslashreplace").decode()
        raise BadRow(
            f"column {shown!r} holds half of a surrogate pair, which is no character",
            "write the text as valid Unicode",
        ) from None
    except RecursionError:
        raise BadRow("is nested too deeply", "write a flatter row") from None


def _encodes(value: Any) -> bool:
    try:
        _text(value).encode()
    except UnicodeEncodeError:
        return False
    return True


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
