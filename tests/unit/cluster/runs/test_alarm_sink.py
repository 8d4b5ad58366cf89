"""Alarms on their way to the console and to events.jsonl, also across a resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.contracts.config.alarms import AlarmsConfig
from cluster.runs.alarm_sink import AlarmSink
from cluster.runs.console import Reporter
from cluster.runs.run import Run


def events(run: Run) -> list[dict[str, object]]:
    path = run.path / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_an_alarm_is_one_line_and_one_event(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path)
    sink = AlarmSink(AlarmsConfig(), run, Reporter(), samples_per_prompt=4)
    for step in range(1, 9):
        sink.write(step, {"objective/kl": 900.0})
    (event,) = events(run)
    assert (event["kind"], event["alarm"], event["change"]) == ("alarm", "kl-budget", "start")
    assert (event["step"], event["value"], event["limit"]) == (3, 900.0, 20.0)
    shown = capsys.readouterr().err
    assert shown.count("alarm at step 3: The KL to the reference is 900 nats") == 1


def test_a_resumed_run_does_not_repeat_a_warning(tmp_path: Path) -> None:
    rows = [{"step": step, "objective/kl": 900.0} for step in range(1, 6)]
    rows.append({"step": 6, "objective/kl": 0.0})  # after the checkpoint: done again
    lines = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 7, "obj'
    (tmp_path / "metrics.jsonl").write_text(lines)
    run = Run(tmp_path)
    sink = AlarmSink(AlarmsConfig(), run, Reporter(quiet=True), samples_per_prompt=4, first=5)
    sink.write(6, {"objective/kl": 900.0})
    assert events(run) == []
    for step in (7, 8, 9):
        sink.write(step, {"objective/kl": 1.0})
    (event,) = events(run)
    assert (event["change"], event["step"]) == ("end", 9)
