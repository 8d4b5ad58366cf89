"""Each crash point of the driver is passed by the real controller and run directory, and leaves on
disk what its name says. No process ends here: the end is replaced by a look at the disk."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from cluster.contracts import crash_points
from cluster.contracts.errors import UserError
from cluster.runs.checkpoints import Checkpoints
from tests.unit.cluster.loop.test_controller import FakeLearner, World, build, drive

BETWEEN_LOOPS = "driver.mid_rollback"  # tests/unit/cluster/assembly/test_going_back.py passes it
OF_DRIVER = [
    name
    for name in crash_points.POINTS
    if name.startswith(crash_points.DRIVER) and name != BETWEEN_LOOPS
]
NEWEST_AT_SECOND_SAVE = {  # saves are at step 4 and at step 6, the last one
    "driver.mid_save": 4,
    "driver.before_commit": 4,
    "driver.after_manifest": 4,
    "driver.after_commit": 6,
}


def ends_seen(point: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Exit codes of the ends; `tmp_path`/at_the_end is the run directory as it then was."""
    controller, pool, run, _ = build(tmp_path, World(), FakeLearner())
    ends: list[int] = []

    def end(code: int) -> None:
        ends.append(code)
        shutil.copytree(run.path / "checkpoints", tmp_path / "at_the_end", dirs_exist_ok=True)

    (run.path / "checkpoints").mkdir(exist_ok=True)
    monkeypatch.setattr(crash_points, "_end", end)
    crash_points.arm(point)
    try:
        asyncio.run(drive(controller, pool))
    finally:
        crash_points.arm(None)
    return ends


@pytest.mark.parametrize("name", OF_DRIVER)
def test_each_point_of_the_driver_is_passed_a_second_time(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ends_seen(f"{name}:2", tmp_path, monkeypatch) == [137]


@pytest.mark.parametrize(("name", "step"), NEWEST_AT_SECOND_SAVE.items())
def test_an_end_while_saving_leaves_a_good_checkpoint(
    name: str, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends_seen(f"{name}:2", tmp_path, monkeypatch)
    found = Checkpoints(tmp_path / "at_the_end", lambda *_, **__: None).newest_good()
    assert (found.state.step, dict(found.passed_over)) == (step, {})


def test_a_run_that_was_told_nothing_passes_them_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash_points.arm_from({})
    controller, pool, _, _ = build(tmp_path, World(), FakeLearner())
    monkeypatch.setattr(crash_points, "_end", lambda code: pytest.fail("ended"))
    assert asyncio.run(drive(controller, pool)).step == 6


def test_a_point_of_the_learner_is_handed_over_once() -> None:
    crash_points.arm_from({"ACCORD_CRASH_AT": "learner.mid_save:3"})
    assert crash_points.take_learners() == ("learner.mid_save:3", None)
    assert crash_points.take_learners() is None  # the one that takes over must live
    crash_points.arm("learner.mid_save@1:2")
    assert crash_points.take_learners() == ("learner.mid_save:2", 1)
    crash_points.arm("driver.after_step")
    assert crash_points.take_learners() is None
    crash_points.arm(None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("driver.lunch", r"ACCORD_CRASH_AT: no crash point 'driver.lunch'\n  fix: one of\n"),
        ("driver.mid_save:0", "'0' is not a number of passings"),
        ("driver.mid_save:soon", "'soon' is not a number of passings"),
        ("driver.mid_save@1", "'driver.mid_save@1' names no process of the learner"),
        ("learner.mid_save@one", "'learner.mid_save@one' names no process of the learner"),
    ],
)
def test_a_name_that_no_place_has_is_one_clear_message(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        crash_points.arm(text)
