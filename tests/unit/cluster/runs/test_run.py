from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import BaseModel

from cluster.contracts.errors import UserError
from cluster.runs.artefacts import artefact_hash
from cluster.runs.run import Run
from cluster.runs.status import read_status


class Settings(BaseModel):
    seed: int = 3


def make(tmp_path: Path, command: str = "train") -> Run:
    return Run.create(str(tmp_path), "r", command, Settings(), seed=3)


def test_a_run_directory_is_never_shared(tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(UserError, match="the run directory exists"):
        make(tmp_path)


def test_what_was_asked_for_on_a_resume_holds_for_the_next(tmp_path: Path) -> None:
    run = make(tmp_path)
    run.update_manifest(status="finished")
    run.resume(Settings(seed=5), step=4)
    assert (run.path / "config.toml").read_text() == "seed = 5\n"
    assert read_status(run)["events"] == {"resumed": 1}
    assert json.loads((run.path / "manifest.json").read_text())["status"] == "running"


def test_the_manifest_has_the_hash_of_each_parent_from_the_begin(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    parents = {"data": str(rows), "model": "org/model"}
    run = Run.create(str(tmp_path), "r", "sft", Settings(), parents=parents)
    begun = json.loads((run.path / "manifest.json").read_text())["parent_hashes"]
    assert begun == {"data": artefact_hash(rows), "model": None}
    assert run.changed_parents(Settings()) == []
    rows.write_text("{}\n{}\n")
    assert run.changed_parents(Settings()) == ["data"]
    run.resume(Settings())
    assert json.loads((run.path / "manifest.json").read_text())["parent_hashes"] == begun
    assert read_status(run)["events"] == {"resumed": 1, "parents_changed": 1}
