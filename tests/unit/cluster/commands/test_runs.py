"""`accord runs` and `accord status` on the command line: a table, a line per run, JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.commands.runs import runs
from cluster.commands.status import status
from cluster.contracts.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = (("first", "train", "finished"), ("first/ppo", "train", "failed"))
    for name, command, state in made:
        path = tmp_path / "runs" / name
        path.mkdir(parents=True)
        manifest = {"name": path.name, "command": command, "status": state}
        (path / "manifest.json").write_text(json.dumps(manifest))
    row = {"step": 3, "time": 1.0, "objective/scores": 0.5}
    (tmp_path / "runs" / "first" / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    return tmp_path / "runs"


def test_a_table_of_runs_and_their_stages(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs(folder)
    header, first, stage = (line.split() for line in capsys.readouterr().out.splitlines())
    assert header == ["run", "command", "status", "step", "latest", "started", "size"]
    assert first[:7] == ["first", "train", "finished", "3", "reward", "+0.500", "?"]
    assert stage[:5] == ["first/ppo", "train", "failed", "-", "-"]
    runs(folder, as_json=True)
    assert [row["step"] for row in json.loads(capsys.readouterr().out)] == [3, 0]


def test_status_without_a_run_has_a_line_for_each(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status(directory=folder)
    assert capsys.readouterr().out.splitlines() == [
        "first: finished (train), step 3, reward +0.500",
        "first/ppo: failed (train), step 0",
    ]
    status(folder / "first", as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert (found["status"], found["metrics"]["objective/scores"]) == ("finished", 0.5)


def test_a_folder_without_runs_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no runs"):
        runs(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        status(directory=tmp_path / "none")
