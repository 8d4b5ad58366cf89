"""What a command holds while it works on a run directory."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cluster.contracts.actor_names import Names, unnamed
from cluster.contracts.config.base import Section
from cluster.contracts.durable import FileDigest
from cluster.contracts.errors import UserError
from cluster.contracts.live import LiveView
from cluster.contracts.protocols import Sink
from cluster.contracts.records import RunState
from cluster.loop.timeline import Timeline
from cluster.machine.signals import last_words, signal_handlers_kept
from cluster.runs.artefacts import output_hashes
from cluster.runs.console import Reporter
from cluster.runs.control import forget_pause_and_stop
from cluster.runs.event_words import words_for
from cluster.runs.mirror import Mirror
from cluster.runs.mirror_lease import MirrorLease
from cluster.runs.quarantine import put_in_quarantine
from cluster.runs.run import RESUMABLE, Run
from cluster.runs.start_log import FIRST_BATCH, StartLog


@dataclass(slots=True)
class RunSession:
    """A run directory that this process drives, and everything that writes to it.

    Made by ``run_session`` only, once per command and run. It is the ``Journal`` of the loop:
    what happens becomes an event, and what a person should know at once is said.
    """

    run: Run
    reporter: Reporter
    start: StartLog
    sinks: list[Sink] = field(default_factory=list)
    timeline: Timeline = field(default_factory=Timeline)
    # Of a run that ends without an error. waiting: for its judge; the same command goes on.
    outcome: Literal["finished", "stopped", "waiting"] = "finished"
    shows: list[Callable[[LiveView], None]] = field(default_factory=list)  # where it is watched
    names: Names = unnamed  # of its processes, in Ray's dashboard
    addresses: dict[str, str] = field(default_factory=dict)  # where the run can be watched
    lease: MirrorLease | None = None  # the hold on a run at a URL
    mirror: Mirror | None = field(init=False)

    def __post_init__(self) -> None:
        self.mirror = self.run.mirror
        if self.mirror is not None:
            self.reporter.say(f"{self.mirror.url} is a copy of {self.path}, where the run works")

    @property
    def path(self) -> Path:
        return self.run.path

    def event(self, kind: str, **detail: Any) -> None:
        self.run.event(kind, **detail)
        if kind == "learner_ready":
            self.start.ends("learner")
        elif kind == "worker_serving":
            self.start.ends(detail["worker"], f" ({detail.get('engine', 'engine')})")
        elif kind == "loop_started":
            self.start.begins(FIRST_BATCH)
        elif kind == "prompt_set_aside":
            put_in_quarantine(self.path, detail)
        if (words := words_for(kind, detail)) is not None:
            self.reporter.say(words)

    def account(self, **row: Any) -> None:
        self.run.account(**row)

    async def begin_checkpoint(self, step: int, nbytes: int) -> Path:
        return await self.run.begin_checkpoint(step, nbytes)

    async def commit_checkpoint(
        self, staging: Path, files: Sequence[FileDigest], state: RunState, keep: int
    ) -> Path:
        path = await self.run.commit_checkpoint(staging, files, state, keep)
        if self.lease is not None:
            self.lease.require()
        await asyncio.to_thread(self.copy_to_mirror)
        return path

    def copy_to_mirror(self) -> None:
        """Of a run whose directory is a URL. What cannot be copied now is tried again with the next
        checkpoint and at the end."""
        if self.mirror is None or not self.path.is_dir():
            return
        try:
            if self.lease is not None:
                self.lease.require()
            self.mirror.push()
        except Exception as problem:  # every kind of store has errors of its own
            cause = f"{type(problem).__name__}: {problem}"
            self.run.event("mirror_failed", url=self.mirror.url, cause=cause)
            self.reporter.say(f"{self.mirror.url} is not up to date: {cause}")

    async def abandon_checkpoint(self, staging: Path) -> None:
        await self.run.abandon_checkpoint(staging)

    def close(self) -> None:
        try:
            for sink in self.sinks:
                sink.close()
            if len(self.timeline):
                self.timeline.write(self.path / "timeline.json")
        except OSError as problem:  # a full disk: what ended the run is told, not this
            self.reporter.say(f"the last numbers and timeline.json are not on disk: {problem}")


@contextmanager
def run_session(
    run: Run,
    reporter: Reporter,
    *,
    start: StartLog | None = None,
    resumed: Section | None = None,
    **detail: Any,
) -> Iterator[RunSession]:
    """Drive ``run``: hold its lock, and leave a manifest whose status tells how the command ended.

    ``resumed``: the config of a run that another command made and that goes on (``detail``: of its
    event). A mistake of the user's that shows before anything was done leaves no directory behind,
    unless it was there before: the corrected command may then use the same name. An unusable reward
    does leave one: its log tells more than the message.
    """
    with run.lock() as lease, signal_handlers_kept():  # asyncio leaves the default handlers behind
        if resumed is not None:
            # Before it counts as running: from then on, who asks means this part of the run.
            forget_pause_and_stop(run.path)
            run.resume(resumed, **detail)
        session = RunSession(run, reporter, start or StartLog(reporter), lease=lease)
        session.start.write_to(run.event)
        try:
            with _status_kept(session, fresh=resumed is None):
                try:
                    yield session
                finally:
                    session.close()
        finally:
            session.copy_to_mirror()


@contextmanager
def _status_kept(session: RunSession, *, fresh: bool) -> Iterator[None]:
    run = session.run
    try:
        with last_words(lambda: run.update_manifest(status="interrupted")):
            yield
    except KeyboardInterrupt:
        run.update_manifest(status="interrupted")
        session.reporter.tell(how_to_continue(run))
        raise
    except BaseException as problem:
        if fresh and isinstance(problem, UserError) and not _has_results(run):
            shutil.rmtree(run.path)
            with suppress(OSError):  # the folder of runs, where this was to be its first
                run.path.parent.rmdir()
        else:
            run.event("run_failed", cause=str(problem))
            with suppress(OSError):  # on a full disk; without it, the run is shown as dead
                run.update_manifest(status="failed")
        raise
    run.update_manifest(status=session.outcome, outputs=_outputs(session))


def _outputs(session: RunSession) -> dict[str, str]:
    """A disk that does not give back what was just written costs the run its record, no more."""
    try:
        return output_hashes(session.path)
    except OSError as problem:
        session.event("outputs_not_hashed", cause=str(problem))
        session.reporter.say(f"manifest.json has no hashes of what the run produced: {problem}")
        return {}


def how_to_continue(run: Run) -> str:
    """For who has interrupted a run: what is kept, and the command that goes on from there."""
    command = made_by(run)
    if command in ("pipeline", "quickstart"):
        return f"to continue: accord resume {run.path}"
    if command not in RESUMABLE:
        again = "; the same command goes on from there" if command == "evaluate" else ""
        return f"what was finished is kept in {run.path}{again}"
    step = run.newest_checkpoint()
    where = "before the first checkpoint" if step is None else f"after step {step}"
    return f"stopped {where}; to continue: accord {command} --resume {run.path}"


def open_run(path: str, command: str) -> Run:
    """The run to be continued. Raises UserError when another command made it."""
    run = Run.open(path)
    maker = made_by(run)
    if maker != command:
        raise UserError(
            f"is a run of `accord {maker}`, not of `accord {command}`",
            where=path,
            fix=f"give a run directory that `accord {command}` made",
        )
    return run


def made_by(run: Run) -> str:
    """The command that made a run."""
    return str(manifest_of(run)["command"])


def run_status(run: Run) -> str:
    return str(manifest_of(run)["status"])


def refuse_changes(before: Section, after: Section, path: str, free: Collection[str]) -> None:
    """Raise UserError naming settings that differ; ``free``: sections and section.key that may."""
    changed = []
    for section in type(after).model_fields:
        old, new = getattr(before, section), getattr(after, section)
        if section in free or old == new:
            continue
        if not isinstance(new, Section):
            changed.append(section)
            continue
        keys = [key for key in type(new).model_fields if getattr(old, key) != getattr(new, key)]
        changed += [f"{section}.{key}" for key in keys if f"{section}.{key}" not in free]
    if changed:
        raise UserError(
            f"these settings cannot change on resume: {', '.join(changed)}",
            where=path,
            fix="start a new run from its policy/, or leave them out",
        )


def manifest_of(run: Run) -> dict[str, Any]:
    """Raises UserError for one that is damaged."""
    path = run.path / "manifest.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {"command": content["command"], "status": content["status"], **content}
    except (ValueError, KeyError, TypeError) as problem:
        raise UserError(
            f"is damaged: {problem!r}", where=str(path), fix="restore it, or start a new run"
        ) from None


def _has_results(run: Run) -> bool:
    metrics, stages = run.path / "metrics.jsonl", run.path / "pipeline.json"
    if stages.is_file():
        return '"status": "finished"' in stages.read_text(encoding="utf-8")
    if (run.path / "completions.jsonl").exists():  # of an evaluation, whose judge has failed
        return True
    return (run.path / "checkpoints").exists() or (metrics.exists() and metrics.stat().st_size > 0)
