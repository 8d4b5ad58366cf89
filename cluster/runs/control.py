"""What people ask of a run that goes on: a file in its directory, which the run reads each second.

`accord scale`, `pause`, `resume` and `stop` write it (`cluster.runs.steer`). The run answers with
the event ``control``, which carries the request's id.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.contracts.durable import write_json

CONTROL = "control.json"
MOST_BYTES = 1 << 16
MOST_WORKERS = 100_000


class Wishes(BaseModel):
    """All that was asked for and still holds. ``request``: id of the newest request.

    ``workers``: None where nobody has asked for a number, "auto" where the policy of
    `rollout.autoscale` is to choose it again.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    request: str = Field("", max_length=64, pattern=r"^[\w-]*$")
    workers: int | Literal["auto"] | None = Field(None)
    reward_replicas: int | None = Field(None, ge=1, le=MOST_WORKERS)
    paused: bool = False
    stop: bool = False

    def model_post_init(self, context: Any) -> None:
        if isinstance(self.workers, int) and not 0 <= self.workers <= MOST_WORKERS:
            raise ValueError(f"workers = {self.workers} is not within 0 and {MOST_WORKERS}")

    @property
    def worker_count(self) -> int | None:
        """The number of workers that a person asked for."""
        return self.workers if isinstance(self.workers, int) else None


def read_wishes(run_dir: Path) -> Wishes:
    """What the file says; nothing where there is none. Raises ValueError when it is damaged."""
    try:
        with (run_dir / CONTROL).open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        return Wishes()
    except OSError as problem:
        raise ValueError(f"cannot be read: {problem.strerror}") from None
    if len(content) > MOST_BYTES:
        raise ValueError(f"has more than {MOST_BYTES} bytes")
    try:
        return Wishes.model_validate(json.loads(content))
    except ValidationError as problem:
        first = problem.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise ValueError(f"{place}: {first['msg']}") from None
    except (ValueError, RecursionError):
        raise ValueError("is not JSON") from None


def ask(run_dir: Path, **changes: Any) -> Wishes:
    """Add to what is asked for, under a new request id. A damaged file is replaced."""
    with _one_writer(run_dir):
        try:
            before = read_wishes(run_dir)
        except ValueError:
            before = Wishes()
        request = secrets.token_hex(8)
        wishes = Wishes.model_validate({**before.model_dump(), **changes, "request": request})
        write_json(run_dir / CONTROL, wishes.model_dump())
        return wishes


def forget_pause_and_stop(run_dir: Path) -> None:
    """When a run begins to go on: what it was stopped by must not stop it again. Numbers of
    workers and replicas still hold."""
    with _one_writer(run_dir):
        try:
            before = read_wishes(run_dir)
        except ValueError:
            return  # the reader will tell of it
        if before.paused or before.stop:
            after = before.model_copy(update={"paused": False, "stop": False})
            write_json(run_dir / CONTROL, after.model_dump())


class ControlFile:
    """The run's own reader: the newest wishes that were valid. A damaged file is told as an event
    ``control_ignored``, once, and changes nothing."""

    def __init__(self, run_dir: Path, event: Callable[..., None]) -> None:
        self._run_dir = run_dir
        self._event = event
        self._seen: tuple[int, ...] = ()
        self._wishes = Wishes()

    def __call__(self) -> Wishes:
        seen = _signature(self._run_dir / CONTROL)
        if seen != self._seen:
            self._seen = seen
            try:
                self._wishes = read_wishes(self._run_dir)
            except ValueError as problem:
                self._event("control_ignored", cause=f"{CONTROL} {problem}")
        return self._wishes


def _signature(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


@contextmanager
def _one_writer(run_dir: Path) -> Iterator[None]:
    """Two commands at once must not undo each other's change."""
    folder = os.open(run_dir, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)
