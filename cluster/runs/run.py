"""A run on disk: one directory, files that a reader never sees half written, checkpoints that exist
only once their manifest does.

    runs/NAME/  config.toml  manifest.json  metrics.jsonl  events.jsonl  timeline.json
                inputs/  rollouts/    checkpoints/step-000010/{policy/, ..., manifest.json}
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from cluster.contracts.config.base import folder_name
from cluster.contracts.config.file import dump_toml
from cluster.contracts.errors import UserError
from cluster.contracts.records import RunState
from cluster.runs.driver import LOCK, Driver, driver_of
from cluster.runs.provenance import git_commit, versions

RESUMABLE = ("train", "sft", "reward-model", "dpo")  # commands with --resume
INPUTS = "inputs"  # objects of the Python session that started the run, written as files


@dataclass(frozen=True, slots=True)
class Run:
    """Paths and writers of one run directory."""

    path: Path

    @staticmethod
    def create(directory: str, name: str, command: str, config: BaseModel, **manifest: Any) -> Run:
        """Make the directory. Raises UserError when it exists (with more than ``inputs/``, what was
        written for this run beforehand): runs never share one."""
        label = name or name_by_time(command)
        try:
            folder_name(label)
        except ValueError as problem:
            raise UserError(f"{label!r} {problem}", where="run.name", fix="choose a name") from None
        path = Path(directory) / label
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            if path.is_file() or [entry.name for entry in path.iterdir()] != [INPUTS]:
                raise UserError(
                    "the run directory exists",
                    where=str(path),
                    fix="choose another run.name or remove it" + _how_to_continue(command, path),
                ) from None
        except OSError as problem:
            raise UserError(
                f"cannot make the run directory: {problem.strerror}", where=str(path)
            ) from None
        run = Run(path)
        write_text(path / "config.toml", dump_toml(config))
        write_json(path / "manifest.json", _manifest(command, label, manifest))
        return run

    @staticmethod
    def open(path: str) -> Run:
        run = Run(Path(path))
        if not (run.path / "manifest.json").is_file():
            raise UserError(
                "is not a run directory (it has no manifest.json)",
                where=path,
                fix="give a directory under runs/ made by an accord command",
            )
        return run

    def event(self, kind: str, **detail: Any) -> None:
        """Append one line to events.jsonl: what happened, when, and its cause."""
        row = {"time": time.time(), "kind": kind, **detail}
        with (self.path / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, default=str, ensure_ascii=False) + "\n")

    def update_manifest(self, **entries: Any) -> None:
        path = self.path / "manifest.json"
        write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **entries})

    def resume(self, config: BaseModel, **detail: Any) -> None:
        """Mark the run as running again. ``config`` replaces the stored one, so that what was asked
        for on this resume, such as more steps, also holds for the next."""
        write_text(self.path / "config.toml", dump_toml(config))
        self.event("resumed", **detail)
        self.update_manifest(status="running")

    # -- checkpoints ------------------------------------------------------------------------------

    def checkpoint_dir(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step-{step:06d}"

    def begin_checkpoint(self, step: int) -> Path:
        """An empty staging directory beside the final one, on the same file system."""
        staging = self.checkpoint_dir(step).with_name(f".staging-{step:06d}")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        return staging

    def commit_checkpoint(self, staging: Path, state: RunState, keep: int) -> Path:
        """Write the run state and, last, the manifest; rename; drop all but the newest ``keep``."""
        write_json(staging / "run_state.json", asdict(state))
        files = {
            str(p.relative_to(staging)): {"sha256": _sha256(p), "bytes": p.stat().st_size}
            for p in sorted(staging.rglob("*"))
            if p.is_file()
        }
        write_json(staging / "manifest.json", {"step": state.step, "files": files})
        final = self.checkpoint_dir(state.step)
        if final.exists():
            shutil.rmtree(final)
        os.replace(staging, final)
        _fsync_dir(final.parent)
        for old in self._complete()[:-keep]:
            shutil.rmtree(old)
        return final

    def latest_checkpoint(self) -> tuple[Path, RunState]:
        """The newest checkpoint whose files are all as the manifest says; damaged ones are reported
        as events and passed over. Raises UserError when none is left."""
        for path in reversed(self._complete()):
            problem = verify_checkpoint(path)
            if problem is None:
                state = json.loads((path / "run_state.json").read_text(encoding="utf-8"))
                return path, RunState(**state)
            self.event("checkpoint_damaged", checkpoint=path.name, cause=problem)
        raise UserError(
            "no usable checkpoint",
            where=str(self.path / "checkpoints"),
            fix="start the run anew under another name; it was stopped before its first checkpoint",
        )

    def newest_checkpoint(self) -> int | None:
        """Step of the newest checkpoint, its files unread; None without one."""
        found = (p.name.partition("-")[2] for p in (self.path / "checkpoints").glob("step-*"))
        return max((int(number) for number in found if number.isdigit()), default=None)

    def _complete(self) -> list[Path]:
        found = (self.path / "checkpoints").glob("step-*")
        return sorted(p for p in found if (p / "manifest.json").is_file())

    # -- one driver at a time ---------------------------------------------------------------------

    @contextlib.contextmanager
    def lock(self) -> Any:
        """One process drives a run. The lock names its holder; a dead holder's is taken over."""
        path = self.path / LOCK
        holder = driver_of(self.path) if path.exists() else None
        if holder is not None and holder.alive() and not holder.is_this_process():
            raise UserError(
                f"process {holder.pid} is driving this run",
                where=str(self.path),
                fix="wait for it or stop it first",
            )
        write_json(path, Driver.of_this_process().record())
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def name_by_time(command: str) -> str:
    return f"{command}-{time.strftime('%Y%m%d-%H%M%S')}"


def verify_checkpoint(path: Path) -> str | None:
    """None when every file has the size and hash the manifest names, else what is wrong."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        entries = {n: (int(e["bytes"]), str(e["sha256"])) for n, e in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        return f"manifest.json is damaged: {problem!r}"
    for name, (size, digest) in entries.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} of {size} bytes"
        if _sha256(file) != digest:
            return f"{name} does not have the recorded hash"
    return None


def write_text(path: Path, text: str) -> None:
    """Temp-then-rename, synced, so that a reader sees the old file or the new one."""
    staging = path.with_name(f".{path.name}.tmp")
    with staging.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(staging, path)


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


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, default=str, ensure_ascii=False) + "\n")


def _how_to_continue(command: str, path: Path) -> str:
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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync_dir(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
