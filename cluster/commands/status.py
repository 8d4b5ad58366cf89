"""`accord status`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.options import RUN, Json, RunsFolder, runs_in


def status(
    run: Annotated[
        Path | None,
        typer.Argument(help="A run directory. Without it: a line for each run.", **RUN),
    ] = None,
    directory: RunsFolder = Path("runs"),
    watch: Annotated[
        bool,
        typer.Option(
            "--watch", help="Keep showing one run on a terminal, until it ends or Ctrl-C."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Show where a run stands, or every run in a line.

    For one run the command shows step, time left, workers, what the run waits for, newest
    checkpoint, Ray dashboard and events. A run is `dead` if its process ended without recording
    how, for example by kill -9.

    Example: `accord status runs/my-run --watch`

    Example: `accord status runs/my-run --json`
    """
    import json

    from cluster.contracts.errors import UserError
    from cluster.runs.console import result
    from cluster.runs.overview import overview
    from cluster.runs.run import Run
    from cluster.runs.status import headline, read_status, status_lines

    if watch and (run is None or as_json):
        raise UserError(
            "--watch shows one run, as text",
            where="accord status",
            fix="accord status RUN --watch",
        )
    if run is not None and watch and _watched(run):
        return
    if run is not None:
        opened = Run.open(str(run))
        result(json.dumps(read_status(opened)) if as_json else "\n".join(status_lines(opened)))
        return
    found = runs_in(directory)
    if as_json:
        result(json.dumps([read_status(Run(path)) for path in found]))
        return
    for path in found:
        result(headline(overview(path, str(path.relative_to(directory)))))


def _watched(run: Path) -> bool:
    """Whether it was shown live: only a terminal can."""
    from rich.console import Console

    from cluster.runs.run import Run
    from cluster.runs.watch import watch

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        return False
    watch(Run.open(str(run)), console)
    return True
