from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from pydantic import BaseModel

from cluster.contracts.errors import UserError
from cluster.contracts.records import RunState
from cluster.runs.run import Run, verify_checkpoint
from cluster.runs.status import read_status


class Settings(BaseModel):
    seed: int = 3


def make(tmp_path: Path, command: str = "train") -> Run:
    return Run.create(str(tmp_path), "r", command, Settings(), seed=3)


def save(run: Run, step: int, keep: int = 2) -> Path:
    staging = run.begin_checkpoint(step)
    (staging / "policy").mkdir()
    (staging / "policy" / "w.bin").write_bytes(b"w" * step)
    state = RunState(step=step, version=step, next_group=step, prompts_total=9)
    return run.commit_checkpoint(staging, state, keep)


def test_a_run_directory_is_never_shared(tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(UserError, match="the run directory exists"):
        make(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped", "manifest"])
def test_a_damaged_checkpoint_is_passed_over_and_told(tmp_path: Path, damage: str) -> None:
    run = make(tmp_path)
    save(run, 4)
    file = save(run, 8) / "policy" / "w.bin"
    match damage:
        case "missing":
            file.unlink()
        case "truncated":
            file.write_bytes(b"w" * 3)
        case "flipped":
            file.write_bytes(b"w" * 7 + b"x")
        case "manifest":
            (file.parent.parent / "manifest.json").write_text("{")
    assert verify_checkpoint(file.parent.parent) is not None
    path, state = run.latest_checkpoint()
    assert (path.name, state.step) == ("step-000004", 4)
    assert "checkpoint_damaged" in (run.path / "events.jsonl").read_text()


def test_a_checkpoint_without_its_manifest_does_not_exist(tmp_path: Path) -> None:
    run = make(tmp_path)
    (save(run, 4) / "manifest.json").unlink()
    with pytest.raises(UserError, match="no usable checkpoint"):
        run.latest_checkpoint()


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    run = make(tmp_path)
    for step in (1, 2, 3, 4):
        save(run, step)
    assert sorted(p.name for p in (run.path / "checkpoints").iterdir()) == [
        "step-000003",
        "step-000004",
    ]


def test_a_second_driver_is_refused_and_a_dead_one_replaced(tmp_path: Path) -> None:
    run = make(tmp_path)
    with run.lock():
        lock = run.path / "driver.lock"
        held = json.loads(lock.read_text())
        lock.write_text(json.dumps({**held, "pid": os.getppid(), "started": None}))
        with pytest.raises(UserError, match="is driving this run"), run.lock():
            pass
        lock.write_text(json.dumps({**held, "pid": 2**22 + 1}))
        with run.lock():
            pass


def test_what_was_asked_for_on_a_resume_holds_for_the_next(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.update_manifest(status="finished")
    run.resume(Settings(seed=5), step=4)
    assert (run.path / "config.toml").read_text() == "seed = 5\n"
    assert read_status(run)["events"] == {"resumed": 1}
    assert json.loads((run.path / "manifest.json").read_text())["status"] == "running"
