"""The real controller saves beside training: nothing waits for a checkpoint but for the copy of the
learner's state, and a disk that is full ends nothing."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.contracts.durable import FileDigest
from cluster.contracts.errors import NotSaved, Resumable
from cluster.contracts.records import RunState
from cluster.loop.controller import Controller
from cluster.runs.checkpoints import Checkpoints, verify_checkpoint
from cluster.runs.run import Run
from tests.unit.cluster.loop.test_controller import FakeLearner, World, build, drive, events

SLOW_S = 2.0  # of a disk: longer than a worker may be silent


class Learner(FakeLearner):
    """Notes the steps between which it was copied and while which it was written."""

    def __init__(self, seconds: float = 0.005) -> None:
        super().__init__(seconds=seconds)
        self.writing: list[tuple[int, int]] = []
        self.steps_to_wait = 0

    async def store(self, directory: str) -> tuple[FileDigest, ...]:
        first = self.version
        while self.version < first + self.steps_to_wait:
            await asyncio.sleep(0.001)  # for ever, if steps waited for the checkpoint
        files = await super().store(directory)
        self.writing.append((first, self.version))
        return files


def made(tmp_path: Path, learner: FakeLearner, **settings: Any) -> tuple[Controller, Any, Run]:
    usual = {"steps": 20, "stall_timeout_s": SLOW_S / 4}
    controller, pool, run, _ = build(tmp_path, World(), learner, **{**usual, **settings})
    return controller, pool, run


def told(run: Run, kind: str) -> list[dict[str, Any]]:
    return [event for event in events(run) if event["kind"] == kind]


def saved(run: Run) -> list[int]:
    return [event["step"] for event in told(run, "checkpoint")]


def test_steps_go_on_while_a_checkpoint_is_written_and_one_is_written_at_a_time(
    tmp_path: Path,
) -> None:
    learner = Learner()
    learner.steps_to_wait = 3
    controller, pool, run = made(tmp_path, learner, checkpoint_every=1)

    async def scenario() -> None:
        await asyncio.wait_for(drive_to_last_save(), 60)

    async def drive_to_last_save() -> None:
        task = asyncio.ensure_future(drive(controller, pool))
        while controller.step < 16:  # no step comes any more that the last saves could wait for
            await asyncio.sleep(0.001)
        learner.steps_to_wait = 0
        await task

    asyncio.run(scenario())
    assert saved(run)[-1] == 20
    assert len(saved(run)) < 10  # what was due meanwhile is one checkpoint, of the newest step
    ends = [end for _, end in learner.writing]
    assert all(first >= end for (first, _), end in zip(learner.writing[1:], ends, strict=False))
    assert learner.batches[-1].step == 19
    for path in run.checkpoints.complete():  # of the state when it was copied, not when written
        weights = (path / "policy" / "model.safetensors").read_bytes()
        assert weights.endswith(b"weights" + str(int(path.name[5:])).encode())


def test_a_slow_disk_loses_no_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashing on the event loop once let every worker's deadline pass: all were declared lost."""
    commit = Checkpoints.commit

    learner = Learner(seconds=0.02)
    steps_meanwhile: list[int] = []

    def slowly(self: Checkpoints, *args: Any) -> Path:
        before = learner.version
        time.sleep(SLOW_S)
        steps_meanwhile.append(learner.version - before)
        return commit(self, *args)

    monkeypatch.setattr(Checkpoints, "commit", slowly)
    controller, pool, run = made(tmp_path, learner, checkpoint_every=4, steps=100)
    asyncio.run(drive(controller, pool))
    assert told(run, "worker_lost") == []
    assert saved(run)[-1] == 100
    first = told(run, "checkpoint")[0]
    assert first["step"] == 4
    assert steps_meanwhile[0] > 0
    assert first["seconds"] >= SLOW_S > first["learner_waited_s"]


def test_a_checkpoint_is_due_by_time_too(tmp_path: Path) -> None:
    learner = Learner(seconds=0.02)
    controller, pool, run = made(
        tmp_path, learner, checkpoint_every=1000, checkpoint_every_s=0.05, steps=30
    )
    asyncio.run(drive(controller, pool))
    assert len(saved(run)) > 2


def test_a_full_disk_ends_nothing_and_the_next_interval_tries_again(tmp_path: Path) -> None:
    learner = FakeLearner(seconds=0.02)
    learner.store_problems = [NotSaved("disk full"), NotSaved("disk full")]
    controller, pool, run = made(tmp_path, learner, checkpoint_every=4, steps=16)
    asyncio.run(drive(controller, pool))
    assert [event["cause"] for event in told(run, "checkpoint_failed")] == ["disk full"] * 2
    assert saved(run) == [12, 16]
    assert sorted(path.name for path in run.checkpoints.folder.iterdir()) == [
        "step-000012",
        "step-000016",
    ]
    assert all(verify_checkpoint(path) is None for path in run.checkpoints.complete())


def test_rollouts_that_do_not_fit_are_told_when_it_begins_and_when_it_is_over(
    tmp_path: Path,
) -> None:
    class Full(Learner):
        async def step(self, batch: Any) -> Any:
            result = await super().step(batch)
            causes = ("disk full",) if 4 <= batch.step < 9 else ()
            return replace(result, not_written=causes)

    controller, pool, run = made(tmp_path, Full(), steps=14)
    asyncio.run(drive(controller, pool))
    assert [event["step"] for event in told(run, "rollouts_not_written")] == [5]
    again = told(run, "rollouts_written_again")
    assert [(event["step"], event["missing"]) for event in again] == [(10, 5)]


def test_a_run_whose_last_state_cannot_be_written_says_so(tmp_path: Path) -> None:
    learner = FakeLearner(seconds=0.01)
    learner.store_problems = [NotSaved("disk full")] * 9
    controller, pool, run = made(tmp_path, learner, checkpoint_every=4, steps=8)
    with pytest.raises(Resumable, match="step 8, could not be saved: disk full"):
        asyncio.run(drive(controller, pool))
    assert list(run.checkpoints.folder.iterdir()) == []


def test_a_run_resumed_at_its_end_saves_what_its_newest_checkpoint_lacks(tmp_path: Path) -> None:
    """Killed after its last step and before the checkpoint of it: the learner has trained the steps
    since again, and there is nothing left to do but to save them."""
    state = RunState(step=6, version=6, next_group=18, prompts_total=1000, dropped=())
    controller, pool, run = made(tmp_path, FakeLearner(version=6), steps=6, state=state, saved=4)
    asyncio.run(drive(controller, pool))
    assert run.checkpoints.newest_good().state.step == 6
