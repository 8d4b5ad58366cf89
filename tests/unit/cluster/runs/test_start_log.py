"""What is said and kept of a run's start, and of the time that is left."""

from __future__ import annotations

import time
from typing import Any

import pytest

from cluster.runs.console import Reporter
from cluster.runs.start_log import FIRST_BATCH, StartLog


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "monotonic", made.monotonic)
    return made


class Events:
    def __init__(self) -> None:
        self.rows: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, kind: str, **detail: Any) -> None:
        self.rows.append((kind, detail))


def test_each_part_is_said_and_kept_with_its_own_seconds(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    events = Events()
    start = StartLog(Reporter(began=98.0))
    with start.part("reading"):
        clock.now += 1.5
    start.write_to(events)  # the part before there was a run is not lost
    start.begins("learner", "worker-0")
    clock.now += 2.0
    start.ends("learner")
    clock.now += 1.0
    start.ends("worker-0", " (vllm)")
    start.begins(FIRST_BATCH)
    clock.now += 0.5
    start.write(1, {})
    start.ends("worker-0")  # a restart later is no part of the start
    start.write(2, {})
    assert events.rows == [
        ("started", {"part": "reading", "seconds": 1.5, "since_command_s": 3.5}),
        ("started", {"part": "learner", "seconds": 2.0, "since_command_s": 5.5}),
        ("started", {"part": "worker-0", "seconds": 3.0, "since_command_s": 6.5}),
        ("started", {"part": FIRST_BATCH, "seconds": 0.5, "since_command_s": 7.0}),
        ("first_step", {"step": 1, "seconds": 7.0}),
    ]
    assert capsys.readouterr().err.splitlines() == [
        "starting: reading ...",
        "  reading: 1.5 s",
        "starting: learner, worker-0 ...",
        "  learner: 2.0 s",
        "  worker-0: 3.0 s (vllm)",
        "starting: first batch ...",
        "  first batch: 0.5 s",
        "  first step done 7.0 s after the start of the command",
    ]


def test_a_part_that_fails_does_not_end(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="unreadable"), StartLog(Reporter()).part("reading"):
        raise ValueError("unreadable")
    assert capsys.readouterr().err == "starting: reading ...\n"


def test_the_time_left_leaves_the_start_out(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Reporter().stage("GRPO", 11) as stage:
        clock.now += 600.0  # until the first step
        stage.update(1, {"train/loss": 0.5})
        clock.now += 6.0
        stage.update(2, {"train/loss": 0.5})
        clock.now += 6.0
        stage.update(3, {"train/loss": 0.5})
    lines = capsys.readouterr().err.splitlines()
    assert lines[1:4] == [
        "  GRPO 1/11  loss 0.500",
        "  GRPO 2/11  loss 0.500  left 0:54",
        "  GRPO 3/11  loss 0.500  left 0:48",
    ]
