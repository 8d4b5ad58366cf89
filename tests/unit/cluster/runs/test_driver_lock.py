"""One process drives a run: whoever races for it, whoever died, wherever it was."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from cluster.contracts.errors import UserError
from cluster.runs.driver import LOCK, Driver, driver_lock, driver_of

RACES = 60
fork = multiprocessing.get_context("fork")


def _race(folder: Path, start: Any, end: Any, results: Any) -> None:
    for number in range(RACES):
        run = folder / str(number)
        start.wait(60)
        try:
            with driver_lock(run):
                found = driver_of(run)
                results.put((number, found is not None and found.pid == os.getpid()))
                end.wait(60)  # all have tried
        except UserError:
            end.wait(60)


def test_of_several_that_race_exactly_one_gets_the_run(tmp_path: Path) -> None:
    racers = 3
    for number in range(RACES):
        (tmp_path / str(number)).mkdir()
        if number % 2:  # what a dead process has left
            gone = {**Driver.of_this_process().record(), "pid": 2**22 + 1}
            (tmp_path / str(number) / LOCK).write_text(json.dumps(gone))
    start, end, results = fork.Barrier(racers), fork.Barrier(racers), fork.Queue()
    work = (tmp_path, start, end, results)
    children = [fork.Process(target=_race, args=work) for _ in range(racers)]
    for child in children:
        child.start()
    won = [results.get(timeout=60) for _ in range(RACES)]
    for child in children:
        child.join(60)
    assert sorted(won) == [(number, True) for number in range(RACES)]
    assert results.empty()


def _hold(folder: Path, ready: Any) -> None:
    with driver_lock(folder):
        ready.set()
        signal.pause()


def test_a_living_holder_is_named_and_a_dead_one_replaced(tmp_path: Path) -> None:
    ready = fork.Event()
    holder = fork.Process(target=_hold, args=(tmp_path, ready))
    holder.start()
    assert ready.wait(60)
    with pytest.raises(UserError, match=f"process {holder.pid} is driving"), driver_lock(tmp_path):
        pass
    assert holder.pid is not None
    os.kill(holder.pid, signal.SIGKILL)
    holder.join(60)
    assert (tmp_path / LOCK).exists()
    with driver_lock(tmp_path):
        assert Driver.of_this_process() == driver_of(tmp_path)
    assert not (tmp_path / LOCK).exists()


def test_a_driver_on_another_host_is_named(tmp_path: Path) -> None:
    elsewhere = {**Driver.of_this_process().record(), "host": "far", "pid": 7}
    (tmp_path / LOCK).write_text(json.dumps(elsewhere))
    with pytest.raises(UserError, match="process 7 on host far") as caught, driver_lock(tmp_path):
        pass
    assert f"remove {tmp_path / LOCK}" in caught.value.fix
    assert json.loads((tmp_path / LOCK).read_text()) == elsewhere


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}'])
def test_a_damaged_record_holds_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK).write_text(text)
    with driver_lock(tmp_path):
        assert driver_of(tmp_path) == Driver.of_this_process()
