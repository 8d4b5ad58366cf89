"""The commands that steer a run: asked, acknowledged, followed; and a dead run told from a live
one before anything is promised."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from cluster.contracts.durable import write_json
from cluster.contracts.errors import UserError
from cluster.runs import steer
from cluster.runs.control import ControlFile, Wishes
from cluster.runs.driver import Driver
from cluster.runs.run import Run


class Config(BaseModel):
    pass


def make(folder: Path, command: str = "train") -> Run:
    return Run.create(str(folder), "r", command, Config())


@contextmanager
def driven(run: Run, act: Callable[[Wishes], None]) -> Iterator[None]:
    """A process that acknowledges each request and then acts on it."""
    over = threading.Event()

    def loop() -> None:
        read, last = ControlFile(run.path, run.event), ""
        while not over.wait(0.01):
            wishes = read()
            if wishes.request != last:
                last = wishes.request
                run.event("control", request=last, workers=2, serving=2, step=4)
                act(wishes)

    with run.lock():
        thread = threading.Thread(target=loop)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def test_scale_says_which_workers_came(tmp_path: Path) -> None:
    run = make(tmp_path)

    def act(wishes: Wishes) -> None:
        assert wishes.workers == 3
        run.event("worker_serving", worker="worker-2")

    with driven(run, act):
        said = steer.scale_workers(run.path, 3, 20.0)
    assert said.startswith("2 → 3 workers: worker-2 serves after ")


def test_scale_to_none_says_who_left(tmp_path: Path) -> None:
    run = make(tmp_path)

    def act(wishes: Wishes) -> None:
        for name in ("worker-1", "worker-0"):
            run.event("worker_left", worker=name)

    with driven(run, act):
        said = steer.scale_workers(run.path, 0, 20.0)
    assert said.startswith("2 → 0 workers: worker-1 left")


@pytest.mark.parametrize("kind", ["worker_not_joined", "workers_missing"])
def test_scale_says_what_keeps_a_worker_away(tmp_path: Path, kind: str) -> None:
    run = make(tmp_path)

    def act(wishes: Wishes) -> None:
        run.event(kind, cause="no host has 1 CPU free")

    with driven(run, act):
        said = steer.scale_workers(run.path, 3, 1.0)
    assert "2 serve after" in said
    assert "no host has 1 CPU free" in said


def test_pause_and_resume_wait_for_the_run(tmp_path: Path) -> None:
    run = make(tmp_path)

    def act(wishes: Wishes) -> None:
        run.event("paused" if wishes.paused else "unpaused", step=4, finished_groups=1)

    with driven(run, act):
        assert steer.pause(run.path, 20.0).startswith("paused after step 4, with 1 finished")
        assert steer.unpause(run.path, 20.0) == "goes on after step 4"


def test_stop_waits_for_the_end(tmp_path: Path) -> None:
    run = make(tmp_path)

    def act(wishes: Wishes) -> None:
        (run.path / "checkpoints" / "step-000004").mkdir(parents=True)
        run.update_manifest(status="stopped")

    with driven(run, act):
        said = steer.stop(run.path, 20.0)
    assert said == f"stopped after step 4; to continue: accord train --resume {run.path}"


def test_a_run_that_does_not_answer_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steer, "TAKEN_WITHIN_S", 0.5)
    run = make(tmp_path)
    with run.lock(), pytest.raises(UserError, match="has not taken the request"):
        steer.scale_workers(run.path, 3, 1.0)


@pytest.mark.parametrize("state", ["dead", "finished", "interrupted", "failed"])
def test_nothing_is_promised_of_a_run_that_has_ended(tmp_path: Path, state: str) -> None:
    run = make(tmp_path)
    if state == "dead":
        dead = Driver.of_this_process().record() | {"pid": 2**22 + 1}
        write_json(run.path / "driver.lock", dead)
    else:
        run.update_manifest(status=state)
    calls: list[Callable[[], Any]] = [
        lambda: steer.scale_workers(run.path, 1, 0.0),
        lambda: steer.pause(run.path, 0.0),
        lambda: steer.unpause(run.path, 0.0),
        lambda: steer.stop(run.path, 0.0),
    ]
    for call in calls:
        with pytest.raises(UserError, match=r"(?s)not in progress.*accord train --resume"):
            call()
    assert not (run.path / "control.json").exists()


def test_only_training_runs_are_steered(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="accord sft"):
        steer.pause(make(tmp_path, "sft").path, 0.0)
