"""`accord scale`, `pause`, `resume` and `stop`: ask a run in progress for something, wait until it
has taken it, and say what came of it."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.contracts.errors import UserError
from cluster.runs.control import ask
from cluster.runs.overview import span, status_of
from cluster.runs.rows import Follower, Row
from cluster.runs.run import Run

TAKEN_WITHIN_S = 30.0
LOOK_S = 0.2
RUNS_OF_TRAINING = "train"
ENDED = {
    "dead": "its process ended without recording how",
    "silent": "its process is on another host and gives no sign of life",
}


@dataclass(slots=True)
class Request:
    """One wish put to a run, and the events that the run has written since."""

    run: Run
    id: str
    began: float
    _events: Follower
    taken: Row = field(default_factory=dict)
    _waiting: deque[Row] = field(default_factory=deque)  # read, and not looked at yet

    def seconds(self) -> str:
        return span(time.monotonic() - self.began)

    def events(self, until: float) -> Iterator[Row]:
        """Each event that follows, until the clock reaches ``until`` or the run has ended."""
        while True:
            over = time.monotonic() >= until or run_state(self.run) != "running"
            self._waiting += self._events.new_rows()
            while self._waiting:
                yield self._waiting.popleft()
            if over:
                return
            time.sleep(LOOK_S)


def run_state(run: Run) -> str:
    """running, dead, finished, ... as `accord status` says."""
    try:
        manifest = json.loads((run.path / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "damaged"
    return status_of(run.path, manifest if isinstance(manifest, dict) else {})


def require_running(path: Path) -> Run:
    """The run, if its process goes on. Raises UserError that says what to do instead."""
    run = Run.open(str(path))
    manifest = json.loads((run.path / "manifest.json").read_text(encoding="utf-8"))
    command, state = str(manifest.get("command")), run_state(run)
    if command != RUNS_OF_TRAINING:
        raise UserError(
            f"is a run of `accord {command}`; only runs of `accord train` can be steered",
            where=str(path),
            fix="give the directory of a training run (in a pipeline: RUN/round-1/policy)",
        )
    if state != "running":
        how = ENDED.get(state, f"it is {state}")
        raise UserError(
            f"is not in progress: {how}",
            where=str(path),
            fix=f"`accord train --resume {path}` continues a run that has ended",
        )
    return run


def put(path: Path, **changes: Any) -> Request:
    """Ask, and wait until the run has taken it. Raises UserError when it does not."""
    run = require_running(path)
    events = Follower(run.path / "events.jsonl")
    events.new_rows()  # what was before does not concern the request
    began = time.monotonic()
    request = Request(run, ask(run.path, **changes).request, began, events)
    for event in request.events(began + TAKEN_WITHIN_S):
        if event.get("kind") == "control" and event.get("request") == request.id:
            request.taken = event
            return request
    state = run_state(run)
    if state != "running":
        raise UserError(
            f"ended before it took the request: it is {state}",
            where=str(path),
            fix=f"`accord train --resume {path}` continues it",
        )
    raise UserError(
        f"has not taken the request within {TAKEN_WITHIN_S:.0f} s; it stays in control.json",
        where=str(path),
        fix="see `accord status`. If the run is driven on another host, run this command there",
    )


def scale_workers(path: Path, wanted: int | str, wait_s: float) -> str:
    """Ask for a number of rollout workers, and follow what comes of it for ``wait_s`` seconds."""
    request = put(path, workers=wanted)
    have = int(request.taken.get("workers", 0))
    if wanted == "auto":
        return f"{have} workers; the autoscaling policy chooses the number from now on"
    assert isinstance(wanted, int)
    head = f"{have} → {wanted} workers"
    serving = int(request.taken.get("serving", have))
    news: list[str] = []
    problem = ""
    if serving == wanted == have:
        return f"{head}: nothing to change"
    for event in request.events(request.began + wait_s):
        kind, worker = event.get("kind"), str(event.get("worker", "?"))
        if kind == "worker_serving":
            serving += 1
            news.append(f"{worker} serves after {request.seconds()}")
        elif kind == "worker_left":
            serving -= 1
            news.append(f"{worker} left after {request.seconds()}")
        elif kind == "worker_lost":
            serving -= 1
            news.append(f"{worker} was lost ({event.get('cause', '?')})")
        elif kind in ("worker_not_joined", "workers_missing"):
            problem = str(event.get("cause", ""))
        if serving == wanted:
            return f"{head}: {', '.join(news)}"
    state = run_state(request.run)
    if state != "running":
        return f"{head}: the run ended meanwhile ({state})"
    so_far = "".join(f"{text}, " for text in news)
    why = f" ({problem})" if problem else ""
    return f"{head}: {so_far}{serving} serve after {request.seconds()}; the run goes on trying{why}"


def scale_rewards(path: Path, wanted: int, wait_s: float) -> str:
    """Ask for a number of reward services."""
    request = put(path, reward_replicas=wanted)
    for event in request.events(request.began + wait_s):
        if event.get("kind") == "reward_replicas":
            if event.get("cause"):
                return f"{event.get('serving')} reward services: {event['cause']}"
            return f"{event.get('serving')} reward services after {request.seconds()}"
    return f"{wanted} reward services are wanted; not all serve after {request.seconds()}"


def pause(path: Path, wait_s: float) -> str:
    request = put(path, paused=True)
    for event in request.events(request.began + wait_s):
        if event.get("kind") == "paused":
            return (
                f"paused after step {event.get('step')}, with {event.get('finished_groups')} "
                f"finished groups in hand; to go on: accord resume {path}"
            )
    return (
        f"pausing since {request.seconds()}: the run still finishes what is under way; "
        f"to go on: accord resume {path}"
    )


def unpause(path: Path, wait_s: float) -> str:
    request = put(path, paused=False)
    for event in request.events(request.began + wait_s):
        if event.get("kind") == "unpaused":
            return f"goes on after step {event.get('step')}"
    return "was not paused; it goes on"


def stop(path: Path, wait_s: float) -> str:
    request = put(path, stop=True)
    for _ in request.events(request.began + wait_s):
        pass
    state = run_state(request.run)
    if state == "running":
        return f"stopping since {request.seconds()}: it finishes the step under way"
    checkpoint = request.run.newest_checkpoint()
    where = "before its first checkpoint" if checkpoint is None else f"after step {checkpoint}"
    return f"{state} {where}; to continue: accord train --resume {path}"
