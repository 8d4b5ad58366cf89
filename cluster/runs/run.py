"""A run on disk: one directory, files that a reader never sees half written, checkpoints that exist
only once their manifest does.

    runs/NAME/  config.toml  manifest.json  metrics.jsonl  events.jsonl  ledger.jsonl  timeline.json
                inputs/  rollouts/    checkpoints/step-000010/{policy/, ..., manifest.json}
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from cluster.contracts.config.base import folder_name
from cluster.contracts.config.file import dump_toml
from cluster.contracts.durable import FileDigest, write_json, write_text
from cluster.contracts.errors import UserError
from cluster.contracts.records import RunState
from cluster.runs.artefacts import changed_roles, parent_hashes, revisions_in
from cluster.runs.checkpoints import Checkpoints, in_order, step_of
from cluster.runs.driver import Driver, driver_lock
from cluster.runs.lines import Lines
from cluster.runs.mirror import Mirror, folder_of, url_of
from cluster.runs.mirror_lease import MirrorLease, leased
from cluster.runs.provenance import git_commit, versions

RESUMABLE = ("train", "sft", "reward-model", "dpo", "pipeline")  # commands with --resume
LEDGER = "ledger.jsonl"
INPUTS = "inputs"  # objects of the Python session that started the run, written as files


@dataclass(frozen=True, slots=True)
class Run:
    """Paths and writers of one run directory."""

    path: Path
    checkpoints: Checkpoints = field(init=False, repr=False, compare=False)

    _events: Lines = field(init=False, repr=False, compare=False)
    _accounts: Lines = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        checkpoints = Checkpoints(self.path / "checkpoints", self.event)
        object.__setattr__(self, "checkpoints", checkpoints)
        object.__setattr__(self, "_events", Lines(self.path / "events.jsonl"))
        object.__setattr__(self, "_accounts", Lines(self.path / LEDGER))

    @staticmethod
    def create(directory: str, name: str, command: str, config: BaseModel, **manifest: Any) -> Run:
        """Make the directory. Raises UserError when it exists (with more than ``inputs/``, what was
        written for this run beforehand): runs never share one."""
        label = name or name_by_time(command)
        try:
            folder_name(label)
        except ValueError as problem:
            raise UserError(f"{label!r} {problem}", where="run.name", fix="choose a name") from None
        path, url = folder_of(f"{directory}/{label}"), url_of(f"{directory}/{label}")
        taken = UserError(
            "the run directory exists",
            where=url or str(path),
            fix="choose another run.name or remove it" + _how_to_continue(command, url or path),
        )
        if url is not None:
            mirror = Mirror(url, path)
            mirror.probe()
            if mirror.exists():
                raise taken
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            if not _has_inputs_only(path):
                raise taken from None
        except OSError as problem:
            raise UserError(
                f"cannot make the run directory: {problem.strerror}", where=str(path)
            ) from None
        run = Run(path)
        manifest = manifest if url is None else {**manifest, "mirror": url}
        write_text(path / "config.toml", dump_toml(config))
        write_json(path / "manifest.json", _manifest(command, label, manifest))
        run.hash_parents(config)
        return run

    @staticmethod
    def open(path: str) -> Run:
        """The run in a directory, or of a URL: a copy of it on this host."""
        run, url = Run(folder_of(path)), url_of(path)
        if url is not None and (mirror := Mirror(url, run.path)).exists():
            mirror.pull()
        if not (run.path / "manifest.json").is_file():
            raise UserError(
                "is not a run directory (it has no manifest.json)",
                where=path,
                fix="give a directory under runs/ made by an accord command",
            )
        return run

    @property
    def mirror(self) -> Mirror | None:
        """Where the run is copied to; None where its directory is all there is."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            manifest = json.loads((self.path / "manifest.json").read_text(encoding="utf-8"))
            if url := manifest.get("mirror"):
                return Mirror(str(url), self.path)
        return None

    def event(self, kind: str, **detail: Any) -> None:
        """Append one line to events.jsonl: what happened, when, and its cause."""
        row = {"time": time.time(), "kind": kind, **detail}
        self._events.add(json.dumps(row, default=str, ensure_ascii=False))

    def account(self, **row: Any) -> None:
        """Append one line to ledger.jsonl: what a step trained on, and where all other groups were
        at that moment."""
        self._accounts.add(json.dumps(row))

    def update_manifest(self, **entries: Any) -> None:
        path = self.path / "manifest.json"
        write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **entries})

    def resume(self, config: BaseModel, **detail: Any) -> None:
        """Mark the run as running again. ``config`` replaces the stored one, so that what was asked
        for on this resume, such as more steps, also holds for the next."""
        write_text(self.path / "config.toml", dump_toml(config))
        self.event("resumed", **detail)
        self.update_manifest(status="running")
        self.hash_parents(config)

    def hash_parents(self, config: BaseModel) -> None:
        """Note in the manifest what the parents are by content, where it is not noted yet. A parent
        that changed between two parts of a run is an event."""
        before, now = self._parents(config)
        if not now:
            return
        if changed := changed_roles(before, now):
            self.event("parents_changed", now={role: now[role] for role in changed})
        known = {role: value for role, value in before.items() if value is not None}
        self.update_manifest(parent_hashes={**now, **known})

    def changed_parents(self, config: BaseModel) -> list[str]:
        """Roles of the parents that are not what they were when the run began."""
        return changed_roles(*self._parents(config))

    def _parents(self, config: BaseModel) -> tuple[dict[str, str | None], dict[str, str | None]]:
        """Role -> hash, as the manifest has it and as it is now."""
        manifest = json.loads((self.path / "manifest.json").read_text(encoding="utf-8"))
        now = parent_hashes(manifest.get("parents", {}), revisions_in(config.model_dump()))
        return manifest.get("parent_hashes", {}), now

    async def begin_checkpoint(self, step: int, nbytes: int = 0) -> Path:
        return await asyncio.to_thread(self.checkpoints.begin, step, nbytes)

    async def commit_checkpoint(
        self, staging: Path, files: Sequence[FileDigest], state: RunState, keep: int
    ) -> Path:
        return await asyncio.to_thread(self.checkpoints.commit, staging, files, state, keep)

    async def abandon_checkpoint(self, staging: Path) -> None:
        await asyncio.to_thread(self.checkpoints.abandon, staging)

    def newest_checkpoint(self) -> int | None:
        """Step of the newest checkpoint, its files unread; None without one."""
        found = in_order(self.path / "checkpoints")
        newest = step_of(found[-1].name) if found else -1
        return newest if newest >= 0 else None

    # -- one driver at a time ---------------------------------------------------------------------

    @contextlib.contextmanager
    def lock(self) -> Iterator[MirrorLease | None]:
        """One process drives a run. Raises UserError that names the one that does; the lock of a
        dead process is taken over. Of a run at a URL, yields the hold on it."""
        mirror = self.mirror
        with driver_lock(self.path):
            if mirror is None:
                yield None
                return
            with leased(mirror) as lease:
                yield lease


def _has_inputs_only(path: Path) -> bool:
    return path.is_dir() and [entry.name for entry in path.iterdir()] == [INPUTS]


def name_by_time(command: str) -> str:
    return f"{command}-{time.strftime('%Y%m%d-%H%M%S')}"


def require_writable(path: Path) -> None:
    """Raises UserError when ``path`` cannot become a file, before hours go into its content."""
    if path.is_dir():
        raise UserError("is a directory", where=str(path), fix="give the name of a file in it")
    if not path.parent.is_dir():
        raise UserError(
            f"there is no directory {str(path.parent)!r}",
            where=str(path),
            fix="make it, or give another place",
        )
    if not os.access(path.parent, os.W_OK):
        raise UserError("cannot be written", where=str(path), fix="give another place")


def _how_to_continue(command: str, path: Path | str) -> str:
    if command not in RESUMABLE:
        return ""
    return f", or continue it: accord {command} --resume {path}"


def _manifest(command: str, name: str, extra: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "command": command,
        "argv": sys.argv[1:],
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "machine": {"cpus": os.cpu_count(), "platform": platform.platform()},
        "versions": versions(),
        "status": "running",
        "driver": Driver.of_this_process().record(),
        **extra,
    }
