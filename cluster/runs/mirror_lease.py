"""One driver at a time for a run at a URL, whatever host it is on.

The driver keeps a small file beside the run's files there and renews it. Object stores have no
locks, so the file is a lease: it is good for ``STALE_S`` after its last renewal. Clocks of hosts
differ, so a lease that looks old is watched before it is taken over: its holder may be renewing it.
Who finds that another process has taken the lease copies nothing to the URL any more.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cluster.contracts.errors import Fatal, UserError
from cluster.runs.driver import Driver
from cluster.runs.mirror import LEASE, Mirror

BEAT_S = 15.0
STALE_S = 60.0
SETTLE_S = 1.0  # where a store cannot create a file exclusively: for another's to show


@dataclass(frozen=True, slots=True)
class _Held:
    """``since``, ``renewed``: seconds of the holder's clock since the epoch."""

    driver: Driver
    token: str
    since: float
    renewed: float

    @staticmethod
    def of_bytes(content: bytes) -> _Held | None:
        """None for a damaged file: its writer was cut off, and will write it again."""
        try:
            row = json.loads(content)
            driver = Driver.of_record(row["driver"])
            if driver is None:
                return None
            return _Held(driver, str(row["token"]), float(row["since"]), float(row["renewed"]))
        except (ValueError, KeyError, TypeError):
            return None

    def to_bytes(self) -> bytes:
        row = {"driver": self.driver.record(), "token": self.token}
        return json.dumps({**row, "since": self.since, "renewed": self.renewed}).encode()


class MirrorLease:
    """``take``, then ``renew`` every ``BEAT_S`` seconds, then ``give_back``."""

    def __init__(
        self,
        mirror: Mirror,
        now: Callable[[], float] = time.time,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        self._mirror = mirror
        self._now = now
        self._wait = wait
        self._mine = _Held(Driver.of_this_process(), secrets.token_hex(16), now(), now())
        self._taken_by: Driver | None = None

    def take(self) -> None:
        """Raises UserError while another process holds it."""
        before = self._read()
        if before is not None and before.driver.alive() is not False:
            age = self._now() - before.renewed
            if 0 <= age < STALE_S:
                raise self._held(before, STALE_S - age)
            self._wait(2 * BEAT_S)
            after = self._read()
            if after is not None and after != before:
                raise self._held(after, STALE_S)
        self._write(create=before is None)
        self._wait(SETTLE_S)
        holder = self._read()
        if holder is not None and holder.token != self._mine.token:
            raise self._held(holder, STALE_S)

    def renew(self) -> None:
        """Raises OSError where the store cannot be reached."""
        holder = self._read()
        if holder is not None and holder.token != self._mine.token:
            self._taken_by = holder.driver
        if self._taken_by is None:
            self._write()

    def require(self) -> None:
        """Raises Fatal where another process has taken the run over."""
        if (other := self._taken_by) is not None:
            raise Fatal(
                f"process {other.pid} on host {other.host} drives the run at {self._mirror.url} "
                f"now: this one could not renew its hold on it for {STALE_S:.0f} s. Its own "
                f"checkpoints stay in {self._mirror.folder}"
            )

    def give_back(self) -> None:
        holder = self._read()
        if holder is not None and holder.token == self._mine.token:
            self._mirror.remove(LEASE)

    def _held(self, by: _Held, left_s: float) -> UserError:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(by.since))
        age = max(0.0, self._now() - by.renewed)
        return UserError(
            f"process {by.driver.pid} on host {by.driver.host} drives this run since {since}; its "
            f"last sign of life is {age:.0f} s old",
            where=self._mirror.url,
            fix=f"end it there. If it is dead, try again in {max(1.0, left_s):.0f} s: then its "
            "hold on the run is over",
        )

    def _read(self) -> _Held | None:
        content = self._mirror.read(LEASE)
        return None if content is None else _Held.of_bytes(content)

    def _write(self, *, create: bool = False) -> None:
        mine = self._mine
        self._mine = _Held(mine.driver, mine.token, mine.since, self._now())
        with contextlib.suppress(FileExistsError):  # who was first is seen when it is read again
            self._mirror.write(LEASE, self._mine.to_bytes(), create=create)


@contextlib.contextmanager
def leased(mirror: Mirror) -> Iterator[MirrorLease]:
    """Hold the run at the URL for this process. Raises UserError as ``take`` does."""
    lease, over = MirrorLease(mirror), threading.Event()
    with mirror.explained("use"):
        lease.take()

    def keep() -> None:
        while not over.wait(BEAT_S):
            with contextlib.suppress(Exception):  # each store has errors of its own; the next beat
                lease.renew()

    beats = threading.Thread(target=keep, name="accord-lease", daemon=True)
    beats.start()
    try:
        yield lease
    finally:
        over.set()
        beats.join(BEAT_S)
        with contextlib.suppress(Exception):  # it ends by itself, a minute later
            lease.give_back()
