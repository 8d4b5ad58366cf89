"""Alarms on their way to the console and to events.jsonl, also across a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.contracts.config.monitors import MonitorsConfig
from cluster.runs.console import Reporter
from cluster.runs.monitor_actions import MonitorActions
from cluster.runs.monitor_sink import MonitorSink
from cluster.runs.run import Run


def made(
    config: MonitorsConfig,
    run: Run,
    reporter: Reporter | None = None,
    actions: MonitorActions | None = None,
    **rest: Any,
) -> MonitorSink:
    actions = actions or MonitorActions(config, run.path, steps=1000)
    reporter = reporter or Reporter(quiet=True)
    return MonitorSink(config, run, reporter, actions, samples_per_prompt=4, **rest)


def events(run: Run) -> list[dict[str, object]]:
    path = run.path / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_an_alarm_is_one_line_and_one_event(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path)
    sink = made(MonitorsConfig(), run, Reporter())
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
    sink = made(MonitorsConfig(), run, first=5)
    sink.write(6, {"objective/kl": 900.0})
    assert events(run) == []
    for step in (7, 8, 9):
        sink.write(step, {"objective/kl": 1.0})
    (event,) = events(run)
    assert (event["change"], event["step"]) == ("end", 9)


KL, COEFFICIENT = "objective/kl", "objective/kl_coef"
RAISES = MonitorsConfig.model_validate({"actions": {"kl_budget": "raise_kl"}, "again_after": 4})


def test_what_an_action_did_stands_in_the_alarm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, actions = Run(tmp_path), MonitorActions(RAISES, tmp_path, steps=99)
    sink = made(RAISES, run, Reporter(), actions)
    for step in range(1, 9):
        if actions.kl_coef is not None:
            coefficient = actions.kl_coef
            actions.next_step_trained()
        elif step == 1:
            coefficient = 0.05
        sink.write(step, {KL: 900.0, COEFFICIENT: coefficient})
    told = [(event["change"], event["step"], event["action"]) for event in events(run)]
    assert told == [("start", 3, "raise_kl"), ("again", 7, "raise_kl")]
    shown = capsys.readouterr().err
    assert "The KL coefficient is raised from 0.05 to 0.1." in shown
    assert "The KL coefficient is raised from 0.1 to 0.2." in shown


def rows(run: Run, *steps: int) -> None:
    lines = (json.dumps({"step": step, KL: 900.0, COEFFICIENT: 0.05}) + "\n" for step in steps)
    (run.path / "metrics.jsonl").write_text("".join(lines))


def test_an_action_that_a_killed_run_did_not_take_is_taken_on_the_resume(tmp_path: Path) -> None:
    """The alarm began with the last step before the kill; the next step was not trained."""
    run = Run(tmp_path)
    rows(run, 1, 2, 3)
    actions = MonitorActions(RAISES, tmp_path, steps=99)
    made(RAISES, run, actions=actions, first=3)
    assert actions.kl_coef == 0.1
    assert events(run) == []


def test_an_action_that_was_taken_is_not_taken_again_on_a_resume(tmp_path: Path) -> None:
    run = Run(tmp_path)
    rows(run, 1, 2, 3, 4)
    actions = MonitorActions(RAISES, tmp_path, steps=99)
    made(RAISES, run, actions=actions, first=4)
    assert actions.kl_coef is None


def test_a_person_who_resumes_a_run_that_a_monitor_stopped_is_not_stopped_again(
    tmp_path: Path,
) -> None:
    run = Run(tmp_path)
    rows(run, 1, 2, 3)
    stops = MonitorsConfig.model_validate({"actions": {"kl_budget": "stop"}})
    made(stops, run, first=3)
    assert not (tmp_path / "control.json").exists()


def test_after_a_rollback_no_alarm_is_on_also_on_a_resume(tmp_path: Path) -> None:
    run = Run(tmp_path)
    sink = made(MonitorsConfig(), run)
    for step in (1, 2, 3):
        sink.write(step, {KL: 900.0})
    sink.gone_back(4)
    sink.write(5, {KL: 900.0})
    sink.write(6, {KL: 900.0})
    assert [event["change"] for event in events(run)] == ["start", "end"]
    rows(run, 1, 2, 3, 5, 6)
    actions = MonitorActions(RAISES, tmp_path, steps=99)
    made(RAISES, run, actions=actions, first=6, rollbacks=[3])
    assert actions.kl_coef is None  # two steps after the rollback are not three
