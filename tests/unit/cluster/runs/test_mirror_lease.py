"""Two drivers of one run at a URL, on hosts that see each other only there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
from pydantic import BaseModel

from cluster.contracts.errors import Fatal, UserError
from cluster.runs import mirror_lease
from cluster.runs.driver import Driver
from cluster.runs.mirror import LEASE, VARIABLE, Mirror
from cluster.runs.mirror_lease import BEAT_S, STALE_S, MirrorLease
from cluster.runs.run import Run

HERE = Driver.of_this_process()


class Host:
    """Its lease, and its clock, which moves when it waits."""

    def __init__(self, driver: Driver, monkeypatch: pytest.MonkeyPatch, clock: float) -> None:
        self.time = clock
        self.meanwhile = lambda: None
        mirror = Mirror("memory://runs/r", Path("/disk/r"))
        with monkeypatch.context() as here:
            here.setattr(mirror_lease.Driver, "of_this_process", lambda: driver)
            self.lease = MirrorLease(mirror, lambda: self.time, self.wait)

    def wait(self, seconds: float) -> None:
        self.time += seconds
        self.meanwhile()


@pytest.fixture(autouse=True)
def store() -> None:
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def first(monkeypatch: pytest.MonkeyPatch) -> Host:
    host = Host(Driver(pid=71, host="alpha", boot="b"), monkeypatch, clock=1000.0)
    host.lease.take()
    return host


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(Driver(pid=82, host="beta", boot="c"), monkeypatch, clock=1031.0)


def test_the_second_is_told_who_drives_the_run(first: Host, second: Host) -> None:
    with pytest.raises(UserError) as told:
        second.lease.take()
    assert "process 71 on host alpha drives this run since " in told.value.what
    assert told.value.what.endswith("its last sign of life is 31 s old")
    assert told.value.where == "memory://runs/r"
    assert "If it is dead, try again in 29 s" in told.value.fix
    first.lease.renew()
    first.lease.require()
    first.lease.give_back()
    second.lease.take()


def test_the_hold_of_a_dead_one_is_taken_over_and_one_that_lives_after_all_ends(
    first: Host, second: Host
) -> None:
    second.time += STALE_S
    before = second.time
    second.lease.take()
    assert second.time - before > BEAT_S  # watched meanwhile
    first.lease.renew()
    with pytest.raises(Fatal, match=r"process 82 on host beta drives .* stay in /disk/r"):
        first.lease.require()
    first.lease.give_back()  # which is not its own any more
    second.lease.renew()
    second.lease.require()


@pytest.mark.parametrize("skew", [-3600.0, 3600.0])
def test_a_clock_that_is_wrong_takes_no_run_from_anybody(
    first: Host, second: Host, skew: float
) -> None:
    second.time += skew

    def renew() -> None:
        first.time += BEAT_S
        first.lease.renew()

    second.meanwhile = renew
    with pytest.raises(UserError, match="process 71 on host alpha"):
        second.lease.take()
    first.lease.require()


def test_of_two_at_once_one_gets_it(second: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a store that cannot create a file exclusively: the later one overwrites the file."""
    other = Host(Driver(pid=93, host="gamma", boot="d"), monkeypatch, clock=1031.0)
    other.lease._write()
    winner = Mirror("memory://runs/r", Path()).read(LEASE)
    assert winner is not None
    fsspec.filesystem("memory").store.clear()
    second.meanwhile = lambda: Mirror("memory://runs/r", Path()).write(LEASE, winner)
    with pytest.raises(UserError, match="process 93 on host gamma"):
        second.lease.take()


def test_a_process_of_this_host_that_has_ended_holds_nothing(
    second: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    dead = Host(Driver(pid=child.pid, host=HERE.host, boot=HERE.boot), monkeypatch, clock=1030.0)
    dead.lease.take()
    before = second.time
    second.lease.take()
    assert second.time - before < BEAT_S


def test_a_run_at_a_url_is_held_while_it_is_driven(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Settings(BaseModel):
        seed: int = 3

    monkeypatch.setattr(mirror_lease, "SETTLE_S", 0.0)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "one host"))
    run = Run.create("memory://runs", "r", "train", Settings())
    monkeypatch.setenv(VARIABLE, str(tmp_path / "another"))
    other = Run.create("memory://runs", "r", "train", Settings())  # nothing was copied there yet
    with (
        run.lock(),
        pytest.raises(UserError, match=f"process {HERE.pid} on host {HERE.host} drives"),
        other.lock(),
    ):
        pass
    with other.lock() as lease:
        assert lease is not None
    assert Mirror("memory://runs/r", run.path).read(LEASE) is None
