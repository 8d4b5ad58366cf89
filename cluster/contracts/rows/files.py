"""The one reader of row files: JSONL, JSON, CSV, TSV and Parquet files, folders with snapshots or
saved data sets, and ``datasets:NAME``.

A reader yields ``RawRow``s, one after another, and never the whole file at once (a ``.json`` file
that holds one array is the exception). What is wrong with one row is a ``BadRow``, raised when that
row's columns are asked for: so one bad row can be left out and the rest read. What is wrong with
the file as a whole is a ``UserError`` at once.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from cluster.contracts.errors import AccordError, UserError
from cluster.contracts.rows.folders import is_saved_dataset, is_snapshot, saved_rows, snapshot_file

Columns = Mapping[str, Any]

DATASETS = "datasets:"
KINDS = ".jsonl, .json, .csv, .tsv or .parquet"
UNREADABLE = (OSError, EOFError, zlib.error)
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class BadRow(AccordError):
    """One row is wrong: what is wrong, and what to do. Its place is added by who reads it."""

    def __init__(self, what: str, fix: str = "correct the row") -> None:
        super().__init__(what, fix)
        self.what = what
        self.fix = fix


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row is, for messages; ``number``: its line in a text file, else its row, from 1."""

    where: str
    number: int


@dataclass(frozen=True, slots=True)
class RawRow:
    """``columns()`` raises BadRow when the row cannot be read."""

    place: Place
    columns: Callable[[], Columns]


def raw_rows(path: str, split: str = "train") -> Iterator[RawRow]:
    """The rows of a file, or of a split of a snapshot, of a saved data set or of a
    ``datasets:NAME``. Blank lines are no rows.

    Raises UserError for what is no readable file of rows: missing, another directory, another kind
    of file, UTF-16, damaged.
    """
    if path.startswith(DATASETS):
        yield from _datasets_rows(path, split)
        return
    file = Path(path)
    if is_snapshot(file):
        yield from _parquet_rows(snapshot_file(file, split))
        return
    if is_saved_dataset(file):
        yield from _numbered(saved_rows(file, split), f"{path}, split {split}")
        return
    _require_file(file)
    kind = _kind(path)
    try:
        yield from _READERS[kind](file)
    except UNREADABLE as problem:
        reason = getattr(problem, "strerror", None) or str(problem)
        raise UserError(
            f"cannot be read: {reason}", where=path, fix="check the file, or write it again"
        ) from None


def _kind(path: str) -> str:
    name = path.lower().removesuffix(".gz")
    kind = Path(name).suffix
    if kind in _READERS and not (kind == ".parquet" and path.lower().endswith(".gz")):
        return kind
    if kind in (".db", ".sqlite"):
        raise UserError(
            "a preference store is read through its export",
            where=path,
            fix="run `accord preferences export` and give the JSONL file",
        )
    raise UserError(
        f"unknown kind of file {kind!r}" if kind else "the file's name does not say its kind",
        where=path,
        fix=f"give a {KINDS} file, or datasets:NAME",
    )


def _require_file(file: Path) -> None:
    try:
        if file.is_file():
            return
        what = "is a directory" if file.is_dir() else "no such file"
    except (OSError, ValueError) as problem:  # a name that is too long, or holds a zero byte
        what = f"no such file ({getattr(problem, 'strerror', None) or problem})"
    raise UserError(what, where=str(file), fix=f"give a {KINDS} file, or datasets:NAME")


