"""`accord runs`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.options import Json, runs_in

HEADER = ("run", "command", "status", "step", "latest", "started", "size")


def runs(
    directory: Annotated[
        Path, typer.Argument(help="Folder that holds the run directories.", metavar="DIR")
    ] = Path("runs"),
    as_json: Json = False,
) -> None:
    """List the runs of a folder.

    The newest run comes last. The stages of a quickstart are listed below it.

    Example: `accord runs`

    Example: `accord runs other-runs --json`
    """
    import json

    from cluster.runs.console import result
    from cluster.runs.overview import ago, overview, size
    from cluster.runs.text_table import text_table

    found = [overview(path, str(path.relative_to(directory))) for path in runs_in(directory)]
    if as_json:
        result(json.dumps([one.record() for one in found]))
        return
    rows = []
    for one in found:
        rows.append(
            (
                one.name,
                one.command,
                one.status,
                f"{one.step}/{one.steps}" if one.steps else str(one.step or "-"),
                one.latest_text() or "-",
                ago(one.created),
                size(one.size_bytes or 0),
            )
        )
    result("\n".join(text_table(HEADER, rows, right="lllrlrr")))
