"""The columns of a row, as numbers and in messages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from cluster.contracts.rows.files import BadRow, Columns


def optional_number(columns: Columns, column: str) -> float | None:
    """A column's finite number, None where the row has none (an empty cell, too)."""
    value = columns.get(column)
    if value is None or value == "":  # an empty cell of a table
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise BadRow(f"column {column!r} must be a finite number, found {_shown(value)}")
    return number


def present(columns: Columns) -> set[str]:
    return {name for name, value in columns.items() if value is not None}


def unknown_shape(columns: Columns, shapes: Sequence[tuple[str, ...]]) -> BadRow:
    found = present(columns)
    known = "; ".join(" + ".join(shape) for shape in shapes)
    nearest = max(shapes, key=lambda shape: (len(found & set(shape)), -len(shape)))
    missing = [name for name in nearest if name not in found]
    there = sorted(found & set(nearest))
    # A shape of which the row has nothing is not near.
    near = f" (it lacks {listed(missing, 'and')} beside {listed(there, 'and')})" if there else ""
    return BadRow(
        f"the columns are of no known shape{near}; {columns_of(columns)}",
        f"rename the columns to one of: {known}",
    )


def columns_of(columns: Columns) -> str:
    return f"the row has {_shown(', '.join(map(str, columns)), '{}') or 'no columns'}"


def listed(names: Sequence[str], word: str = "or") -> str:
    return f" {word} ".join(", ".join(names).rsplit(", ", 1))


def _shown(value: Any, form: str = "{!r}") -> str:
    text = form.format(value)
    return text if len(text) < 120 else text[:117] + "..."
