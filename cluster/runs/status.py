"""`accord status`, `accord scale`: a run is watched and steered by files in its directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cluster.runs.console import result, shown
from cluster.runs.run import Run


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


def _rows(path: Path) -> list[dict[str, Any]]:
    """Whole lines only: the last one may be being written."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines() if line]


def _last_row(path: Path) -> dict[str, Any]:
    rows = _rows(path)
    return rows[-1] if rows else {}
