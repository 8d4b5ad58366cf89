from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluster.runs.lines import Lines


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
    write, left = os.write, [3]

    def little(descriptor: int, content: bytes) -> int:
        if not left:
            return write(descriptor, content)
        if left[0]:
            left[0], taken = 0, write(descriptor, content[: left[0]])
            return taken
        left.clear()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", little)
    lines = Lines(tmp_path / "l")
    lines.add("abcdef")
    lines.add("ghi")
    assert (tmp_path / "l").read_text() == "abc\nabcdef\nghi\n"


def test_other_errors_are_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Lines(tmp_path / "no" / "l").add("x")
