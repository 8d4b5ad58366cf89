"""Whether the process that drives a run is alive: killed, a zombie, an id used again, elsewhere."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.runs.driver import Driver, driver_of

ROOT = Path(__file__).resolve().parents[4]
HOLDS_A_RUN = """
import sys, time
from pydantic import BaseModel
from cluster.runs.run import Run
class Empty(BaseModel): ...
run = Run.create(sys.argv[1], "r", "train", Empty())
with run.lock():
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS_A_RUN, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_killed_driver_is_dead_even_before_it_is_reaped(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    driver = driver_of(tmp_path / "r")
    assert driver is not None
    assert (driver.pid, driver.alive()) == (holder.pid, True)
    os.kill(holder.pid, signal.SIGKILL)
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # it has ended and is a zombie now
    assert driver.alive() is False
    holder.wait()
    assert driver.alive() is False


def test_without_a_lock_the_maker_of_the_run_is_its_driver(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    (tmp_path / "r" / "driver.lock").unlink()
    driver = driver_of(tmp_path / "r")
    assert driver is not None
    assert driver.pid == holder.pid


def test_another_process_with_the_same_id_is_not_the_driver() -> None:
    me = Driver.of_this_process()
    assert me.alive() is True
    assert replace(me, started=(me.started or 0) + 1).alive() is False
    assert replace(me, boot="of another day").alive() is False
    assert replace(me, started=None).alive() is True
    assert replace(me, host="elsewhere").alive() is None


def test_a_damaged_lock_names_nobody(tmp_path: Path) -> None:
    assert driver_of(tmp_path) is None
    for text in ("", "[]", '{"pid": "x"}', "nonsense"):
        (tmp_path / "driver.lock").write_text(text)
        assert driver_of(tmp_path) is None
