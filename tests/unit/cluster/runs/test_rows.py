"""Files of one JSON object a line: whole, torn, hostile, and too long to be read whole."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from cluster.runs.rows import Follower, spread_rows, tail_rows, whole_rows

DEEP = "[" * 100_000  # RecursionError, which is no ValueError


def write(path: Path, rows: range) -> None:
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in rows))


def test_a_line_separator_within_a_text_ends_no_line() -> None:
    row = {"cause": "before\u2028after\x85end"}
    assert whole_rows(json.dumps(row, ensure_ascii=False) + "\n") == [row]


@pytest.mark.parametrize("bad", ["nonsense", "[1]", "1", "null", DEEP, '{"a": 1', ""])
def test_a_line_that_is_no_object_hides_no_other(bad: str) -> None:
    assert whole_rows(f'{{"a": 1}}\n{bad}\n{{"a": 2}}\n') == [{"a": 1}, {"a": 2}]


def test_the_last_line_counts_once_it_is_complete() -> None:
    assert whole_rows('{"a": 1}\n{"a": 2}') == [{"a": 1}]


def test_only_the_end_of_a_long_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1000))
    rows = tail_rows(path, 100)
    assert rows[-1] == {"step": 999}
    assert 3 < len(rows) < 10


def test_a_file_that_cannot_be_read_has_no_rows(tmp_path: Path) -> None:
    assert tail_rows(tmp_path / "none") == []
    assert spread_rows(tmp_path / "none", 10) == []
    assert tail_rows(tmp_path) == []
    assert spread_rows(tmp_path, 10) == []


def test_a_long_file_is_sampled_from_one_end_to_the_other(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(100_000))
    rows = spread_rows(path, 50, whole_bytes=1000)
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps))
    assert steps[0] == 0
    assert steps[-1] == 99_999
    assert max(b - a for a, b in itertools.pairwise(steps)) < 100_000 / 50 * 1.5
    # The end is there in full, as people look at the last steps.
    assert len(rows) < 200


def test_a_short_file_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(100))
    assert len(spread_rows(path, 10)) == 100


def test_a_line_of_megabytes_is_stepped_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + "x" * 3_000_000 + "\n" + '{"step": 2}\n')
    rows = spread_rows(path, 20, whole_bytes=1000)
    assert [row["step"] for row in rows] == [1, 2]


def test_a_follower_reads_each_line_once(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    follower = Follower(path)
    assert follower.new_rows() == []
    path.write_text('{"n": 1}\n{"n": 2}\n{"n"')
    assert follower.new_rows() == [{"n": 1}, {"n": 2}]
    assert follower.new_rows() == []
    with path.open("a") as file:
        file.write(': 3}\n{"n": 4}\n')
    assert follower.new_rows() == [{"n": 3}, {"n": 4}]
    assert not follower.began_late


def test_a_follower_of_a_long_file_begins_near_its_end_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    write(path, range(10_000))
    follower = Follower(path, at_most=1000)
    rows = follower.new_rows()
    assert rows[-1] == {"step": 9999}
    assert 10 < len(rows) < 100
    assert follower.began_late


def test_a_follower_starts_again_where_the_file_was_replaced(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"n": 1}\n{"n": 2}\n')
    follower = Follower(path)
    follower.new_rows()
    path.write_text('{"n": 7}\n')
    assert follower.new_rows() == [{"n": 7}]
    assert follower.restarted
