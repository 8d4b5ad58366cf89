"""The run directory around the rounds: begun, continued, refused; who waits holds nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.contracts.config.file import check_config
from cluster.contracts.config.pipeline import PipelineConfig
from cluster.contracts.errors import UserError
from cluster.pipeline import pipeline as module
from cluster.pipeline.pipeline import (
    Afresh,
    begin_pipeline,
    check_inputs,
    closing_lines,
    resume_pipeline,
)
from cluster.pipeline.record import PipelineRecord, StageName, StageRecord
from cluster.pipeline.rounds import Outcome, Round, Waiting, round_of
from cluster.pipeline.work import verdict
from cluster.runs.console import Reporter

JUDGE = {"judge": {"sources": [{"type": "rules", "max_words": 9}]}}


class FakeWork:
    """In place of the real stages: ``act`` is told each one."""

    act: Callable[[str], None]
    done: list[str]

    def __init__(self, *given: Any) -> None:
        """Takes what the real one takes."""

    def do(self, name: StageName, at: Round, waiting: Waiting) -> Outcome:
        FakeWork.act(name)
        FakeWork.done.append(f"{at.number}/{name}")
        return Outcome(detail={"promoted": True, "reason": "as asked", "labels": 3})

    def close(self) -> None:
        """Nothing is held."""


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "Work", FakeWork)
    FakeWork.act, FakeWork.done = staticmethod(lambda name: None), []
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    return tmp_path


def config(folder: Path, **more: Any) -> PipelineConfig:
    prompts = {"data": {"prompts": str(folder / "p.jsonl")}}
    tree = {
        "run": {"dir": str(folder / "runs"), "name": "r"},
        "model": {"path": "m"},
        "sample": prompts,
        "label": {"by": "people"},
        "dpo": {"beta": 0.2},
        **more,
    }
    return check_config(PipelineConfig, tree, where="test")


QUIET = Reporter(quiet=True)


def status(run: Path) -> str:
    return str(json.loads((run / "manifest.json").read_text())["status"])


def dies_at(stage: str, problem: BaseException) -> None:
    def act(name: str) -> None:
        if name == stage:
            raise problem

    FakeWork.act = staticmethod(act)


def test_the_same_command_goes_on_where_it_was_stopped(world: Path) -> None:
    dies_at("gate", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        begin_pipeline(config(world), QUIET)
    run = world / "runs" / "r"
    assert status(run) == "interrupted"
    FakeWork.act = staticmethod(lambda name: None)
    assert begin_pipeline(config(world), QUIET) == run
    assert status(run) == "finished"
    stages = ("sample", "label", "label", "gate", "policy", "promote")  # labels end with the gate
    assert FakeWork.done == [f"1/{name}" for name in stages]
    assert closing_lines(run) == [str(run), f"talk to it: accord chat {run}"]


def test_settings_of_stages_to_come_may_change_and_others_not(world: Path) -> None:
    begin_pipeline(config(world), QUIET)
    run = str(world / "runs" / "r")
    with pytest.raises(UserError, match="cannot change on resume: dpo"):
        begin_pipeline(config(world, dpo={"beta": 0.3}), QUIET)
    with pytest.raises(UserError, match="cannot change on resume: model"):
        resume_pipeline(run, ["model.path=other"], QUIET)
    resume_pipeline(run, ["rounds=2", "choice.count=5"], QUIET)
    assert FakeWork.done[-1] == "2/promote"
    stored = (world / "runs" / "r" / "config.toml").read_text()
    assert "rounds = 2" in stored
    assert "count = 5" in stored


def test_a_failed_gate_opens_the_labels_again_when_more_are_asked_for(world: Path) -> None:
    dies_at("gate", UserError("alpha is 0.1"))
    run = world / "runs" / "r"
    with pytest.raises(UserError, match="alpha"):
        begin_pipeline(config(world), QUIET)
    assert status(run) == "failed"  # what was labelled is kept
    with pytest.raises(UserError, match="alpha"):
        resume_pipeline(str(run), [], QUIET)
    assert FakeWork.done == ["1/sample", "1/label", "1/label"]
    FakeWork.act = staticmethod(lambda name: None)
    resume_pipeline(str(run), ["choice.count=40"], QUIET)
    assert FakeWork.done[3:5] == ["1/label", "1/gate"]


def test_a_mistake_before_the_first_stage_leaves_nothing_behind(world: Path) -> None:
    dies_at("sample", UserError("no such model"))
    with pytest.raises(UserError, match="no such model"):
        begin_pipeline(config(world), QUIET)
    assert not (world / "runs").exists()


def test_who_waits_for_people_does_so_in_a_new_process(world: Path) -> None:
    run = world / "runs" / "r"
    dies_at("label", Afresh(str(run)))
    with pytest.raises(Afresh):
        begin_pipeline(config(world), QUIET)
    assert status(run) == "stopped"
    assert [(s.name, s.status) for s in PipelineRecord(run, 1).stages()] == [
        ("sample", "finished"), ("label", "running")
    ]  # fmt: skip


def test_another_commands_run_is_refused(world: Path) -> None:
    run = world / "runs" / "r"
    run.mkdir(parents=True)
    (run / "manifest.json").write_text('{"command": "sft", "status": "finished"}')
    for attempt in (
        lambda: begin_pipeline(config(world), QUIET),
        lambda: resume_pipeline(str(run), [], QUIET),
    ):
        with pytest.raises(UserError, match="is a run of `accord sft`, not of `accord pipeline`"):
            attempt()


@pytest.mark.parametrize(
    ("more", "where"),
    [
        ({"sft": {"data": {"path": "gone.jsonl"}}}, "sft.data.path"),
        ({"evaluate": {"data": {"prompts": "gone.jsonl"}, **JUDGE}}, "evaluate.data.prompts"),
        (
            {
                "evaluate": {
                    "data": {"prompts": "datasets:x"},
                    "judge": {"sources": [{"type": "function", "path": "gone.py:f"}]},
                }
            },
            "evaluate.judge.sources.0.path",
        ),
    ],
)
def test_what_a_later_stage_would_miss_is_said_at_once(
    world: Path, more: dict[str, Any], where: str
) -> None:
    with pytest.raises(UserError, match="there is no file") as told:
        check_inputs(config(world, **more))
    assert told.value.where == where


def evaluated(folder: Path, low: float, **more: Any) -> tuple[bool, str]:
    settings = config(folder, evaluate={"data": {"prompts": "p"}, **JUDGE}, **more)
    record = PipelineRecord(folder, 1)
    rate = {"win_rate": 0.6, "ci_low": low, "ci_high": 0.7}
    detail = {**rate, "against_before": rate}
    record.put(StageRecord(round=1, name="evaluate", status="finished", detail=detail))
    return verdict(settings, round_of(1, settings, record))


def test_the_lower_end_of_the_interval_decides(world: Path) -> None:
    assert evaluated(world, 0.51)[0]
    promoted, reason = evaluated(world, 0.5)
    assert not promoted
    assert "50.0% to 70.0%); the lower end must exceed 50%" in reason
    assert not evaluated(world, 0.54, promote={"min_win_rate": 0.55})[0]


def test_who_waits_has_not_imported_what_computes() -> None:
    code = (
        "import cluster.pipeline.pipeline, sys; print({'torch', 'ray', 'vllm'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
