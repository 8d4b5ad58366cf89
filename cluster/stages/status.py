"""`accord status`, `accord scale`: a run is watched and steered by files in its directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cluster.contracts.errors import UserError
from cluster.progress import result, shown
from cluster.runs import Run, write_json

CONTROL = "control.json"  # {"workers": n}, written by `accord scale`, read by the controller


def show_status(path: Path, as_json: bool) -> None:
    status = read_status(Run.open(str(path)))
    if as_json:
        result(json.dumps(status))
        return
    result(f"{status['name']}: {status['status']}, {status['command']}, step {status['step']}")
    if status["metrics"]:
        result("  " + shown(status["metrics"]))
    for kind, count in sorted(status["events"].items()):
        result(f"  {kind}: {count}")


def read_status(run: Run) -> dict[str, Any]:
    manifest = json.loads((run.path / "manifest.json").read_text(encoding="utf-8"))
    metrics = _last_row(run.path / "metrics.jsonl")
    events: dict[str, int] = {}
    for row in _rows(run.path / "events.jsonl"):
        events[row["kind"]] = events.get(row["kind"], 0) + 1
    return {
        "name": manifest["name"],
        "command": manifest["command"],
        "status": manifest["status"],
        "step": metrics.get("step", 0),
        "metrics": metrics,
        "events": events,
    }


def want_workers(path: Path, workers: int) -> None:
    run = Run.open(str(path))
    manifest = json.loads((run.path / "manifest.json").read_text(encoding="utf-8"))
    if manifest["command"] != "train" or manifest["status"] != "running":
        raise UserError(
            f"is not a training run that goes on (command {manifest['command']}, status "
            f"{manifest['status']})",
            where=str(path),
            fix="start it with accord train, or continue it with accord train --resume",
        )
    write_json(run.path / CONTROL, {"workers": workers})
    result(f"{manifest['name']}: {workers} rollout workers wanted; the run follows within seconds")


def wanted_workers(run: Run) -> int | None:
    """What `accord scale` last asked for, or None."""
    path = run.path / CONTROL
    if not path.is_file():
        return None
    return int(json.loads(path.read_text(encoding="utf-8"))["workers"])


def _rows(path: Path) -> list[dict[str, Any]]:
    """Whole lines only: the last one may be being written."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines() if line]


def _last_row(path: Path) -> dict[str, Any]:
    rows = _rows(path)
    return rows[-1] if rows else {}
