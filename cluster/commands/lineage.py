"""`accord lineage`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.options import Json, complete_run


def lineage(
    of: Annotated[
        Path,
        typer.Argument(
            help="A run directory or a part of one, or a snapshot. With --models: a snapshot or "
            "a preference store (*.db).",
            metavar="RUN",
            autocompletion=complete_run,
        ),
    ],
    models: Annotated[
        bool, typer.Option("--models", help="The other way: name the runs that learnt from it.")
    ] = False,
    runs: Annotated[
        list[Path] | None,
        typer.Option(help="With --models: folder with run directories. Default: runs."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Follow a model back to its labels, and check each link.

    The command hashes what every run names as its parent and compares it with the hash that the run
    recorded when it began. The exit code is 1 if a link is broken: the parent has changed, is gone,
    or was forgotten.

    Example: `accord lineage runs/quickstart`
    """
    from cluster.assembly.lineage import lineage_of
    from cluster.assembly.lineage_text import lineage_lines, model_lines, models_of
    from cluster.runs.console import result

    if models:
        learnt = models_of(of, runs or [Path("runs")])
        result(json.dumps(learnt, indent=2) if as_json else "\n".join(model_lines(learnt)))
        return
    found = lineage_of(of)
    result(json.dumps(found.record(), indent=2) if as_json else "\n".join(lineage_lines(found)))
    if found.broken:
        raise typer.Exit(1)
