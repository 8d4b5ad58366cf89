"""The start of a training run, part by part: for the person who waits, and for events.jsonl."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cluster.runs.console import Reporter

FIRST_BATCH = "first batch"


class StartLog:
    """Says when each part of the start begins and when it is ready.

    Parts may overlap. Each one that ended is an event ``started`` (part, its own seconds, seconds
    since the command). It is also a metrics sink: the first step it is given ends the start.
    """

    def __init__(self, reporter: Reporter, began: float | None = None) -> None:
        """``began``: when the command was given (monotonic seconds); None: as the reporter says."""
        self._reporter = reporter
        self._began = reporter.began if began is None else began
        self._under_way: dict[str, float] = {}
        self._event: Callable[..., None] | None = None
        self._early: list[dict[str, Any]] = []  # before there was a run to write them to
        self._stepped = False

    def write_to(self, event: Callable[..., None]) -> None:
        """From now on events go there; those that came before follow at once."""
        self._event = event
        early, self._early = self._early, []
        for row in early:
            event("started", **row)

    def begins(self, *parts: str) -> None:
        """These parts go on from now, side by side."""
        self._under_way.update(dict.fromkeys(parts, time.monotonic()))
        self._reporter.say(f"starting: {', '.join(parts)} ...")

    def ends(self, part: str, note: str = "") -> None:
        """Nothing happens for a part that is not under way: a worker started again later, say."""
        began = self._under_way.pop(part, None)
        if began is None:
            return
        now = time.monotonic()
        row = {
            "part": part,
            "seconds": round(now - began, 3),
            "since_command_s": round(now - self._began, 3),
        }
        if self._event is None:
            self._early.append(row)
        else:
            self._event("started", **row)
        self._reporter.say(f"  {part}: {now - began:.1f} s{note}")

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part that is the only one meanwhile. One that fails does not end."""
        self.begins(name)
        yield
        self.ends(name)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        if self._stepped:
            return
        self._stepped = True
        self.ends(FIRST_BATCH)
        seconds = time.monotonic() - self._began
        if self._event is not None:
            self._event("first_step", step=step, seconds=round(seconds, 3))
        self._reporter.say(f"  first step done {seconds:.1f} s after the start of the command")

    def close(self) -> None:
        """Nothing is held."""