@contextmanager
def _opened(file: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, unpacked where its name ends with .gz, after a UTF-8 byte order mark."""
    opener: Callable[..., Any] = gzip.open if file.suffix.lower() == ".gz" else open
    with opener(file, "rb") as raw:
        stream = io.BufferedReader(raw)
        start = stream.peek(3)
        if start.startswith(UTF16):
            raise UserError(
                "is not UTF-8 but UTF-16", where=str(file), fix="save the file as UTF-8"
            )
        if start.startswith(codecs.BOM_UTF8):
            stream.read(len(codecs.BOM_UTF8))
        yield stream


# -- text files ------------------------------------------------------------------------------------


def _jsonl_rows(file: Path) -> Iterator[RawRow]:
    with _opened(file) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield RawRow(Place(f"{file}, line {number}", number), partial(_parsed, line))


def _json_rows(file: Path) -> Iterator[RawRow]:
    """One array of objects, one object, or (often so named) one object per line."""
    with _opened(file) as stream:
        content = stream.read()
    try:
        whole = _loads(content)
    except BadRow as problem:
        if not content.lstrip().startswith(b"["):
            yield from _jsonl_rows(file)
            return
        raise UserError(problem.what, where=str(file), fix=problem.fix) from None
    for number, row in enumerate(whole if isinstance(whole, list) else [whole], start=1):
        yield RawRow(Place(f"{file}, row {number}", number), partial(_object, row))


def _parsed(line: bytes) -> Columns:
    return _object(_loads(line))


def _loads(text: bytes) -> Any:
    fix = "write one JSON object per line"
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as problem:
        raise BadRow(f"is not valid UTF-8 (byte {problem.start + 1})", "save it as UTF-8") from None
    except json.JSONDecodeError as problem:
        place = f"line {problem.lineno}, " if problem.lineno > 1 else ""
        raise BadRow(f"is not JSON: {problem.msg}, {place}column {problem.colno}", fix) from None
    except RecursionError:
        raise BadRow("is not usable JSON: it is nested too deeply", fix) from None
    except ValueError:  # an integer of more than 4300 digits
        raise BadRow("is not usable JSON: it holds a number with too many digits", fix) from None


def _object(value: Any) -> Columns:
    if not isinstance(value, dict):
        raise BadRow(f"holds {kind_of(value)}, not an object", "write one JSON object per row")
    return value


def _table_rows(file: Path, delimiter: str) -> Iterator[RawRow]:
    with _opened(file) as stream:
        # Bytes that are no UTF-8 become lone surrogates, so that only their row is bad.
        text = io.TextIOWrapper(stream, "utf-8", errors="surrogateescape", newline="")
        table = csv.reader(text, delimiter=delimiter, strict=True)
        last = 0
        try:
            header = next(table, [])
            _check_header(header, file)
            last = table.line_num
            for cells in table:
                number, last = last + 1, table.line_num
                if any(cells):
                    place = Place(f"{file}, line {number}", number)
                    yield RawRow(place, partial(_cells, header, cells))
        except csv.Error as problem:
            raise UserError(
                f"is not a readable table: {problem}",
                where=f"{file}, line {last + 1}",
                fix="quote cells that hold quotes, commas or line breaks, or write the file as "
                "JSONL",
            ) from None


def _check_header(header: list[str], file: Path) -> None:
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise UserError(
            f"two columns have the name {twice[0]!r}",
            where=f"{file}, line 1",
            fix="give each column a name of its own in the first line",
        )


def _cells(header: list[str], cells: list[str]) -> Columns:
    if len(cells) != len(header):
        raise BadRow(
            f"has {len(cells)} cells under {len(header)} column names",
            "quote cells that hold commas or line breaks",
        )
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        raise BadRow("is not valid UTF-8", "save it as UTF-8") from None
    return dict(zip(header, cells, strict=True))


# -- Parquet and datasets --------------------------------------------------------------------------


def _parquet_rows(file: Path) -> Iterator[RawRow]:
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if len(set(names)) < len(names):
                raise ValueError("two of its columns have the same name")
            number = 0
            for batch in table.iter_batches(1024):
                for row in batch.to_pylist():
                    number += 1
                    yield RawRow(Place(f"{file}, row {number}", number), partial(_object, row))
    except GeneratorExit:
        raise
    except Exception as problem:  # pyarrow raises a dozen types for a damaged file
        raise UserError(
            f"is not a readable Parquet file: {_first_line(problem)}",
            where=str(file),
            fix="write the file again",
        ) from None


def _datasets_rows(path: str, split: str) -> Iterator[RawRow]:
    import datasets  # here, because it takes a second to import and few need it

    name = path.removeprefix(DATASETS)
    place = f"{path}, split {split}"
    try:
        data = datasets.load_dataset(name, split=split)
        if isinstance(data, dict):
            raise ValueError(f"its splits are {', '.join(data)}")
        yield from _numbered(data, place)
    except GeneratorExit:
        raise
    except Exception as problem:  # it raises a dozen types, for the network and for names
        raise UserError(
            f"cannot load the data set: {_first_line(problem)}",
            where=place,
            fix="check the name, data.split and the network; or give a file",
        ) from problem


def _numbered(rows: Iterable[Any], place: str) -> Iterator[RawRow]:
    for number, row in enumerate(rows, start=1):
        yield RawRow(Place(f"{place}, row {number}", number), partial(_object, row))


_READERS: Mapping[str, Callable[[Path], Iterator[RawRow]]] = {
    ".jsonl": _jsonl_rows,
    ".ndjson": _jsonl_rows,
    ".json": _json_rows,
    ".csv": partial(_table_rows, delimiter=","),
    ".tsv": partial(_table_rows, delimiter="\t"),
    ".parquet": _parquet_rows,
}

_KINDS = {
    dict: "an object",
    list: "a list",
    tuple: "a list",
    str: "text",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "nothing",
}


def kind_of(value: Any) -> str:
    """A value's kind in the words of the file, not of Python: "a number", "text"."""
    return _KINDS.get(type(value), f"a value of type {type(value).__name__}")


def _first_line(problem: BaseException) -> str:
    text = str(problem).strip()
    return text.splitlines()[0] if text else type(problem).__name__
