"""A run behind a URL: probed, copied with the manifest last, brought to another host."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fsspec
import pytest
from pydantic import BaseModel

from cluster.contracts.errors import UserError
from cluster.contracts.records import RunState
from cluster.runs.mirror import VARIABLE, Mirror, folder_of, url_of
from cluster.runs.run import Run
from tests.checkpoint_files import write_checkpoint


class Settings(BaseModel):
    seed: int = 3


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "work"))
    fsspec.filesystem("memory").store.clear()
    return tmp_path / "work"


def save(run: Run, step: int) -> None:
    staging = run.checkpoints.begin(step)
    state = RunState(step=step, version=step, next_group=step, prompts_total=9)
    run.checkpoints.commit(staging, write_checkpoint(staging, str(step)), state, 2)


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("s3://bucket/runs", "s3://bucket/runs"),
        ("s3:/bucket/runs", "s3://bucket/runs"),  # as a Path has it
        ("memory://runs", "memory://runs"),
        ("local:///mnt/runs", "local:///mnt/runs"),
        ("file:///mnt/runs", None),
        ("runs/mine", None),
        ("/a/b", None),
        ("C:/runs", None),
    ],
)
def test_a_url_is_told_from_a_path(given: str, url: str | None) -> None:
    assert url_of(given) == url


def test_a_file_url_is_a_path_of_this_host() -> None:
    assert folder_of("file:///mnt/runs") == Path("/mnt/runs")
    assert folder_of("runs/mine") == Path("runs/mine")


def test_a_run_goes_on_from_its_url_on_another_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.create("memory://runs", "r", "train", Settings())
    assert run.mirror is not None
    save(run, 4)
    (run.path / "driver.lock").write_text("{}")
    run.mirror.push()
    for step in (8, 12):
        save(run, step)
        run.mirror.push()

    monkeypatch.setenv(VARIABLE, str(tmp_path / "another host"))
    there = Run.open("memory:/runs/r")  # as a command hands it over
    assert there.path != run.path
    assert [path.name for path in there.checkpoints.complete()] == ["step-000008", "step-000012"]
    assert there.checkpoints.newest_good().state.step == 12
    assert not (there.path / "driver.lock").exists()
    assert there.mirror == Mirror("memory://runs/r", there.path)
    save(there, 16)
    assert Run.open("memory://runs/r").newest_checkpoint() == 16  # here is newer than there
    for step in (999_999, 1_000_000):  # not in this order by name
        save(run, step)
        run.mirror.push()
        assert Run.open("memory://runs/r").newest_checkpoint() == step


def test_what_was_cut_off_while_it_was_copied_is_not_taken_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.create("memory://runs", "r", "train", Settings())
    assert run.mirror is not None
    save(run, 4)
    run.mirror.push()
    save(run, 8)
    memory = fsspec.filesystem("memory")
    put, copied = type(memory).put_file, []

    def until_cut(self: Any, source: str, target: str, *more: Any, **others: Any) -> None:
        if len(copied) == 3:
            raise OSError("connection lost")
        copied.append(target)
        put(self, source, target, *more, **others)

    monkeypatch.setattr(type(memory), "put_file", until_cut)
    with pytest.raises(OSError, match="connection lost"):
        run.mirror.push()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "another host"))
    assert Run.open("memory://runs/r").checkpoints.newest_good().state.step == 4


def test_a_run_that_is_there_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.create("memory://runs", "r", "train", Settings())
    assert run.mirror is not None
    run.mirror.push()
    assert json.loads((run.path / "manifest.json").read_text())["mirror"] == "memory://runs/r"
    monkeypatch.setenv(VARIABLE, str(tmp_path / "another host"))
    with pytest.raises(UserError, match="the run directory exists"):
        Run.create("memory://runs", "r", "train", Settings())


def test_a_place_that_cannot_be_used_is_told_at_once(work: Path) -> None:
    with pytest.raises(UserError, match="cannot use it: ") as caught:
        Run.create("nosuchstore://runs", "r", "train", Settings())
    assert caught.value.where == "nosuchstore://runs/r"
    with pytest.raises(UserError, match="is not a run"):
        Run.open("memory://runs/none")
    assert not list(work.rglob("manifest.json"))
