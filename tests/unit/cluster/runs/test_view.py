"""A run directory read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.contracts.config.base import ModelConfig
from cluster.contracts.config.offline import SftConfig, SftDataConfig
from cluster.contracts.errors import UserError
from cluster.runs.run import Run
from cluster.runs.view import RunView


@pytest.fixture
def run(tmp_path: Path) -> Run:
    config = SftConfig(model=ModelConfig(path="m"), data=SftDataConfig(path="d"))
    return Run.create(str(tmp_path), "r", "sft", config)


def test_what_is_there_is_read_and_what_is_not_is_named(run: Run) -> None:
    rows = [{"step": 2, "x": 1.0}, {"step": 1, "x": 0.0}, {"step": 2, "x": 3.0}]
    lines = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "x'
    (run.path / "metrics.jsonl").write_text(lines)
    run.event("alarm", alarm="kl-budget", change="start", step=1)
    run.event("alarm", alarm="kl-budget", change="end", step=2)
    view = RunView.open(run.path)
    assert [(row["step"], row["x"]) for row in view.metrics] == [(1, 0.0), (2, 3.0)]
    assert (view.name, view.status, view.config["model"]["path"]) == ("r", "running", "m")
    assert [(alarm["alarm"], alarm["step"]) for alarm in view.alarms] == [("kl-budget", 1)]
    assert (view.checkpoints, view.sampled_steps) == ([], [])
    for name in ("policy_path", "reward_model_path", "report_path", "evaluation"):
        with pytest.raises(UserError, match="has no "):
            getattr(view, name)
    with pytest.raises(UserError, match="no completions of step 1"):
        view.samples()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run directory"):
        RunView.open(tmp_path)


def test_inputs_may_be_there_before_the_run_but_nothing_else(tmp_path: Path) -> None:
    config = SftConfig(model=ModelConfig(path="m"), data=SftDataConfig(path="d"))
    (tmp_path / "a" / "inputs").mkdir(parents=True)
    assert Run.create(str(tmp_path), "a", "sft", config).path == tmp_path / "a"
    with pytest.raises(UserError, match="the run directory exists"):
        Run.create(str(tmp_path), "a", "sft", config)
