"""`accord scale`."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.commands.options import RunDirectory


def scale(
    run: RunDirectory,
    workers: Annotated[int, typer.Argument(min=1, help="Rollout workers wanted.")],
) -> None:
    """Change the number of rollout workers of a run in progress.

    A worker that is removed first finishes its current work.

    Example: `accord scale runs/my-run 3`
    """
    from cluster.runs.control import want_workers

    want_workers(run, workers)
