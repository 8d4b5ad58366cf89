"""JSONL, Parquet or a name known to `datasets` -> rows, each with the place it came from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.contracts.errors import UserError

Row = Mapping[str, Any]


def read_rows(path: str, split: str) -> Iterator[tuple[str, Row]]:
    """(where, row) of each row. Raises UserError for what cannot be read and for no rows."""
    count = 0
    for where, row in _reader(path)(path, split):
        count += 1
        yield where, row
    if count == 0:
        raise UserError("holds no rows", where=path, fix="give a file with at least one row")


def _reader(path: str) -> Callable[[str, str], Iterator[tuple[str, Row]]]:
    if path.startswith("datasets:"):
        return _named
    place = Path(path)
    if not place.exists():
        raise UserError("no such file", where=path, fix="check data.path")
    if place.suffix in (".jsonl", ".json", ".ndjson"):
        return _jsonl
    if place.suffix == ".parquet":
        return _parquet
    if place.suffix == ".db":
        raise UserError(
            "a preference store is read through its export",
            where=path,
            fix="run `accord preferences export` and give the JSONL file",
        )
    raise UserError(
        f"unknown file type {place.suffix or '(none)'}",
        where=path,
        fix="give a .jsonl or .parquet file, or datasets:NAME",
    )


def _jsonl(path: str, split: str) -> Iterator[tuple[str, Row]]:
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path}, row {number}", _object(line, f"{path}, row {number}")
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(
            f"cannot be read: {problem}", where=path, fix="give a UTF-8 file of JSON objects"
        ) from None


def _object(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as problem:
        raise UserError(
            f"not valid JSON: {problem}", where=where, fix="JSONL holds one JSON object a line"
        ) from None
    if not isinstance(row, dict):
        raise UserError(
            f"is a JSON {type(row).__name__}, not an object",
            where=where,
            fix="JSONL holds one JSON object a line",
        )
    return row


def _parquet(path: str, split: str) -> Iterator[tuple[str, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (pa.ArrowException, OSError) as problem:
        raise UserError(
            f"cannot be read as Parquet: {problem}", where=path, fix="write the file again"
        ) from None


def _named(path: str, split: str) -> Iterator[tuple[str, Row]]:
    import datasets  # here, because it takes a second to import and few need it

    name = path.removeprefix("datasets:")
    try:
        loaded = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, RuntimeError) as problem:
        raise UserError(
            f"cannot load split {split!r}: {str(problem).splitlines()[0]}",
            where=path,
            fix="check the name and data.split, and that the hub can be reached; or give a file",
        ) from problem
    for number, row in enumerate(loaded, start=1):
        yield f"{path} ({split}), row {number}", row
