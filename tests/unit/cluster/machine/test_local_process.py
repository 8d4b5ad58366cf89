"""An object in a process of its own: its answers, its exceptions, and what ends with what."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import psutil
import pytest

from cluster.contracts.errors import Unexpected, UserError, WorkerDied
from cluster.machine.fork_server import fork_server
from cluster.machine.local_process import LocalProcess

PATIENCE_S = 60.0

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there are forks on Linux only")


class Sums:
    """Pickled by its name, so the process imports this file."""

    def __init__(self, start: int) -> None:
        self._start = start

    def add(self, number: int) -> int:
        return self._start + number

    def pid(self) -> int:
        return os.getpid()

    def refuse(self) -> NoReturn:
        raise UserError("is no number", where="here", fix="give one")

    def fail(self) -> NoReturn:
        raise ZeroDivisionError("by nothing")

    def sleep(self) -> None:
        time.sleep(600)

    def die(self) -> NoReturn:
        os.write(1, b"the last words\n")
        os._exit(9)


@pytest.fixture(params=["forked", "new"])
def sums(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalProcess]:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[4]))
    if request.param == "new":
        process = LocalProcess("sums", Sums, 40)
        yield process
        process.end()
        return
    with fork_server((), {}):
        process = LocalProcess("sums", Sums, 40)
        yield process
        process.end()


def test_calls_are_answered_at_the_same_time_and_exceptions_come_back(sums: LocalProcess) -> None:
    async def calls() -> list[object]:
        sleeping = asyncio.ensure_future(sums.call("sleep"))
        found = [await sums.call("add", 2), await sums.call("pid")]
        for method in ("refuse", "fail"):
            try:
                await sums.call(method)
            except (UserError, Unexpected) as problem:
                found.append(problem)
        sleeping.cancel()
        return found

    answer, pid, refused, failed = asyncio.run(calls())
    assert answer == 42
    assert pid != os.getpid()
    assert isinstance(refused, UserError)
    assert "is no number" in str(refused)
    assert str(failed) == "ZeroDivisionError: by nothing"
    assert psutil.Process(int(str(pid))).name() == "accord:sums"
    sums.end()
    assert not psutil.pid_exists(int(str(pid)))


def test_a_process_that_dies_is_told_to_who_waits_and_who_comes_later(sums: LocalProcess) -> None:
    async def die() -> None:
        waiting = asyncio.ensure_future(sums.call("sleep"))
        with pytest.raises(WorkerDied, match=r"sums is lost.*\(the last words\)"):
            await sums.call("die")
        with pytest.raises(WorkerDied):
            await waiting
        with pytest.raises(WorkerDied):
            await sums.call("add", 1)

    asyncio.run(die())
