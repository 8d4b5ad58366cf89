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
    as_json: Json = False,
) -> None:
    """Show where a run stands, or every run in a line.

    For one run the command shows step, time left, workers, newest checkpoint, Ray dashboard and
    events. A run is `dead` if its process ended without recording how, for example by kill -9.

    Example: `accord status runs/my-run --json`
    """
    import json

    from cluster.runs.console import result
    from cluster.runs.overview import overview
    from cluster.runs.run import Run
    from cluster.runs.status import headline, read_status, status_lines

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
