"""How a run that goes on is steered: a file in its directory."""

from __future__ import annotations

import json
from pathlib import Path

from cluster.contracts.errors import UserError
from cluster.runs.console import result
from cluster.runs.overview import status_of
from cluster.runs.run import Run, write_json

CONTROL = "control.json"  # {"workers": n}, written by `accord scale`, read by the controller


def want_workers(path: Path, workers: int) -> None:
    run = Run.open(str(path))
    manifest = json.loads((run.path / "manifest.json").read_text(encoding="utf-8"))
    status = status_of(run.path, manifest)
    if manifest["command"] != "train" or status != "running":
        raise UserError(
            f"is not a training run in progress (command {manifest['command']}, status {status})",
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
