"""`accord status`."""

from __future__ import annotations

from cluster.commands.options import Json, RunDirectory


def status(run: RunDirectory, as_json: Json = False) -> None:
    """Show where a run stands, from its files.

    Example: `accord status runs/my-run --json`
    """
    from cluster.runs.status import show_status

    show_status(run, as_json)
