"""`accord doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.commands.options import Json


def doctor(
    given: Annotated[
        Path | None,
        typer.Argument(
            help="A run directory or a config, for its disk, its cluster and its reward service.",
            metavar="RUN_OR_CONFIG",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check this machine and the cluster.

    The cluster is the one that the config joins, host by host. One line for each check: ok, warn or
    fail, and what to do. A failure ends with exit code 1.

    Example: `accord doctor examples/ppo.toml`
    """
    from cluster.assembly.doctor import examine, tell

    if not tell(examine(given), as_json):
        raise typer.Exit(1)
