"""Small things several stages need."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from cluster.contracts.config.base import Section
from cluster.contracts.errors import BadReward, UserError
from cluster.runs.run import Run


@contextmanager
def recorded(run: Run, *, fresh: bool = True) -> Iterator[None]:
    """The manifest's status tells how the command ended.

    A mistake of the user's that shows before anything was done leaves no directory behind
    (``fresh``: it was made by this command), so that the corrected command may use the same name.
    """
    try:
        yield
    except KeyboardInterrupt:
        run.update_manifest(status="interrupted")
        raise
    except BaseException as problem:
        if not run.path.exists() or run_status(run) == "failed":
            raise  # recorded further in
        if fresh and isinstance(problem, UserError | BadReward) and not _has_results(run):
            shutil.rmtree(run.path)
            with suppress(OSError):  # the folder of runs, where this was to be its first
                run.path.parent.rmdir()
        else:
            run.event("run_failed", cause=str(problem))
            run.update_manifest(status="failed")
        raise
    run.update_manifest(status="finished")


def open_run(path: str, command: str) -> Run:
    """The run to be continued. Raises UserError when another command made it."""
    run = Run.open(path)
    made_by = _manifest(run)["command"]
    if made_by != command:
        raise UserError(
            f"is a run of `accord {made_by}`, not of `accord {command}`",
            where=path,
            fix=f"give a run directory that `accord {command}` made",
        )
    return run


def run_status(run: Run) -> str:
    return str(_manifest(run)["status"])


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


def _manifest(run: Run) -> dict[str, Any]:
    path = run.path / "manifest.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {"command": content["command"], "status": content["status"], **content}
    except (ValueError, KeyError, TypeError) as problem:
        raise UserError(
            f"is damaged: {problem!r}", where=str(path), fix="restore it, or start a new run"
        ) from None


def _has_results(run: Run) -> bool:
    metrics = run.path / "metrics.jsonl"
    return (run.path / "checkpoints").exists() or (metrics.exists() and metrics.stat().st_size > 0)
