"""One reader for all kinds of file: the same rows from each, and a message that names the place."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.contracts.errors import UserError
from cluster.contracts.rows.files import Columns, Place
from cluster.contracts.rows.reader import read_rows

ROWS = [{"prompt": f"Zeile {n} ü ☃", "label": str(n)} for n in range(3)]


def lines(rows: Sequence[Any], end: str = "\n") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode()


def table(path: Path, rows: Sequence[dict[str, Any]], delimiter: str) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


WRITERS: dict[str, Callable[[Path], object]] = {
    "rows.jsonl": lambda path: path.write_bytes(lines(ROWS)),
    "rows.JSONL": lambda path: path.write_bytes(lines(ROWS)),
    "mark.jsonl": lambda path: path.write_bytes(b"\xef\xbb\xbf" + lines(ROWS)),
    "crlf.jsonl": lambda path: path.write_bytes(lines(ROWS, "\r\n")),
    "blank.jsonl": lambda path: path.write_bytes(b"\n  \n" + lines(ROWS, "\n\n\r\n")),
    "no_last_end.jsonl": lambda path: path.write_bytes(lines(ROWS).rstrip()),
    "rows.ndjson": lambda path: path.write_bytes(lines(ROWS)),
    "array.json": lambda path: path.write_text(json.dumps(ROWS, indent=2), encoding="utf-8"),
    "marked_array.json": lambda path: path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS).encode()),
    "lines.json": lambda path: path.write_bytes(lines(ROWS)),
    "rows.csv": lambda path: table(path, ROWS, ","),
    "marked.csv": lambda path: (
        table(path, ROWS, ","),
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes()),
    ),
    "rows.tsv": lambda path: table(path, ROWS, "\t"),
    "rows.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines(ROWS))),
    "array.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
}


def as_they_are(place: Place, columns: Columns) -> tuple[Place, Columns]:
    return place, columns


def read(path: Path | str, **options: Any) -> list[tuple[Place, Columns]]:
    return read_rows(str(path), "train", as_they_are, **options).items


@pytest.mark.parametrize("name", WRITERS)
def test_the_same_rows_from_each_kind_of_file(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    assert [columns for _, columns in read(tmp_path / name)] == ROWS


def test_places_are_lines_of_text_and_rows_of_all_else(tmp_path: Path) -> None:
    def places(name: str) -> list[tuple[str, int]]:
        WRITERS[name](tmp_path / name)
        return [(place.where, place.number) for place, _ in read(tmp_path / name)][:2]

    folder = str(tmp_path)
    assert places("rows.jsonl") == [
        (f"{folder}/rows.jsonl, line 1", 1),
        (f"{folder}/rows.jsonl, line 2", 2),
    ]
    assert places("blank.jsonl")[0] == (f"{folder}/blank.jsonl, line 3", 3)
    assert places("rows.csv")[0] == (f"{folder}/rows.csv, line 2", 2)
    assert places("rows.parquet")[1] == (f"{folder}/rows.parquet, row 2", 2)
    assert places("array.json")[1] == (f"{folder}/array.json, row 2", 2)


def test_a_table_s_row_has_the_line_where_it_begins(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('prompt,label\n"two\nlines",1\nnext,2\n')
    assert [place.number for place, _ in read(path)] == [2, 4]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{broken", "is not JSON: Expecting property name"),
        (b"\xff\xfe\xfa", r"is not valid UTF-8 \(byte 1\)"),
        (b"[1]", "holds a list, not an object"),
        (b"3", "holds a number, not an object"),
        (b"null", "holds nothing, not an object"),
        (b'"x"', "holds text, not an object"),
        (b'{"a": "\\ud800"}', "column 'a' holds half of a surrogate pair"),
        (b'{"\\udc00": "a"}', r"column '\\\\udc00' holds half of a surrogate pair"),
        (b'{"a": ' + b"1" * 5000 + b"}", "a number with too many digits"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_bad_line_is_named_or_left_out_and_counted(
    tmp_path: Path, content: bytes, says: str
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"a": "fine"}\n\n' + content + b'\n{"a": "fine, too"}\n')
    with pytest.raises(UserError, match=f"p.jsonl, line 3: .*{says}") as caught:
        read(path)
    assert caught.value.fix.endswith("or leave bad rows out with data.skip_bad_rows = true")
    done = read_rows(str(path), "train", as_they_are, skip_bad=True)
    assert [columns["a"] for _, columns in done.items] == ["fine", "fine, too"]
    assert done.left_out.count == 1
    assert str(done.left_out).startswith(f"left out 1 bad row; the first: {path}, line 3: ")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"a,b\n1,2,3\n", "line 2: has 3 cells under 2 column names"),
        (b"a,b\n1\n", "line 2: has 1 cells under 2 column names"),
        (b"a,b\n1,\xff\n", "line 2: is not valid UTF-8"),
        (b"a,a\n1,2\n", "line 1: two columns have the name 'a'"),
        (b'a,b\n1,"open\n', "line 2: is not a readable table"),
        (b'a,b\n1,2\n3,"x"y\n', "line 3: is not a readable table"),
        (b"a,b\n", "holds no rows"),
        (b"", "holds no rows"),
    ],
)
def test_a_bad_table_is_named(tmp_path: Path, text: bytes, says: str) -> None:
    path = tmp_path / "p.csv"
    path.write_bytes(text)
    with pytest.raises(UserError, match=says):
        read(path)


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty.jsonl": (b"", "holds no rows"),
    "blank.jsonl": (b"\n\n  \n", "holds no rows"),
    "wide.jsonl": ('{"a": 1}\n'.encode("utf-16"), "is not UTF-8 but UTF-16"),
    "broken.json": (b'[{"a": 1},\n {"a" 2}]', "is not JSON: .*, line 2, column 7"),
    "x.parquet": (b"PAR1 not really PAR1", "is not a readable Parquet file"),
    "x.txt": (b"hello", r"unknown kind of file '\.txt'"),
    "x": (b"hello", "does not say its kind"),
    "x.parquet.gz": (b"hello", "unknown kind of file"),
    "x.db": (b"", "accord preferences export"),
    "plain.jsonl.gz": (b'{"a": 1}\n', "cannot be read: Not a gzipped file"),
    "cut.jsonl.gz": (gzip.compress(lines(ROWS) * 99)[:-20], "cannot be read"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_even_when_bad_rows_are_left_out(tmp_path: Path, name: str) -> None:
    content, says = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        read(tmp_path / name, skip_bad=True)
    assert str(tmp_path / name) in caught.value.where
    assert caught.value.fix


@pytest.mark.parametrize("name", ["gone.jsonl", "a/b.parquet", "x" * 300 + ".jsonl", "a\0.jsonl"])
def test_no_such_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="no such file"):
        read(tmp_path / name)


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a directory"):
        read(tmp_path)


def test_nothing_usable_says_so(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("1\n2\n")
    with pytest.raises(UserError, match=r"none of its rows is usable; left out 2 bad rows; the f"):
        read(tmp_path / "p.jsonl", skip_bad=True)


def test_a_parquet_file_whose_columns_share_a_name_is_refused(tmp_path: Path) -> None:
    twice = pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["prompt", "prompt"])
    pq.write_table(twice, tmp_path / "x.parquet")
    with pytest.raises(UserError, match="two of its columns have the same name"):
        read(tmp_path / "x.parquet")


def test_a_datasets_name_is_read_by_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_bytes(lines(ROWS))
    name = f"datasets:{tmp_path / 'data'}"
    assert [columns for _, columns in read(name)] == ROWS
    assert read(name)[1][0].where == f"{name}, split train, row 2"
    with pytest.raises(UserError, match="split nope: cannot load the data set"):
        read_rows(name, "nope", as_they_are)
