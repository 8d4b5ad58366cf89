from __future__ import annotations

from pathlib import Path

import pytest

from cluster.runs.lines import Lines
from tests.full_disk import Disk


def test_lines_wait_for_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.symlink_to("/dev/full")
    lines = Lines(path)
    lines.add("one")
    lines.add("two")
    assert list(lines.waiting) == ["one", "two"]
    path.unlink()
    lines.add("three")
    assert path.read_text() == "one\ntwo\nthree\n"


def test_half_a_line_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"whole": 1}\n{"half')
    Lines(path).add('{"next": 2}')
    assert path.read_text() == '{"whole": 1}\n{"half\n{"next": 2}\n'


def test_a_line_of_which_the_disk_took_a_part_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, lines = Disk(monkeypatch), Lines(tmp_path / "l")
    disk.room = 3
    assert not lines.add("abcdef")
    disk.room = None
    assert lines.add("ghi")
    assert (tmp_path / "l").read_text() == "abc\nabcdef\nghi\n"


def test_other_errors_are_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Lines(tmp_path / "no" / "l").add("x")
