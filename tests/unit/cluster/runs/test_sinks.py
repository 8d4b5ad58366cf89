"""Files of numbers, and a disk that is full for a while."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.runs.sinks import JsonlSink, TensorBoardSink
from tests.full_disk import Disk


def steps_seen_by_tensorboard(folder: Path) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    return [event.step for event in found.Scalars("a")]


def test_tensorboard_shows_the_steps_after_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    sink = TensorBoardSink(tmp_path)
    for step, room in enumerate((0, None, None, 7, 0, 1, None, None)):
        disk.room = room
        if room is None:
            sink.write(step, {"a": 1.5})
        else:
            with pytest.raises(OSError, match="No space"):
                sink.write(step, {"a": 1.5})
    sink.close()
    assert steps_seen_by_tensorboard(tmp_path) == [1, 2, 6, 7]


def test_no_line_of_metrics_is_lost_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, path = Disk(monkeypatch), tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.write(1, {"a": 1.0})
    disk.room = 9
    for waiting in (1, 2):
        with pytest.raises(OSError, match=f"{waiting} lines wait in memory"):
            sink.write(1 + waiting, {"a": 1.0})
    disk.room = 0
    with pytest.raises(OSError, match="2 lines wait"):
        sink.close()
    disk.room = None
    sink.close()
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line)["step"])
        except ValueError:
            assert len(line) == 9  # what the disk took of it; readers pass over it
    assert rows == [1, 2, 3]
