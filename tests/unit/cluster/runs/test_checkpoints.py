"""A checkpoint exists only whole, and is used only if every byte of it is the one written."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from cluster.contracts.durable import FileDigest
from cluster.contracts.errors import NotSaved, UserError
from cluster.contracts.records import RunState
from cluster.runs.checkpoints import verify_checkpoint
from cluster.runs.evaluations import EvaluationFiles
from cluster.runs.run import Run
from cluster.runs.status import read_status
from cluster.runs.view import RunView
from tests.checkpoint_files import FILES, write_checkpoint

Usage = namedtuple("Usage", "total used free")
ALL = [*FILES, "run_state.json", "manifest.json"]


class Settings(BaseModel):
    seed: int = 3


def make(tmp_path: Path) -> Run:
    return Run.create(str(tmp_path), "r", "train", Settings(), seed=3)


def save(run: Run, step: int, keep: int = 2) -> Path:
    staging = run.checkpoints.begin(step)
    files = write_checkpoint(staging, str(step))
    state = RunState(step=step, version=step, next_group=step, prompts_total=9)
    return run.checkpoints.commit(staging, files, state, keep)


def names(run: Run) -> list[str]:
    return sorted(path.name for path in run.checkpoints.folder.iterdir())


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = make(tmp_path_factory.mktemp("two"))
    save(run, 4)
    save(run, 8)
    return run


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_byte_flipped_cut_or_emptied_in_any_file_and_the_one_before_is_used(
    two: Run, data: st.DataObject
) -> None:
    path = two.checkpoints.path_of(8) / data.draw(st.sampled_from(ALL))
    content = path.read_bytes()
    match data.draw(st.sampled_from(["flip", "cut", "empty", "gone", "longer", "folder"])):
        case "flip":
            at = data.draw(st.integers(0, len(content) - 1))
            other = content[at] ^ data.draw(st.integers(1, 255))
            path.write_bytes(content[:at] + bytes([other]) + content[at + 1 :])
        case "cut":
            path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        case "empty":
            path.write_bytes(b"")
        case "gone":
            path.unlink()
        case "longer":
            path.write_bytes(content + data.draw(st.binary(min_size=1, max_size=4)))
        case "folder":
            path.unlink()
            path.mkdir()
    try:
        found = two.checkpoints.newest_good()
        assert (found.path.name, found.state.step) == ("step-000004", 4)
        assert [p.name for p in found.passed_over] == ["step-000008"]
    finally:
        if path.is_dir():
            path.rmdir()
        path.write_bytes(content)
    assert two.checkpoints.newest_good().state.step == 8


def test_what_was_passed_over_is_told_and_set_aside(tmp_path: Path) -> None:
    run = make(tmp_path)
    save(run, 4)
    (save(run, 8) / "trainer.json").write_text("{")
    found = run.checkpoints.newest_good()
    assert "trainer.json has 1 of" in found.passed_over[run.checkpoints.path_of(8)]
    assert "checkpoint_damaged" in (run.path / "events.jsonl").read_text()
    run.checkpoints.set_aside(found.passed_over)
    assert names(run) == ["damaged-step-000008", "step-000004"]
    assert run.newest_checkpoint() == 4


@pytest.mark.parametrize("files", [{}, {"run_state.json": 1}])
def test_a_manifest_that_names_too_little_is_refused(tmp_path: Path, files: dict[str, int]) -> None:
    """Also one whose own hash is right: an empty checkpoint was once committed so."""
    from cluster.runs.checkpoints import manifest_text

    run = make(tmp_path)
    save(run, 4)
    newer = save(run, 8)
    listed = [FileDigest(name, size, "0") for name, size in files.items()]
    (newer / "manifest.json").write_text(manifest_text(8, listed))
    assert "names no policy/config.json" in str(verify_checkpoint(newer))
    assert run.checkpoints.newest_good().state.step == 4


@pytest.mark.parametrize("lacking", [n for n in FILES if n.startswith(("policy", "trainer"))])
def test_a_checkpoint_without_a_file_it_must_have_is_never_committed(
    tmp_path: Path, lacking: str
) -> None:
    run = make(tmp_path)
    save(run, 4)
    staging = run.checkpoints.begin(8)
    files = [file for file in write_checkpoint(staging) if file.name != lacking]
    state = RunState(step=8, version=8, next_group=8, prompts_total=9)
    with pytest.raises(NotSaved, match="the learner did not write it"):
        run.checkpoints.commit(staging, files, state, 1)
    assert names(run) == ["step-000004"]


def test_a_file_that_did_not_reach_the_run_directory_is_noticed(tmp_path: Path) -> None:
    """A learner on another host wrote below the same name there."""
    run = make(tmp_path)
    save(run, 4)
    staging = run.checkpoints.begin(8)
    files = write_checkpoint(staging)
    shutil.rmtree(staging)
    staging.mkdir()
    state = RunState(step=8, version=8, next_group=8, prompts_total=9)
    with pytest.raises(NotSaved, match="is not the file"):
        run.checkpoints.commit(staging, files, state, 1)
    assert names(run) == ["step-000004"]


def test_no_good_checkpoint_is_one_message_that_names_each(tmp_path: Path) -> None:
    run = make(tmp_path)
    with pytest.raises(UserError, match="stopped before its first checkpoint"):
        run.checkpoints.newest_good()
    (save(run, 4) / "trainer.json").unlink()
    (save(run, 8) / "rng.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"no usable checkpoint\n  step-0{5}8: .*\n  step-0{5}4: "):
        run.checkpoints.newest_good()


def test_only_the_newest_good_ones_are_kept(tmp_path: Path) -> None:
    run = make(tmp_path)
    for step in (1, 2, 3, 4):
        save(run, step)
    assert names(run) == ["step-000003", "step-000004"]


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_ones_are_not_counted_and_the_one_just_written_stays(
    tmp_path: Path, keep: int
) -> None:
    """A damaged newer one, from before a resume, once made ``keep`` delete the good one."""
    run = make(tmp_path)
    save(run, 4)
    (save(run, 8) / "trainer.json").write_text("{")
    (save(run, 9, keep=3) / "trainer.json").write_text("{")
    fresh = Run(run.path)  # a resume: nothing is known of what is there
    save(fresh, 5, keep)
    good = [p.name for p in fresh.checkpoints.complete() if verify_checkpoint(p) is None]
    assert good == ["step-000004", "step-000005"][-keep:]


def test_a_full_disk_is_told_before_anything_is_written_and_old_ones_make_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(tmp_path)
    save(run, 1)
    save(run, 2)
    gigabyte = 1 << 30

    def usage(_: Path) -> Usage:
        return Usage(9 * gigabyte, 0, gigabyte * (3 - len(list(run.checkpoints.complete()))))

    monkeypatch.setattr(shutil, "disk_usage", usage)
    run.checkpoints.begin(3, gigabyte * 3 // 2)  # fits once the older of the two has gone
    assert names(run) == [".staging-000003", "step-000002"]
    with pytest.raises(
        NotSaved, match=r"a checkpoint of 3221\.2 MB and 67 MB for other files lack 1140\.9 MB"
    ):
        run.checkpoints.begin(3, gigabyte * 3)
    assert names(run) == ["step-000002"]  # the newest good one is never given up


def test_the_manifest_is_written_last(tmp_path: Path) -> None:
    run = make(tmp_path)
    (save(run, 4) / "manifest.json").unlink()
    with pytest.raises(UserError, match="no usable checkpoint"):
        run.checkpoints.newest_good()
    manifest = json.loads((save(run, 8) / "manifest.json").read_text())
    assert (manifest["step"], sorted(manifest["files"])) == (8, sorted([*FILES, "run_state.json"]))


def test_the_newest_is_that_of_the_latest_step_also_beyond_a_million(tmp_path: Path) -> None:
    """By name, step-1000000 would come before step-999999."""
    run = make(tmp_path)
    for step in (999_998, 999_999, 1_000_000):
        save(run, step, keep=2)
    assert [path.name for path in run.checkpoints.complete()] == ["step-999999", "step-1000000"]
    assert run.checkpoints.newest_good().state.step == 1_000_000
    assert RunView(run.path).checkpoints == run.checkpoints.complete()
    assert read_status(run)["checkpoint"]["step"] == 1_000_000


def test_the_checkpoint_that_best_json_names_is_never_deleted(tmp_path: Path) -> None:
    run = make(tmp_path)
    save(run, 2)
    files = EvaluationFiles(run.path)
    assert files.name_best(2, 0.5)
    for step in (4, 6, 8):
        save(run, step, keep=1)
        assert names(run) == ["step-000002", f"step-{step:06d}"]
    assert files.name_best(8, 0.7)  # another one is the best now
    save(run, 10, keep=1)
    assert names(run) == ["step-000008", "step-000010"]
    assert not files.name_best(6, 0.9)  # it is not there
