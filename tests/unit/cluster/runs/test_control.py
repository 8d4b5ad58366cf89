"""The control file: what it takes, what it refuses, and who is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.runs.control import (
    CONTROL,
    ControlFile,
    Wishes,
    ask,
    forget_pause_and_stop,
    read_wishes,
)


def test_requests_add_up_and_have_ids_of_their_own(tmp_path: Path) -> None:
    first = ask(tmp_path, workers=3)
    second = ask(tmp_path, paused=True)
    assert read_wishes(tmp_path) == second
    assert (second.workers, second.paused) == (3, True)
    assert first.request != second.request


def test_a_run_that_goes_on_forgets_what_stopped_it_but_not_the_numbers(tmp_path: Path) -> None:
    ask(tmp_path, workers=0, reward_replicas=2, paused=True, stop=True)
    forget_pause_and_stop(tmp_path)
    after = read_wishes(tmp_path)
    assert (after.workers, after.reward_replicas, after.paused, after.stop) == (0, 2, False, False)


DAMAGED = {
    "half written": '{"workers": 2, "pau',
    "not an object": "[1, 2]",
    "unknown key": '{"worker": 2}',
    "negative": '{"workers": -1}',
    "far too many": '{"workers": 100000000}',
    "text": '{"workers": "two"}',
    "number as text": '{"workers": "2"}',
    "fraction": '{"workers": 1.5}',
    "truth": '{"workers": true}',
    "control character in the id": '{"request": "\\u001b[2J"}',
    "long": json.dumps({"request": "a" * 100_000}),
    "deep": "[" * 60_000,
    "not UTF-8": b"\xff\xfe{}",
    "empty": "",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_told_once_and_changes_nothing(tmp_path: Path, name: str) -> None:
    told: list[dict[str, Any]] = []
    reader = ControlFile(tmp_path, lambda kind, **detail: told.append({"kind": kind, **detail}))
    assert reader() == Wishes()
    wanted = ask(tmp_path, workers=2)
    assert reader() == wanted
    content = DAMAGED[name]
    path = tmp_path / CONTROL
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert reader() == wanted
    assert reader() == wanted
    assert [event["kind"] for event in told] == ["control_ignored"]
    assert "control.json" in told[0]["cause"]
    assert reader() != ask(tmp_path, workers=5)  # the file is whole again
    assert reader().workers == 5


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200) | st.text().map(str.encode))
def test_no_content_of_the_file_raises(tmp_path_factory: Any, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("run")
    (folder / CONTROL).write_bytes(content)
    assert isinstance(ControlFile(folder, lambda kind, **detail: None)(), Wishes)
