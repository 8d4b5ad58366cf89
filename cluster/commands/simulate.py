"""`accord simulate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.options import Json, Quiet, reporter


def simulate(
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            help="Settings of the scenario; docs/scale.md lists them.", metavar="KEY=VALUE"
        ),
    ] = None,
    workers: Annotated[
        str,
        typer.Option(
            help="Numbers of workers, separated by commas. Prompts per step and learner speed "
            "grow in proportion.",
            show_default=False,
        ),
    ] = "",
    from_run: Annotated[
        Path | None,
        typer.Option("--from", help="Take lengths and times from this training run."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Simulate a run of another size on a virtual clock.

    The real controller drives workers that only let time pass. For each number of
    workers the command prints step time, busy shares, tokens per second, staleness, waste and
    scaling efficiency. docs/results.md explains the columns.

    Example: `accord simulate --workers 64,256 bound=8 stragglers=0.01`
    """
    from cluster.measure.simulation.request import show_simulation

    show_simulation(workers, settings or [], from_run, as_json, reporter(quiet or as_json))
