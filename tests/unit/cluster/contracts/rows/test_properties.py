"""Whatever the bytes: rows, or a UserError that names the file. Never another exception."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cluster.contracts.errors import UserError
from cluster.contracts.rows.files import BadRow, Columns, Place
from cluster.contracts.rows.reader import ReadRows, read_rows
from cluster.contracts.rows.shapes import comparison_shape, demonstration_shape, prompt_shape

KINDS = ("jsonl", "json", "csv", "tsv", "parquet", "jsonl.gz")
SHAPES: tuple[Callable[[Columns], object], ...] = (
    prompt_shape,
    demonstration_shape,
    comparison_shape,
)
COLUMNS = (
    "prompt", "messages", "conversations", "input", "text", "completion", "chosen", "rejected",
    "margin", "metadata", "role", "content", "from", "value", "reward_model",
)  # fmt: skip

some_files = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
texts = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["\n\nHuman:", "\n\nHuman: a\n\nAssistant: b", "Human: a\n\nAssistant:", ""]),
)
values: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), texts,
        st.sampled_from(["user", "assistant", "text", "human", "gpt"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(COLUMNS), inner, max_size=3)
    ),
    max_leaves=8,
)  # fmt: skip
rows = st.dictionaries(st.sampled_from(COLUMNS), values, max_size=5)


def check_read(path: Path) -> None:
    strict, lenient = (outcome(path, skip_bad=skip_bad) for skip_bad in (False, True))
    if isinstance(strict, ReadRows):  # nothing was bad, so nothing is left out
        assert isinstance(lenient, ReadRows)
        assert lenient.left_out.count == 0


def outcome(path: Path, *, skip_bad: bool) -> ReadRows[object] | UserError:
    found: ReadRows[object] | UserError
    try:
        found = read_rows(str(path), "train", of_any_shape, skip_bad=skip_bad)
    except UserError as problem:
        found = problem
    if isinstance(found, UserError):
        assert str(path) in found.where
        assert found.what
        assert found.fix
    return found


def of_any_shape(place: Place, columns: Columns) -> object:
    shape = SHAPES[place.number % len(SHAPES)]
    return shape(columns)


@some_files
@given(content=st.binary(max_size=200), kind=st.sampled_from(KINDS))
@example(content=b"\xef\xbb\xbf", kind="csv")
@example(content=b"a,b\r1,2\r", kind="csv")
@example(content=b'a\n"\n', kind="csv")
@example(content=b"\0", kind="csv")
@example(content=b"\x1f\x8b", kind="jsonl.gz")
def test_any_bytes(content: bytes, kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{kind}"
    path.write_bytes(content)
    check_read(path)


@some_files
@given(content=st.lists(rows, min_size=1, max_size=4), array=st.booleans())
def test_any_json_rows(content: list[dict[str, Any]], array: bool, tmp_path: Path) -> None:
    path = tmp_path / ("rows.json" if array else "rows.jsonl")
    lines = [json.dumps(row) for row in content]
    path.write_text(f"[{','.join(lines)}]" if array else "\n".join(lines))
    check_read(path)


@some_files
@given(cut=st.integers(0, 3000), flip=st.integers(0, 255))
def test_any_damage_to_a_parquet_file(cut: int, flip: int, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": [f"row {n}" for n in range(50)]}), path)
    whole = bytearray(path.read_bytes())
    whole[cut % len(whole)] ^= flip
    path.write_bytes(whole if flip else whole[: cut % len(whole)])
    check_read(path)


@settings(max_examples=300, deadline=None)
@given(row=st.dictionaries(st.sampled_from(COLUMNS), values, max_size=5))
def test_any_row_has_a_shape_or_is_bad(row: dict[str, Any]) -> None:
    for shape in SHAPES:
        with suppress(BadRow):
            shape(row)


@pytest.mark.parametrize("shape", SHAPES)
def test_unhashable_and_odd_values_are_bad_rows(shape: Callable[[Columns], object]) -> None:
    for value in ({"from": [1], "value": "x"}, [[]], [{"role": ["user"], "content": "x"}], b"x"):
        with pytest.raises(BadRow):
            shape({"prompt": value, "chosen": value, "rejected": value})
