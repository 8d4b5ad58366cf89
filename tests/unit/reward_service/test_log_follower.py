"""What is printed elsewhere arrives here whole, in order and once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from reward_service import log_follower
from reward_service.log_follower import LogFollower, whole_lines


@pytest.fixture
def printed(tmp_path: Path) -> Path:
    path = tmp_path / "there.log"
    path.write_bytes(b"")
    return path


def test_lines_come_whole_in_order_and_once(
    tmp_path: Path, printed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_follower, "CHUNK", 8)
    monkeypatch.setattr(log_follower, "EVERY_S", 3600.0)
    target = tmp_path / "logs" / "reward.log"
    target.parent.mkdir()
    target.write_text("of the process before\n")
    descriptor = os.open(printed, os.O_RDONLY)
    follower = LogFollower(lambda offset: whole_lines(descriptor, offset), target)
    try:
        printed.write_bytes(b"one\ntwo\nthr")
        follower.collect()
        assert target.read_text() == "of the process before\none\ntwo\n"
        with printed.open("ab") as file:
            file.write(b"ee\na line of more than eight bytes\n")
        follower.collect()
        follower.collect()
        assert target.read_text() == (
            "of the process before\none\ntwo\nthree\na line of more than eight bytes\n"
        )
    finally:
        follower.close()
        os.close(descriptor)


def test_one_that_cannot_be_asked_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_follower, "EVERY_S", 0.01)
    target, asked = tmp_path / "reward.log", []

    def read(offset: int) -> bytes:
        asked.append(offset)
        if len(asked) < 3:
            raise TimeoutError
        return b"line\n" if offset == 0 else b""

    follower = LogFollower(read, target)
    try:
        while len(asked) < 6:
            os.sched_yield()
    finally:
        follower.close()
    assert target.read_text() == "line\n"
