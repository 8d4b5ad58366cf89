"""The disk of a run is full for a while, a real one (tmpfs): training goes on, says so once, and
nothing that is needed to account for it or to see it is missing afterwards."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cluster.runs.audit import audit_run
from cluster.runs.checkpoints import verify_checkpoint
from cluster.runs.rows import Follower
from cluster.runs.run import Run

pytestmark = [pytest.mark.slow, pytest.mark.long]

SIZE_MB = 100  # a checkpoint leaves 64 MiB free


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "runs"
    path.mkdir()
    mount = ("mount", "-t", "tmpfs", "-o", f"size={SIZE_MB}m", "tmpfs", str(path))
    if os.geteuid() != 0 or subprocess.run(mount, check=False).returncode != 0:
        pytest.skip("a file system can be mounted by root only")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def fill(path: Path) -> None:
    with path.open("ab", buffering=0) as file:
        for piece in (bytes(1 << 20), bytes(4096)):
            with suppress(OSError):
                while file.write(piece):
                    pass
    assert shutil.disk_usage(path).free < 4096


def kinds(run: Path, kind: str) -> list[dict[str, Any]]:
    rows = Follower(run / "events.jsonl", 1 << 30).new_rows()
    return [row for row in rows if row["kind"] == kind]


def test_a_run_goes_on_while_its_disk_is_full(disk: Path, world: Any, accord: Any) -> None:
    config = world.train_toml(
        accord.folder / "c.toml",
        'type = "rules"\nmax_words = 5',
        batch="prompts_per_step = 2\nsamples_per_prompt = 2\nsteps = 100000",
        checkpoint="every = 4\nkeep = 2",
        logging="ray_metrics = false\ntensorboard = true\nsamples_every = 0",
    )
    command, run = accord.start("train", config), disk / "r"
    command.wait_until(lambda: kinds(run, "checkpoint"), 240, "a checkpoint")
    ballast = disk / "ballast"

    def failed_checkpoints() -> list[int]:
        fill(ballast)  # also what a checkpoint that was deleted has left
        found = re.findall(r"no checkpoint was written at step (\d+)", command.stderr)
        return sorted({int(step) for step in found})

    command.wait_until(lambda: len(failed_checkpoints()) >= 4, 240, "four checkpoints to fail")
    full = failed_checkpoints()
    assert full[-1] - full[0] >= 8, "training goes on"
    ballast.unlink()
    saved = len(kinds(run, "checkpoint"))
    command.wait_until(lambda: len(kinds(run, "checkpoint")) > saved, 240, "another checkpoint")
    code, _ = command.interrupt()
    assert code == 130, command.stderr
    assert command.left() == []

    for sink in ("JsonlSink", "TensorBoardSink"):
        assert len(re.findall(f"but {sink} does not take", command.stderr)) == 1, command.stderr
        assert len(re.findall(f"{sink} takes numbers again", command.stderr)) == 1
    for kind in ("sink_failed", "sink_recovered"):
        told = sorted(row["sink"] for row in kinds(run, kind))
        assert told == ["JsonlSink", "TensorBoardSink"]
    (missing,) = kinds(run, "rollouts_written_again")
    assert len(kinds(run, "rollouts_not_written")) == 1
    audit = audit_run(str(run))
    assert audit.violations == []
    assert audit.steps - audit.files == missing["missing"]
    steps = [row["step"] for row in Follower(run / "metrics.jsonl", 1 << 30).new_rows()]
    assert steps == list(range(1, audit.steps + 1))
    assert all(verify_checkpoint(path) is None for path in Run(run).checkpoints.complete())
    assert json.loads((run / "manifest.json").read_text())["status"] == "interrupted"


def test_a_run_that_is_interrupted_on_a_full_disk_can_be_resumed(
    disk: Path, world: Any, accord: Any
) -> None:
    config = world.train_toml(
        accord.folder / "c.toml",
        'type = "rules"\nmax_words = 5',
        batch="prompts_per_step = 2\nsamples_per_prompt = 2\nsteps = 100000",
        checkpoint="every = 4\nkeep = 2",
    )
    command, run = accord.start("train", config), disk / "r"
    command.wait_until(lambda: kinds(run, "checkpoint"), 240, "a checkpoint")
    fill(disk / "ballast")
    command.wait_until(lambda: "no checkpoint was written" in command.stderr, 240, "the full disk")
    fill(disk / "ballast")
    code, _ = command.interrupt()
    assert "Traceback" not in command.stderr
    assert code == 75, command.stderr
    assert "could not be saved" in command.stderr
    assert command.left() == []

    (disk / "ballast").unlink()
    steps = audit_run(str(run)).steps
    again = accord.run("train", "--resume", run, f"batch.steps={steps + 2}", timeout_s=240)
    assert again.process.returncode == 0, again.stderr
    audit = audit_run(str(run))
    assert (audit.violations, audit.steps) == ([], steps + 2)
